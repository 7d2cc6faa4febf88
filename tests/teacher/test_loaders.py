"""No code of a model's repository runs unasked, whoever loads it and whatever stands on standard input."""

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd_core.doctor import examine
from kd_core.errors import TeacherError
from kd_core.recipe import PretrainedStudent, PretrainedTeacher, Recipe
from kd_core.recipe.files import load_recipe
from kd_core.store import LocalStore
from kd_core.student.describe import describe
from kd_core.teacher.loaders import Place, read_config
from kd_core.teacher.models import load_directory, load_model, load_tokenizer, save_model
from kd_core.teacher.reference import reference_identity

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "kd-own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def coded(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with a model and a tokenizer of its own code, which leaves a mark where it runs; `y` on standard input."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    save_model(tiny_model(num_layers=2), tmp_path)
    directory = tmp_path / "model"
    (directory / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _change(directory / "config.json", {"model_type": "kd-own", "architectures": ["OwnModel"], "auto_map": own})
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    _change(directory / "tokenizer_config.json", tokenizer)
    return directory


def _change(file: Path, fields: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _recipe(*changes: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes" / "quickstart.yaml"), [*changes, "run={threads: 1, device: cpu}"])


def _teacher(directory: Path) -> PretrainedTeacher:
    return PretrainedTeacher(kind="pretrained", model=str(directory))


LOADS: dict[str, Callable[[Path], object]] = {
    "teacher's tokenizer": lambda path: load_tokenizer(_teacher(path)),
    "teacher": lambda path: load_model(_teacher(path), device=CPU, tokenizer=None),  # type: ignore[arg-type]
    "student's tokenizer": lambda path: load_tokenizer(PretrainedStudent(kind="pretrained", model=str(path))),
    "student": lambda path: load_model(PretrainedStudent(kind="pretrained", model=str(path)), device=CPU, tokenizer=None),  # type: ignore[arg-type]
    "directory's tokenizer": load_tokenizer,
    "directory": lambda path: load_directory(path, device=CPU, tokenizer=None),  # type: ignore[arg-type]
    "describe a teacher": lambda path: describe(_recipe(f"teacher={{kind: pretrained, model: {path}}}", "student={kind: from_teacher}")),
    "describe a student": lambda path: describe(_recipe(f"student={{kind: pretrained, model: {path}}}")),
}


@pytest.mark.parametrize("what", LOADS)
def test_no_code_runs_unasked(coded: Path, what: str) -> None:
    with pytest.raises(TeacherError, match=r"brings code of its own, and no code runs unasked.*teacher\.trust_remote_code: true"):
        LOADS[what](coded)
    assert not (coded.parent / "ran").exists()


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_doctor_runs_no_code(coded: Path, side: str, tmp_path: Path) -> None:
    recipe = _recipe(f"{side}={{kind: pretrained, model: {coded}}}", "prompts.sources.0.num=50")
    found = {finding.name: finding for finding in examine(recipe, LocalStore(tmp_path / "store"))}
    assert found["models"].status == "failed"
    assert "no code runs unasked" in found["models"].detail
    assert not (coded.parent / "ran").exists()


def test_trusted_code_runs_and_is_part_of_the_teachers_identity(coded: Path) -> None:
    teacher = PretrainedTeacher(kind="pretrained", model=str(coded), trust_remote_code=True)
    tokenizer = load_tokenizer(teacher)
    assert type(load_model(teacher, device=CPU, tokenizer=tokenizer).model).__name__ == "OwnModel"
    assert (coded.parent / "ran").exists()
    before, untrusted = reference_identity(teacher), reference_identity(_teacher(coded))
    (coded / "deeper").mkdir()
    (coded / "deeper" / "more.py").write_text("x = 1\n")
    assert reference_identity(teacher) != before
    assert reference_identity(_teacher(coded)) == untrusted


def test_code_that_is_taken_from_another_repository_is_refused(coded: Path) -> None:
    _change(coded / "config.json", {"auto_map": {"AutoConfig": "somebody/else--own.OwnConfig"}})
    with pytest.raises(TeacherError, match="its code is taken from somebody/else, whose revision nobody pinned"):
        read_config(Place.directory(coded, trust_remote_code=True))


def test_one_module_loads_what_others_wrote() -> None:
    """`from_pretrained` without a word on code asks on the terminal; a call elsewhere would forget it one day."""
    files = [file for top in ("kd_core", "tasks", "flows", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    assert len(files) > 100
    found = {}
    for file in files:
        calls = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        loads = [node for node in calls if node.func.attr in ("from_pretrained", "from_config")]  # type: ignore[attr-defined]
        if loads:
            found[file.relative_to(ROOT).as_posix()] = [{keyword.arg for keyword in node.keywords} for node in loads]
    assert set(found) == {"kd_core/teacher/loaders.py"}
    assert all("trust_remote_code" in names for names in found["kd_core/teacher/loaders.py"])
