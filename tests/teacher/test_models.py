"""A model whose files are damaged is one line, whichever library met the damage."""

from pathlib import Path

import pytest

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
