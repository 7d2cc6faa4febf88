"""What MLflow would refuse, cut or bend: it gets what it can hold, and is told what that stands for."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.publication import LONG_VALUES, ModelInfo, Publication, StageRun, fitted
from tasks.tracking import Promotion, promotions, publish_run


def _publication(name: str = "p", **changed: object) -> Publication:
    model = ModelInfo(f"{name}-student", "/store/artifacts/train/a", {"kd.digest": "f0"}, True, ("ok",), {"pass_at_1": 0.75})
    made = Publication(name, "0a" * 16, {"a": "1"}, {}, (), (), {}, model)
    return replace(made, **changed)  # type: ignore[arg-type]


def test_what_fits_is_left_as_it_is() -> None:
    stage = StageRun("train", "s", {"a.b": "x" * 6000}, {"n/ll": 1.0}, {"loss": [(0, 1.0), (1, 0.5)]}, 1.0, "done")
    wanted = _publication(parameters={"a" * 250: "x"}, stages=(stage,))
    assert fitted(wanted) == replace(wanted, stages=(stage,), model=replace(wanted.model, reasons=["ok"]))


def test_long_and_odd_names_and_values_are_marked_distinct_and_whole_in_a_file() -> None:
    names = ["q" * 300, "q" * 299, "bad[0]", "bad(0)", "../up", "a//b", "größe"]
    wanted = _publication(parameters={**dict.fromkeys(names, "v"), "long": "x" * 7000}, tags={"t": "y" * 9000})
    found = fitted(wanted)
    assert len(found.parameters) == len(names) + 1
    assert all(len(name) <= 250 for name in found.parameters)
    assert found.parameters["größe"] == "v"
    assert len(found.parameters["long"]) == 6000
    assert "[cut: 7,000 characters, sha256 " in found.parameters["long"]
    assert found.parameters["long"].endswith(f"; whole in {LONG_VALUES}]")
    assert len(found.tags["t"]) == 5000
    whole = json.loads(found.artifacts[LONG_VALUES])
    assert (whole["long"], whole["t"], whole["q" * 300]) == ("x" * 7000, "y" * 9000, "v")
    assert fitted(found).parameters == found.parameters


@pytest.mark.parametrize("truncate", [None, "false"])
def test_mlflow_takes_all_of_it_and_a_second_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncate: str | None
) -> None:
    from mlflow import MlflowClient

    if truncate is not None:
        monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", truncate)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    series = {"loss": [(0, 3.0), (1, math.inf), (2, math.nan), (3, 1.0)], "never": [(0, math.nan)]}
    stage = StageRun("train", "s1", {"p" * 300: "z" * 7000, "bad[0]": "1"}, {"nll": -math.inf, "m" * 300: 1.0}, series, 1.0, "done")
    model = replace(
        _publication().model, reasons=[f"rule {i}: " + "y" * 300 for i in range(40)], metrics={"pass_at_1": math.nan, "kl": 0.5}
    )
    wanted = _publication(parameters={"task.system": "x" * 7000, "q" * 300: "1"}, stages=(stage,), model=model)
    first = publish_run(uri, wanted)
    assert publish_run(uri, wanted) == first
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.get_run(first.run_id)
    assert "[cut: 7,000 characters" in run.data.params["task.system"]
    assert run.data.metrics == {"kl": 0.5}
    said = run.data.tags["kd.not_finite"]
    assert said == "pass_at_1 is nan; train: nll is -inf; train: loss is inf at step 1, nan at step 2; train: never is nan at step 0"
    [nested] = client.search_runs([run.info.experiment_id], "tags.`kd.step_key` = 's1'")
    assert [(m.step, m.value) for m in client.get_metric_history(nested.info.run_id, "loss")] == [(0, 3.0), (3, 1.0)]
    assert "never" not in nested.data.metrics
    [file] = [item for item in client.list_artifacts(first.run_id) if item.path == LONG_VALUES]
    assert file.file_size > 7000


def test_the_registry_remembers_which_entry_made_a_version_champion(tmp_path: Path) -> None:
    """Of this store alone: versions of another store follow another ledger."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number, source in ((1, "/store/a"), (2, "/store/b"), (3, "/elsewhere/c")):
        model = replace(_publication().model, source=source, ledger_number=number, digests={"kd.digest": f"d{number}"})
        publish_run(uri, _publication(model=model, run_key=f"{number:032x}"))
    publish_run(uri, _publication(model=replace(_publication().model, source="/store/kept", promote=False), run_key="f" * 32))
    assert promotions(uri, "p-student", store_uri="/store") == [Promotion(1, "d1", 1), Promotion(2, "d2", 2)]
    assert promotions(uri, "never", store_uri="/store") == []
