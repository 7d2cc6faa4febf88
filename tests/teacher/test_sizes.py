"""Parameter counts from architectures and file headers, against the real models."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from kd_core.errors import TeacherError
from kd_core.recipe import Architecture, CharacterTokenizer, ModelRef
from kd_core.student.make import new_model, student_from_blocks
from kd_core.teacher.models import LoadedModel, save_model
from kd_core.teacher.sizes import llama_size, stored_size
from kd_core.tokens.encoding import character_tokenizer, num_columns

TOKENIZER = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789+="))
ARCHITECTURES = [
    Architecture(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24),
    Architecture(hidden_size=48, num_layers=4, num_heads=6, num_kv_heads=2, intermediate_size=40),
]


def _loaded(architecture: Architecture) -> LoadedModel:
    return LoadedModel(new_model(architecture, TOKENIZER, seed=0), TOKENIZER, num_columns(TOKENIZER))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architectures_size_is_the_models(architecture: Architecture) -> None:
    loaded, size = _loaded(architecture), llama_size(architecture, num_columns(TOKENIZER))
    assert size.parameters() == loaded.num_parameters
    assert len(size.blocks) == architecture.num_layers


@pytest.mark.parametrize("every_nth_block", [1, 2, 3])
def test_a_student_of_every_nth_block(every_nth_block: int) -> None:
    loaded = _loaded(ARCHITECTURES[1])
    student = student_from_blocks(loaded, every_nth_block)
    found = llama_size(ARCHITECTURES[1], num_columns(TOKENIZER)).parameters(range(0, 4, every_nth_block))
    assert found == sum(p.numel() for p in student.parameters())


def test_a_directorys_size_comes_from_its_header(tmp_path: Path) -> None:
    loaded = _loaded(ARCHITECTURES[1])
    save_model(loaded, tmp_path)
    size = stored_size(ModelRef(model=str(tmp_path / "model")))
    assert size == llama_size(ARCHITECTURES[1], num_columns(TOKENIZER))


def test_a_gguf_files_size_comes_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the values before it: numbers, texts, lists of texts."""
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").touch()
    writer = gguf.GGUFWriter(package / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc", "def"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    shapes = {"token_embd.weight": (3, 8), "blk.0.attn_q.weight": (8, 8), "blk.1.attn_q.weight": (8, 4), "blk.1.ffn_norm.weight": (8,)}
    for name, shape in {**shapes, "rope_freqs.weight": (4,)}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(tmp_path)
    size = stored_size(ModelRef(model="pkg://some_model/tiny.gguf"))
    assert size is not None
    assert (size.outside, size.blocks) == (24, (64, 40))


def test_a_hub_model_has_no_size_here() -> None:
    assert stored_size(ModelRef(model="org/name", revision="0" * 40)) is None


@pytest.mark.parametrize(("name", "content"), [("model.safetensors", b"short"), ("model.safetensors", b"\x05" + bytes(7) + b"no jn")])
def test_a_damaged_header_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(TeacherError, match=r"model\.safetensors: not a safetensors file \(.*\); fetch it again"):
        stored_size(ModelRef(model=str(tmp_path)))
