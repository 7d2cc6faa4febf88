"""What every command shows: something at once, within 80 columns, and nothing of ours that is a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KD = Path(sys.executable).parent / "kd"
FIRST_WORD = """
import sys
from unittest import mock
import flows.cli

class First:
    def write(self, text):
        loaded = sorted({'torch', 'transformers', 'kd_core.recipe', 'pyarrow', 'duckdb', 'prefect', 'mlflow', 'boto3'} & set(sys.modules))
        sys.__stdout__.write(f'{text.strip()}|{loaded}')
        sys.__stdout__.flush()
        import os
        os._exit(0)
    def flush(self): pass
    def isatty(self): return False

sys.stderr = First()
flows.cli.main()
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "r.yaml"], "reading r.yaml ..."),
        (["plan", "r.yaml"], "reading r.yaml ..."),
        (["status", "r.yaml"], "reading r.yaml ..."),
        (["status"], "opening .kd/store ..."),
        (["report", "r.yaml"], "reading r.yaml ..."),
        (["doctor", "r.yaml"], "reading r.yaml ..."),
        (["chat", "r.yaml", "--prompt", "x"], "reading r.yaml ..."),
        (["export", "r.yaml", "--out", "x"], "reading r.yaml ..."),
        (["student", "describe", "r.yaml"], "reading r.yaml ..."),
        (["cache", "ls"], "opening .kd/store ..."),
        (["cache", "verify"], "opening .kd/store ..."),
        (["down"], "stopping what runs from .kd/stack ..."),
    ],
    ids=lambda words: words if isinstance(words, str) else words[0],
)
def test_the_first_word_comes_before_anything_large_is_imported(words: list[str], said: str, tmp_path: Path) -> None:
    """So it comes in the first second, however busy the machine is."""
    code = f"import sys; sys.argv = {['kd', *words]!r}\n{FIRST_WORD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{said}|[]"


def test_a_run_tells_what_it_does_before_its_first_node(finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.home)
    called = kd("run", "--local", finished.recipe_file)
    assert called.steps == (
        f"reading {finished.recipe_file} ...",
        "opening .kd/store ...",
        "reading the sources of small, and what .kd/store holds of it ...",
    )
    assert kd("run", "--local", "--json", finished.recipe_file).steps == (), "JSON is for programs: nothing else is written"


def test_every_screen_fits_80_columns(finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is to be copied: a command, an address."""
    monkeypatch.chdir(finished.home)
    recipe = Path(os.path.relpath(finished.recipe_file))
    Path("r.yaml").write_text(recipe.read_text())
    (namespace,) = {path.name for path in (finished.store / "rows" / "soft_labels").iterdir()}
    commands = ("run --local r.yaml", "plan r.yaml", "plan r.yaml --set seeds=[0,1]", "status r.yaml", "status", "report r.yaml")
    commands = (*commands, "doctor r.yaml", "cache ls", f"cache stats {namespace}", "student describe r.yaml", "--help", "plan -h")
    prices = "--set run.price_per_hour=3 --set run.price_per_gb_month=0.02 --set run.price_per_thousand_requests=0.01"
    for words in (*commands, f"plan r.yaml --set prompts.sources.0.num=120000 --set teacher.training.steps=9000000 {prices}"):
        called = kd(*words.split())
        assert called.code == 0, (words, called.err)
        assert called.out
        wide = [line for line in called.out.splitlines() if len(line) > 80]
        assert [line for line in wide if not line.startswith(("Full report:", "Status in", "in sqlite:"))] == [], words


def test_the_version_and_help_of_every_command(kd: Any) -> None:
    called = kd("--version")
    assert (called.code, called.err) == (0, "")
    assert called.out.startswith("kd ")
    for words in (
        "run",
        "plan",
        "status",
        "report",
        "doctor",
        "chat",
        "export",
        "up",
        "down",
        "student",
        "student describe",
        "cache",
        "cache ls",
    ):
        long, short = kd(*words.split(), "--help"), kd(*words.split(), "-h")
        assert (short.code, short.out) == (0, long.out)
        assert f"Usage: kd {words} " in short.out


def test_the_shell_completes_commands_and_choices(tmp_path: Path) -> None:
    """The script that is installed asks so."""

    def completed(words: str, position: int) -> list[str]:
        env = {**os.environ, "_KD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        return subprocess.run([KD], capture_output=True, text=True, check=True, env=env, cwd=tmp_path).stdout.split()

    assert completed("kd st", 1) == ["status", "student"]
    assert completed("kd chat r.yaml --model ", 4) == ["teacher", "student", "both"]
    shown = subprocess.run(
        [KD, "--show-completion"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert shown.returncode in (0, 2), shown.stderr


# ------------------------------------------------------------------------------------------- never a traceback

WITH_A_RECIPE = (
    "run --local",
    "plan",
    "status",
    "report",
    "doctor",
    "chat --prompt x",
    "export --out out",
    "student describe",
    "cache verify --store . --live",
)


@pytest.mark.parametrize("words", WITH_A_RECIPE)
def test_what_is_no_recipe_is_one_line(words: str, kd: Any, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    names = ["missing.yaml", "empty.yaml", "binary.yaml", *([] if words.startswith("chat") else ["directory"])]  # which may hold a model
    if os.geteuid() != 0:  # to root nothing is locked
        (tmp_path / "locked.yaml").touch(mode=0o000)
        names.append("locked.yaml")
    for name in names:
        called = kd(*words.split(), name)
        assert (called.code, called.out) == (2, ""), name
        [line] = called.err.splitlines()
        assert line.startswith(f"kd: {name}: ")


@pytest.mark.parametrize("command", ["run --local", "plan", "status", "report", "chat --prompt 1+1="])
def test_bad_data_and_bad_stores_are_bad_input(command: str, small_recipe: Path, kd: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = 'prompts.sources=[{kind: file, path: nowhere.jsonl, prompt: "{q}"}]'
    for change, said in (
        (source, "no file at 'nowhere.jsonl'"),
        ("run.store=file", f"{tmp_path / 'file'} is a file, and a store is a directory"),
    ):
        called = kd(*command.split(), small_recipe, "--set", change)
        assert called.code == 2
        assert said in called.err + called.out, "a plan lists its faults"


def test_a_plan_says_what_will_fail(small_recipe: Path, kd: Any) -> None:
    wrong = ("--set", 'teacher.tokenizer.alphabet="0123456789"', "--set", "run.tracking=http://127.0.0.1:9")
    called = kd("plan", small_recipe, *wrong)
    assert called.code == 2
    assert [line.partition(" ")[0] for line in called.out.splitlines() if line.startswith("will fail: ")] == ["will"] * 2
    assert "Plan (nothing has been run)" in called.out, "the plan is shown all the same"
    called = kd("plan", "--json", small_recipe, *wrong)
    assert (called.code, called.err) == (2, "")
    assert '"faults": [\n  "MLflow at http://127.0.0.1:9 cannot be used' in called.out


def test_a_report_that_cannot_be_written_is_one_line(finished: Any, kd: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    called = kd(
        "report",
        finished.recipe_file,
        "--set",
        f"run.store={finished.store}",
        "--set",
        f"run.tracking={finished.tracking}",
        "--output",
        "file",
    )
    assert called.code == 2
    assert called.err == "kd: file: the report cannot be written there (File exists); name another folder with --output\n"


def test_a_defect_where_nothing_can_be_written_is_told_with_a_log_elsewhere(
    finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("what nobody foresaw")

    monkeypatch.setattr("flows.cli.results.status_rows", broken)
    monkeypatch.chdir("/proc")
    called = kd("status", finished.recipe_file)
    assert called.code == 1
    log = Path(called.err.rpartition("the traceback is in ")[2].strip())
    assert "in broken" in log.read_text()
    log.unlink()


def test_an_interrupt_that_a_library_renames_is_still_one(finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lazy imports of transformers do."""

    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr("flows.cli.results.status_rows", interrupted)
    called = kd("status", finished.recipe_file)
    assert (called.code, called.out) == (130, "")
    assert called.err.startswith("kd: stopped. ")


def test_an_interrupt_while_the_command_line_is_imported_is_one_line(tmp_path: Path) -> None:
    code = """
import builtins, sys
real = builtins.__import__
def interrupted(name, *rest):
    if name == 'typer':
        raise KeyboardInterrupt
    return real(name, *rest)
import flows.cli
builtins.__import__ = interrupted
flows.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kd: stopped before anything was begun\n")


def test_an_interrupt_in_the_first_step_is_one_line(small_recipe: Path, kd_process: Any) -> None:
    process = kd_process("doctor", small_recipe)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("kd: stopped. ")
    assert "Traceback" not in err


def test_a_reader_that_stops_early_hears_no_complaint(finished: Any, kd_process: Any) -> None:
    process = kd_process("status", finished.recipe_file)
    process.stdout.close()
    process.wait(120)
    assert [line for line in process.stderr if not line.startswith("  ")] == []
