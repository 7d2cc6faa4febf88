"""Vocabulary columns from file headers alone."""

import json
from pathlib import Path

import gguf
import pytest

from kd_core.errors import TeacherError
from kd_core.recipe import ModelRef
from kd_core.teacher.columns import stored_columns


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"vocab_size": 151_936}, 151_936), ({"text_config": {"vocab_size": 262_208}}, 262_208), ({"hidden_size": 8}, None)],
)
def test_a_directorys_columns_are_in_its_config(tmp_path: Path, config: dict[str, object], expected: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_columns(ModelRef(model=str(tmp_path))) == expected


def test_a_directory_without_a_config_tells_nothing_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert stored_columns(ModelRef(model=str(tmp_path))) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match=r"config\.json: not JSON \(.*\); fetch it again$"):
        stored_columns(ModelRef(model=str(tmp_path)))


@pytest.mark.parametrize("tokens", [["a", "bc", "def"], [], None])
def test_a_gguf_files_columns_are_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: list[str] | None) -> None:
    package = tmp_path / "columns_model"
    package.mkdir()
    (package / "__init__.py").touch()
    writer = gguf.GGUFWriter(package / "tiny.gguf", "llama")
    writer.add_block_count(2)
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_scores([0.5] * len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = stored_columns(ModelRef(model="pkg://columns_model/tiny.gguf"))
    assert found == (None if not tokens else len(tokens))


def test_a_hub_model_that_is_not_here_tells_nothing() -> None:
    assert stored_columns(ModelRef(model="org/model", revision="0" * 40)) is None
