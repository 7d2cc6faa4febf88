"""prefect.yaml against Prefect's own models: it ignores keys that it does not know, and hides flows that do not import."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import ConcurrencyLimitSpec, DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate
from pydantic import BaseModel

from kd_core.recipe.files import load_recipe

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())
DEPLOYMENTS: list[dict[str, Any]] = PROJECT["deployments"]
BY_NAME = {f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}": entry for entry in DEPLOYMENTS}


def known(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def unknown_keys(project: dict[str, Any]) -> list[str]:
    """Every key that Prefect would drop without a word, by path. 'definitions' is ours: YAML anchors."""
    found = [key for key in project if key not in known(PrefectYamlModel) | {"definitions"}]
    for entry in project["deployments"]:
        where = f"{entry.get('name')}"
        found += [f"{where}.{key}" for key in entry if key not in known(DeploymentConfig)]
        found += [f"{where}.work_pool.{key}" for key in entry.get("work_pool", {}) if key not in known(WorkPoolConfig)]
        limit = entry.get("concurrency_limit")
        found += [f"{where}.concurrency_limit.{key}" for key in limit or () if key not in known(ConcurrencyLimitSpec)]
        for schedule in entry.get("schedules", ()):
            found += [f"{where}.schedules.{key}" for key in schedule if key not in known(RawScheduleConfig)]
    return found


def test_prefect_knows_every_key():
    assert len(DEPLOYMENTS) >= 3
    assert unknown_keys(PROJECT) == []


@pytest.mark.parametrize("key", ["paramaters", "schedule_list", "retries"])
def test_a_misspelt_key_would_be_found(key):
    changed = {**PROJECT, "deployments": [{**DEPLOYMENTS[0], key: 1}]}
    PrefectYamlModel.model_validate(changed)  # Prefect says nothing
    assert unknown_keys(changed) == [f"on-demand.{key}"]


def test_the_file_is_valid_and_names_the_installed_version():
    import prefect

    model = PrefectYamlModel.model_validate(PROJECT)
    assert model.prefect_version == prefect.__version__
    assert {deployment.work_pool.name for deployment in model.deployments} == {"kd"}


def test_the_promised_deployments_are_there():
    assert set(BY_NAME) >= {"distill/on-demand", "distill/nightly", "evaluate_model/on-demand"}
    assert len(BY_NAME) == len(DEPLOYMENTS), "flow and name together are a deployment's name"
    assert all(entry["description"] for entry in DEPLOYMENTS)


def test_the_nightly_run_has_one_cron_schedule_with_a_slug_and_never_overlaps():
    entry = BY_NAME["distill/nightly"]
    [schedule] = entry["schedules"]
    assert schedule["slug"] == "nightly"
    assert schedule["active"] is True
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]).timezone == "UTC"
    assert entry["concurrency_limit"]["limit"] == 1
    assert ConcurrencyLimitStrategy(entry["concurrency_limit"]["collision_strategy"]) is ConcurrencyLimitStrategy.CANCEL_NEW


@pytest.mark.parametrize("name", BY_NAME)
def test_every_entrypoint_is_a_real_flow_that_takes_the_parameters_in_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = BY_NAME[name]
    assert ":" not in entry["entrypoint"], "a path would put flows/ first on sys.path and make a second copy of the module"
    flow = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
    assert flow.name == name.partition("/")[0]
    assert flow.validate_parameters(entry["parameters"])
    assert load_recipe(entry["parameters"]["recipe_file"]).name == "quickstart"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The parameter schema of the distill flow, as the form in the UI gets it."""
    flow = load_flow_from_entrypoint("flows.distill.distill", use_placeholder_flow=False)
    return flow.parameters.model_dump()


def test_the_form_offers_a_whole_recipe_with_a_description_at_every_field(schema):
    assert set(schema["properties"]) == {"recipe", "recipe_file", "overrides"}
    assert all(schema["properties"][name]["description"] for name in schema["properties"])
    recipe = schema["definitions"]["Recipe"]
    assert set(recipe["properties"]) >= {"name", "seeds", "teacher", "student", "objective", "training", "evaluation", "gate", "publish"}
    described = 0
    for model, definition in schema["definitions"].items():
        for field, shape in definition.get("properties", {}).items():
            if field != "kind":
                assert shape.get("description"), f"{model}.{field} has no label in the form"
                described += 1
    assert described > 80


def test_the_form_takes_a_recipe_and_refuses_a_wrong_one(schema):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml").model_dump(mode="json")
    validate({"recipe": recipe}, schema, raise_on_error=True)
    for wrong in ({"seeds": []}, {"training": {**recipe["training"], "steps": 0}}, {"objective": {"supervision": "wishful"}}, {"extra": 1}):
        assert validate({"recipe": {**recipe, **wrong}}, schema), wrong
