"""The flows under a real Prefect server: the same artifacts as the local run, results in the UI, errors as themselves."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from kd_core.errors import ArtifactError, IntegrityError, RecipeError, SourceError, StoreError, TeacherError
from kd_core.recipe.files import load_recipe

pytestmark = pytest.mark.slow  # a Prefect server takes 17-21 s to start


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """A temporary Prefect server with an empty database, once for all flows."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def flows(server, finished, monkeypatch) -> Any:
    """The flows, in the directory of the finished run."""
    from flows.distill import distill
    from flows.evaluate_model import evaluate_model

    monkeypatch.chdir(finished.home)
    return {"distill": distill, "evaluate_model": evaluate_model}


def artifacts(key: str) -> list[Any]:
    """Prefect artifacts under a key, oldest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    async def read() -> list[Any]:
        async with get_client() as client:
            return await client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))

    return asyncio.run(read())


def flow_runs() -> list[Any]:
    from prefect.client.orchestration import get_client

    async def read() -> list[Any]:
        async with get_client() as client:
            return await client.read_flow_runs()

    return asyncio.run(read())


def test_the_flow_finds_what_the_local_run_made_and_shows_it(flows, finished):
    done = flows["distill"](recipe_file=str(finished.recipe_file))
    said = {node["name"]: (node["fingerprint"], node["digest"]) for node in finished.said["nodes"]}
    assert {name: (artifact.fingerprint, artifact.digest) for name, artifact in done.items()} == said
    assert list(done) == list(said)
    assert all(artifact.hit for artifact in done.values())
    stages = artifacts("small-stages")[-1]
    rows = json.loads(stages.data)
    assert [row["stage"] for row in rows] == list(said)
    assert {row["result"] for row in rows} == {"hit"}
    report = artifacts("small-report")[-1]
    assert finished.said["verdict"]["headline"] in report.data


def test_a_recipe_may_be_given_as_a_form(flows, finished):
    recipe = load_recipe(finished.recipe_file).model_dump(mode="json")
    done = flows["distill"](recipe=recipe)
    assert {name: artifact.digest for name, artifact in done.items()} == {n["name"]: n["digest"] for n in finished.said["nodes"]}


def test_one_changed_field_is_computed_by_the_flow_as_by_the_local_run(flows, copy, kd):
    """Tasks compute the same bytes, and progress reaches the UI."""
    change = "training.learning_rate=0.004"
    done = flows["distill"](recipe_file=str(copy.recipe_file), overrides=[change, "evaluation.compare=[]", f"run.store={copy.store}"])
    new = {name for name, artifact in done.items() if not artifact.hit}
    assert new == {"student.0", "evaluate.student", "evaluate.champion", "gate", "report", "publish"}
    again = kd("run", "--local", "--json", copy.recipe_file, "--set", change, "--set", "evaluation.compare=[]")
    assert again.code == 0, again.err
    assert {n["name"]: (n["digest"], n["status"]) for n in json.loads(again.out)["nodes"]} == {
        name: (artifact.digest, "hit") for name, artifact in done.items()
    }


def test_errors_arrive_as_themselves(flows, finished, tmp_path):
    with pytest.raises(RecipeError, match=r"training\.steps"):
        flows["distill"](recipe_file=str(finished.recipe_file), overrides=["training.steps=0"])
    missing = ["prompts.sources=[{kind: file, path: nowhere.jsonl, prompt: '{q}'}]", f"run.store={tmp_path}"]
    with pytest.raises(SourceError, match=r"nowhere\.jsonl"):
        flows["distill"](recipe_file=str(finished.recipe_file), overrides=missing)
    latest = max(flow_runs(), key=lambda run: run.created)
    assert latest.state.is_failed()


def test_only_a_store_that_could_not_be_reached_is_tried_again(server):
    from prefect.states import Failed

    from tasks.nodes import compute

    def tried_again(error: Exception) -> bool:
        return compute.retry_condition_fn(compute, None, Failed(data=error))

    assert tried_again(StoreError("gone"))
    assert not any(tried_again(error) for error in (IntegrityError("wrong"), TeacherError("wrong"), ValueError("defect")))


def test_evaluate_model_measures_the_champion_and_a_directory_alike(flows, finished):
    measured = flows["evaluate_model"](model="champion", recipe_file=str(finished.recipe_file))
    assert {row["metric"] for row in measured} >= {"pass_at_1", "nll", "kl", "agreement"}
    assert all(row["low"] <= row["value"] <= row["high"] and row["items"] == 20 for row in measured if row["metric"] == "nll")
    student = next(node for node in finished.said["nodes"] if node["name"] == "student.0")
    directory = finished.store / "artifacts" / "train" / student["fingerprint"] / student["digest"] / "model"
    assert flows["evaluate_model"](model=str(directory), recipe_file=str(finished.recipe_file)) == measured
    assert artifacts("evaluate-model")


def test_evaluate_model_without_a_champion_says_so(flows, finished):
    with pytest.raises(ArtifactError, match="nobody has no champion"):
        flows["evaluate_model"](recipe_file=str(finished.recipe_file), overrides=["publish=nobody"])


# ------------------------------------------------------------------------------------------- kd run, with its own server


def _watched(process: subprocess.Popen[str]) -> tuple[str, str, set[psutil.Process]]:
    """What a process said until it ended, and all processes that it had started."""
    seen: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            seen |= set(watched.children(recursive=True))
            time.sleep(0.1)
    out, err = process.communicate()
    return out, _told(err), seen


def _told(err: str) -> str:
    """What a command told on standard error, without what it was doing."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("  "))


def test_kd_run_starts_a_server_for_itself_and_leaves_nothing_behind(copy, finished, kd_process):
    shutil.rmtree(copy.store / "artifacts" / "report")
    process = kd_process("run", copy.recipe_file, MLFLOW_TRACKING_URI=finished.tracking)
    out, err, seen = _watched(process)
    assert process.returncode == 0, err
    nodes = [node["name"] for node in finished.said["nodes"]]
    assert [line.split()[1] for line in err.splitlines()] == nodes, "one line a node and nothing else"
    assert [line.split()[1] for line in err.splitlines() if not line.endswith("already done")] == ["report"]
    assert finished.said["verdict"]["headline"] in out
    assert seen, "the temporary server is a process of its own"
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert alive == []


def test_a_run_in_which_all_is_done_starts_no_server(copy, finished, kd_process):
    process = kd_process("run", copy.recipe_file, MLFLOW_TRACKING_URI=finished.tracking)
    out, err, seen = _watched(process)
    assert process.returncode == 0, err
    assert [line.split()[1] for line in err.splitlines()] == [node["name"] for node in finished.said["nodes"]]
    assert all(line.endswith("already done") for line in err.splitlines())
    assert finished.said["verdict"]["headline"] in out
    assert seen == set()


def test_kd_run_of_a_recipe_that_fails_ends_in_one_line(small_recipe, kd_process):
    process = kd_process("run", small_recipe, "--set", "prompts.sources=[{kind: file, path: nowhere.jsonl, prompt: '{q}'}]")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    [line] = _told(err).splitlines()
    assert line.startswith("kd: prompts.sources.0.path: no file at 'nowhere.jsonl'")
