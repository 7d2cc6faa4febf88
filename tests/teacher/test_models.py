"""A model whose files are damaged is one line, whichever library met the damage."""

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertLMHeadModel

from kd_core.errors import TeacherError
from kd_core.recipe import PretrainedTeacher
from kd_core.teacher.models import load_model, pick_device, save_model


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("model.safetensors", b"no weights"),
        ("model.safetensors", b""),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", b'{"model_type": "t5"}'),
    ],
)
def test_a_damaged_model_is_named(tiny_model, tmp_path: Path, file: str, data: bytes) -> None:
    teacher = tiny_model(num_layers=1)
    save_model(teacher, tmp_path)
    (tmp_path / "model" / file).write_bytes(data)
    spec = PretrainedTeacher(kind="pretrained", model=str(tmp_path / "model"))
    with pytest.raises(TeacherError, match=r"^model '.*' cannot be loaded: ") as caught:
        load_model(spec, device=pick_device("cpu"), tokenizer=teacher.tokenizer)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_loads_as_a_language_model_is_refused(tiny_model, tmp_path: Path) -> None:
    """It would see the tokens it is to predict: labels, and a student's loss, would be worth nothing."""
    tokenizer = tiny_model().tokenizer
    config = BertConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.5
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"logits change with the tokens that come after.*BertLMHeadModel is an encoder"):
        load_model(PretrainedTeacher(kind="pretrained", model=str(tmp_path)), device=pick_device("cpu"), tokenizer=tokenizer)


def test_a_model_without_heads_is_named(tiny_model, tmp_path: Path) -> None:
    teacher = tiny_model(num_layers=1)
    save_model(teacher, tmp_path)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 0, "head_dim": None}))
    spec = PretrainedTeacher(kind="pretrained", model=str(tmp_path / "model"))
    with pytest.raises(TeacherError, match="cannot be loaded: integer division"):
        load_model(spec, device=pick_device("cpu"), tokenizer=teacher.tokenizer)
