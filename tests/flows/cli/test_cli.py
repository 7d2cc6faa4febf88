"""The command line: what it prints and returns, for good input, bad input, absent servers and its own defects."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_core.ledger import history
from kd_core.store import LocalStore

STAGE_FIELDS = {"name", "fingerprint", "status", "rows", "rows_cached", "tokens", "bytes", "requests", "seconds", "price"}


# ------------------------------------------------------------------------------------------- a finished recipe


def test_the_plan_of_a_finished_recipe_is_all_hits_and_free(finished, kd, monkeypatch):
    monkeypatch.chdir(finished.home)
    called = kd("plan", "--json", finished.recipe_file)
    assert (called.code, called.err) == (0, "")
    plan = json.loads(called.out)
    assert set(plan) == {"filled_in", "stages", "total", "soft_label_options", "notes", "faults"}
    assert plan["faults"] == []
    groups = dict.fromkeys(node["name"].partition(".")[0] for node in finished.said["nodes"])
    assert [stage["name"] for stage in plan["stages"]] == list(groups)
    for stage in plan["stages"]:
        assert set(stage) == STAGE_FIELDS
        assert (stage["status"], stage["seconds"], stage["bytes"]) == ("hit", 0.0, 0), stage
        assert stage["rows"] == stage["rows_cached"]
    assert sum("hit" in line for line in kd("plan", finished.recipe_file).out.splitlines()) == len(groups)


def test_the_plan_of_a_short_recipe_shows_what_is_filled_in(kd, tmp_path):
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"q": f"{a}+{b}=", "a": f"#{a + b}"}) + "\n" for a in range(9) for b in range(9))
    )
    (tmp_path / "mine.yaml").write_text(
        "name: mine\n"
        "task: {answer_marker: '#', verifier: math}\n"
        "prompts:\n"
        "  sources: [&sums {kind: file, path: sums.jsonl, prompt: '{q}', gold: '{a}'}]\n"
        "teacher:\n"
        "  kind: trained\n"
        "  sources: [*sums]\n"
        "  tokenizer: {kind: characters, alphabet: '0123456789+=#'}\n"
        "  architecture: &size {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64}\n"
        "  training: {steps: 4, batch_rows: 8, learning_rate: 0.003}\n"
        "student: {kind: config, architecture: *size}\n"
    )
    plan = json.loads(kd("plan", "--json", "mine.yaml").out)
    assert plan["filled_in"]["seeds"] == [0, 1, 2]
    assert plan["filled_in"]["training"] == {
        "epochs": 10.0, "least_steps": 500, "warmup_share": 0.05, "batch_rows": 32, "learning_rate": 0.003,
    }  # fmt: skip
    lines = kd("plan", "mine.yaml", "--set", "training.steps=40").out.splitlines()
    assert "  seeds = [0, 1, 2]" in lines
    assert "  task.template = plain" in lines
    assert "  training.batch_rows = 32" in lines
    assert not [line for line in lines if line.startswith("  training.steps")]


def test_a_plan_in_an_empty_directory_is_all_misses_and_writes_nothing(small_recipe, kd, tmp_path):
    called = kd("plan", "--json", small_recipe)
    assert (called.code, called.err) == (0, "")
    assert {stage["status"] for stage in json.loads(called.out)["stages"]} == {"miss"}
    assert list(tmp_path.iterdir()) == []


def test_status_before_and_after(finished, kd, monkeypatch):
    called = kd("status", "--json", finished.recipe_file)
    assert (called.code, called.err) == (0, "")
    nodes = json.loads(called.out)["nodes"]
    assert [node["name"] for node in nodes] == [node["name"] for node in finished.said["nodes"]]
    assert {(node["status"], node["seconds"], node["resumes_at_step"]) for node in nodes} == {("missing", None, None)}
    monkeypatch.chdir(finished.home)
    said = json.loads(kd("status", "--json", finished.recipe_file).out)
    assert said["store"] == str(finished.store)
    assert {node["status"] for node in said["nodes"]} == {"done"}
    assert [node["fingerprint"] for node in said["nodes"]] == [node["fingerprint"] for node in finished.said["nodes"]]
    shown = kd("status", finished.recipe_file).out
    assert sum("done" in line for line in shown.splitlines()) == len(nodes)


def test_a_run_for_people_ends_with_verdict_numbers_and_the_next_command(finished, kd, monkeypatch):
    monkeypatch.chdir(finished.home)
    called = kd("run", "--local", finished.recipe_file, "--set", "run.shard_rows=32")
    assert called.code == 0
    nodes = [node["name"] for node in finished.said["nodes"]]
    assert [line.split()[1] for line in called.err.splitlines()] == nodes
    assert all(line.startswith("= ") and line.endswith("already done") for line in called.err.splitlines())
    assert called.out.startswith("\nAsked: Can a student ")
    assert all(len(line) <= 80 for line in called.out.split("\n\n")[0].splitlines())
    assert "Promoted by its rules; one seed shows nothing of the recipe.\n" + finished.said["verdict"]["headline"] in called.out
    assert "small-student version 1; champion: version 1" in called.out
    assert f"{len(nodes)} of {len(nodes)} nodes were done already" in called.out
    assert called.out.rstrip().endswith(f"kd report {finished.recipe_file} --set run.shard_rows=32")


def test_report_writes_three_files_that_agree_with_what_it_prints(finished, kd, tmp_path):
    said = ["--set", f"run.store={finished.store}"]
    called = kd("report", finished.recipe_file, *said)
    assert (called.code, called.err) == (0, "")
    folder = tmp_path / "reports" / "small"
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md", "report.json"}
    assert called.out.startswith("Asked: Can a student ")
    assert kd("report", "--markdown", finished.recipe_file, *said).out.strip() == (folder / "report.md").read_text().strip()
    assert kd("report", "--json", finished.recipe_file, *said).out.strip() == (folder / "report.json").read_text().strip()
    called = kd("report", finished.recipe_file, *said, "--output", "elsewhere")
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_report_of_a_recipe_that_was_not_run_says_what_to_run(small_recipe, kd):
    called = kd("report", small_recipe)
    assert (called.code, called.out) == (1, "")
    assert called.err.strip().endswith(f"run it first: kd run {small_recipe}")
    assert len(called.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("command", ["run", "plan", "status", "report", "doctor"])
def test_every_command_refuses_a_recipe_that_is_not_there(kd, command, tmp_path):
    called = kd(command, "nowhere.yaml")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("kd: nowhere.yaml: cannot be read (No such file or directory); pass the path of a recipe such as ")
    assert len(called.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("trainings.steps=3", "trainings: unknown field; did you mean 'training'?"),
        ("training.stepps=3", "training.stepps: unknown field; did you mean 'steps'?"),
        ("training.steps=many", "training.steps: "),
        ("training.steps=0", "training.steps: "),
        ("prompts.split.test=1.5", "prompts.split.test: "),
        ("seeds=[]", "seeds: "),
        ("soft_labels.kind=guessed", "soft_labels.kind: found 'guessed'; allowed: "),
        ("soft_labels.temperature=3.0", "objective.temperature: 2 is not among the temperatures stored by soft_labels.sampled: 3"),
        ("soft_labels=null", "soft_labels: objective.supervision: soft needs them"),
        ("prompts.sources.7.num=3", "--set prompts.sources.7.num=3: prompts.sources.7 is a list of 1; use a number from 0 to 0"),
        ("name.first=x", "--set name.first=x: name is the value 'small' and has no fields below it"),
        ("training.steps", "--set 'training.steps': expected path=value"),
        ("training.steps=[1", "--set training.steps:1:3: not valid YAML"),
        ("publish=../../etc", "publish: "),
    ],
)
def test_one_problem_is_one_line_that_names_the_field(small_recipe, kd, tmp_path, change, expected):
    called = kd("run", "--local", small_recipe, "--set", change)
    assert (called.code, called.out) == (2, "")
    [line] = called.err.splitlines()
    assert re.match(rf"kd: (?:{re.escape(str(small_recipe))}(?::\d+)?: )?{re.escape(expected)}", line)
    assert list(tmp_path.iterdir()) == [], "nothing is written for a recipe that is not valid"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", ":1:9: not valid YAML"),
        ("name: x\nname: y\n", ":2:1: not valid YAML: key 'name' stands twice"),
        ("- 1\n- 2\n", ": expected fields, each 'name: value', found a list"),
        ("", ": is empty; kd init writes a first recipe"),
        ("\x00", ": not valid YAML"),
        (b"\xff\xfe\x00", ": cannot be read (it is not UTF-8 text)"),
    ],
)
def test_a_file_that_is_no_recipe(kd, tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    called = kd("plan", "bad.yaml")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("kd: bad.yaml")
    assert expected in called.err
    assert "Traceback" not in called.err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_several_problems_are_several_lines(small_recipe, kd):
    called = kd("plan", small_recipe, "--set", "training.steps=0", "--set", "answers.max_tokens=x", "--set", "gates=1")
    assert called.code == 2
    lines = [line.rpartition(f"{small_recipe}: ")[2] for line in called.err.splitlines()]
    assert {line.partition(":")[0] for line in lines} == {"training.steps", "answers.max_tokens", "gates"}


@pytest.mark.parametrize("words", [["run"], ["fly"], ["run", "--fast", "x.yaml"], ["plan", "x.yaml", "--set"], ["report", "a", "b"]])
def test_wrong_usage_is_one_line(kd, tmp_path, words):
    called = kd(*words)
    assert (called.code, called.out) == (2, "")
    [line] = called.err.splitlines()
    assert line.startswith("kd: ")
    assert line.endswith("(kd --help shows what there is)")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- the world is not there


def test_a_store_that_cannot_be_reached_is_one_line_however_often_it_was_tried(small_recipe, kd, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-canary")
    words = ["kd", "run", "--local", str(small_recipe), "--set", "run.store=s3://bucket/kd", "--set", "run.s3.endpoint=http://127.0.0.1:9"]
    code = f"import sys, flows.cli, kd_core.store.s3 as s3; s3.ATTEMPTS = 3; sys.argv = {words!r}; flows.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *steps, error = done.stderr.splitlines()
    assert error == "kd: s3://bucket/kd: cannot reach http://127.0.0.1:9 in 3 tries; start the server, or correct run.s3.endpoint"
    assert steps == [f"  reading {small_recipe} ...", "  opening s3://bucket/kd ..."]
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_credentials(small_recipe, kd):
    called = kd("status", small_recipe, "--set", "run.store=s3://bucket/kd", "--set", "run.s3.endpoint=http://127.0.0.1:9")
    assert called.code == 2
    [line] = called.err.splitlines()
    assert "credentials" in line.lower()


def test_a_directory_that_cannot_be_written(small_recipe, kd):
    called = kd("run", "--local", "--json", small_recipe, "--set", "run.store=/proc/kd")
    assert (called.code, called.out) == (2, "")
    [line] = called.err.splitlines()
    assert "/proc/kd" in line


def test_a_registry_that_is_not_there_costs_only_the_publication(copy, kd, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    called = kd("run", "--local", copy.recipe_file)
    assert (called.code, called.out) == (1, "")
    lines = called.err.splitlines()
    assert [line[:2] for line in lines[:-1]] == ["= "] * (len(copy.said["nodes"]) - 1)
    assert lines[-1].startswith("kd: MLflow at sqlite:////proc/nowhere/mlflow.db cannot be used")
    assert len(history(LocalStore(copy.store), "small-student")) == 1


def test_a_defect_is_one_line_and_a_log(finished, kd, monkeypatch, tmp_path):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("what nobody foresaw")

    monkeypatch.setattr("flows.cli.results.status_rows", broken)
    called = kd("status", finished.recipe_file)
    assert (called.code, called.out) == (1, "")
    assert called.err.startswith("kd: ZeroDivisionError: what nobody foresaw\n")
    assert "Traceback" not in called.err
    assert "in broken" in (tmp_path / ".kd" / "last-error.log").read_text()


# ------------------------------------------------------------------------------------------- processes


def test_help_is_fast_to_import_and_names_every_command():
    code = "import sys, flows.cli; print(sorted({'torch', 'prefect', 'mlflow', 'duckdb', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    done = subprocess.run([Path(sys.executable).parent / "kd", "--help"], capture_output=True, text=True, check=True)
    for command in ("plan", "run", "status", "report", "doctor", "up", "down"):
        assert f" {command} " in done.stdout


@pytest.mark.drill
@pytest.mark.slow
def test_two_runs_of_one_recipe_at_once_share_the_work_or_adopt_it(small_recipe, finished, kd, kd_process, tmp_path):
    """Into one empty store and one empty registry: both end well, there is one of everything, with the bytes of a lone run."""
    processes = [kd_process("run", "--local", "--json", small_recipe) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert [err for _, err in ends] == ["", ""]
    said = [json.loads(out) for out, _ in ends]
    digests = [{node["name"]: node["digest"] for node in one["nodes"]} for one in said]
    assert digests[0] == digests[1]
    alone = {node["name"]: node["digest"] for node in finished.said["nodes"]}
    timed = {"report"}  # it shows how long things took
    assert {n: d for n, d in digests[0].items() if n not in timed} == {n: d for n, d in alone.items() if n not in timed}
    assert said[0]["published"] == said[1]["published"]
    assert said[0]["published"]["version"] == 1
    assert len(history(LocalStore(tmp_path / ".kd/store"), "small-student")) == 1
    assert json.loads(kd("status", "--json", small_recipe).out)["nodes"][-1]["status"] == "done"


def test_the_schema_and_the_reference_are_printed_as_they_are_committed(kd):
    docs = Path(__file__).parents[3] / "docs"
    assert kd("schema").out == (docs / "recipe.schema.json").read_text()
    assert kd("schema", "--markdown").out == (docs / "recipe.md").read_text()
