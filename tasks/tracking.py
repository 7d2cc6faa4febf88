"""What MLflow is told, once, at the end of a run: the parent run, one nested run a stage, and the model version.

Owns the mapping of a finished publication onto MLflow, idempotently: everything is looked up by its key before it is made
(runs by the tags kd.run_key and kd.step_key, metrics by step, the version by the tag kd.source), so a second call changes
nothing and a call after a crash finishes what the first one began. What MLflow holds as immutable keeps its first value:
parameters, logged steps, how long a stage took.

Weights are registered by reference: ``source`` is the address of the payload in our store, and nothing is copied.
An MLflow server refuses a local path as a source, unless it lies inside the run's own artifacts (it would serve any file
of its own machine otherwise); there the source is written ``kd-file:///path``: this path, on the machine that published.
In every case the tag kd.source holds the address as the store says it.

mlflow is imported inside functions: it takes seconds, and the command line must start fast.
"""

import fcntl
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from kd_core.errors import KDError
from kd_core.fingerprint import fingerprint, sha256_bytes
from kd_core.recipe.addresses import hide_passwords, redact_url
from kd_core.store.local import make_directory
from kd_core.store.scratch import scratch
from tasks.publication import DatasetInfo, ModelInfo, Publication, StageRun, fitted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "DatasetInfo",
    "ModelInfo",
    "Promotion",
    "Publication",
    "Published",
    "StageRun",
    "default_tracking_uri",
    "promotions",
    "publish_run",
]

CHAMPION, CHALLENGER = "champion", "challenger"
_LEDGER = "kd.ledger"

_SILENT = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# MLflow's own values let a dead server cost four minutes and a silent one fourteen.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "8", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
_PATIENT = {**_IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}


@dataclass(frozen=True)
class Published:
    """Where it went: the parent run, its page (None without a server), the version, and the champion's (None: no champion)."""

    run_id: str
    run_url: str | None
    version: int
    champion_version: int | None


@dataclass(frozen=True)
class Promotion:
    """A promotion that the registry was told of: the ledger's entry number, the digest of the bytes, and the version that has them."""

    number: int
    digest: str
    version: int


def default_tracking_uri(configured: str | None) -> str:
    """The recipe's ``run.tracking``, else MLFLOW_TRACKING_URI, else a database below the working directory's .kd."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / '.kd' / 'mlflow.db'}"


def publish_run(tracking_uri: str, publication: Publication) -> Published:
    """Tell MLflow about a finished run, and point its aliases: challenger always, champion where the gate said so.

    Args:
        tracking_uri: sqlite:/// (made if absent; run artifacts go to mlruns/ beside it), another database, or http(s)://.
        publication: what to tell.

    Returns:
        Ids and versions, read back.

    Raises:
        KDError: MLflow cannot be reached (within about 30 s) or refuses something. Calling again goes on from there.
    """
    publication = fitted(publication)
    with _quiet(), _explained(tracking_uri), _alone(tracking_uri):
        from mlflow import MlflowClient

        with _environment(_IMPATIENT):
            _reach_database(tracking_uri)
            client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
            experiment = _experiment(client, tracking_uri, publication.name)
        with _environment(_PATIENT):
            run = _parent_run(client, experiment.experiment_id, publication)
            _publish_stages(client, run, publication.stages)
            _publish_artifacts(client, run, publication.artifacts)
            version = _publish_version(client, tracking_uri, run.info.run_id, publication.model)
            champion = _point_aliases(client, publication.model, version)
            _finish(client, run, sum(stage.seconds for stage in publication.stages))
    url = f"{redact_url(tracking_uri).rstrip('/')}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    return Published(run.info.run_id, url if _is_server(tracking_uri) else None, version, champion)


def promotions(tracking_uri: str, model: str, *, store_uri: str) -> list[Promotion]:
    """What the registry knows of a model's promotions out of one store, by ledger number: a second witness of the ledger.

    Args:
        tracking_uri: as for ``publish_run``.
        model: registered model name.
        store_uri: versions whose bytes are elsewhere follow another ledger.

    Raises:
        KDError: MLflow cannot be reached.
    """
    with _quiet(), _explained(tracking_uri), _alone(tracking_uri):
        from mlflow import MlflowClient

        with _environment(_IMPATIENT):
            _reach_database(tracking_uri)
            versions = _versions(MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri), model)
    found = [
        Promotion(int(version.tags[_LEDGER]), version.tags["kd.digest"], int(version.version))
        for version in versions
        if _LEDGER in version.tags and version.tags["kd.source"].startswith(f"{store_uri}/")
    ]
    return sorted(found, key=lambda promotion: promotion.number)


# ---------------------------------------------------------------------------------------------- runs


def _experiment(client: "MlflowClient", tracking_uri: str, name: str) -> "Experiment":
    """Find or make the experiment; the artifacts of a new one in a sqlite database go beside the file."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = _sqlite_path(tracking_uri)
        location = None if database is None else (database.parent / "mlruns").as_uri()
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage != "active":
        raise KDError(
            f"experiment {name!r} at {redact_url(tracking_uri)} is deleted; run mlflow experiments restore -x {found.experiment_id}"
        )
    return found


def _parent_run(client: "MlflowClient", experiment_id: str, publication: Publication) -> "Run":
    """Find or make the run of this key, with its parameters, tags, headline metrics and data sets."""
    runs = client.search_runs(
        [experiment_id], f"tags.`kd.run_key` = '{publication.run_key}'", order_by=["attributes.start_time ASC"], max_results=1
    )
    if runs:
        run = runs[0]
    else:
        start = int((time.time() - sum(stage.seconds for stage in publication.stages)) * 1000)
        run = client.create_run(experiment_id, start_time=start, tags={"kd.run_key": publication.run_key}, run_name=publication.name)
    _log(client, run, parameters=publication.parameters, tags=publication.tags)
    _log_points(client, run, {name: [(0, value)] for name, value in publication.model.metrics.items()}, 0.0)
    _log_datasets(client, run.info.run_id, publication.datasets)
    return run


def _publish_stages(client: "MlflowClient", parent: "Run", stages: Sequence[StageRun]) -> None:
    """One nested run a stage, one after the other on the parent's clock."""
    parent_id, experiment_id = parent.info.run_id, parent.info.experiment_id
    nested = client.search_runs(
        [experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'", order_by=["attributes.start_time DESC"], max_results=10_000
    )
    known = {run.data.tags.get("kd.step_key"): run for run in nested}  # the oldest one a key
    start = parent.info.start_time
    for stage in stages:
        run = known.get(stage.step_key)
        if run is None:
            tags = {"mlflow.parentRunId": parent_id, "kd.step_key": stage.step_key, "kd.status": stage.status}
            run = client.create_run(experiment_id, start_time=start, tags=tags, run_name=stage.name)
        twice = sorted(set(stage.metrics) & set(stage.series))
        if twice:
            raise KDError(f"stage {stage.name}: {', '.join(twice)} is both a metric and a series; give the final value another name")
        _log(client, run, parameters=stage.parameters, tags={})
        _log_points(client, run, {name: [(0, value)] for name, value in stage.metrics.items()} | dict(stage.series), stage.seconds)
        _finish(client, run, stage.seconds)
        start += int(stage.seconds * 1000)


def _log(client: "MlflowClient", run: "Run", *, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Log the parameters that are not there yet, and the tags that differ."""
    from mlflow.entities import Param, RunTag

    new = [Param(name, value) for name, value in parameters.items() if name not in run.data.params]
    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if new or changed:
        client.log_batch(run.info.run_id, params=new, tags=changed)


def _log_points(client: "MlflowClient", run: "Run", series: Mapping[str, Sequence[tuple[int, float]]], seconds: float) -> None:
    """Log the steps after the last one there, spread over the stage's time; MLflow would store a repeated step twice."""
    from mlflow.entities import Metric

    metrics = []
    for name, points in series.items():
        logged = client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []
        last = max((metric.step for metric in logged), default=None)
        for i, (step, value) in enumerate(points, start=1):
            if last is None or step > last:
                metrics.append(Metric(name, value, run.info.start_time + int(seconds * 1000 * i / len(points)), step))
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def _log_datasets(client: "MlflowClient", run_id: str, datasets: Sequence[DatasetInfo]) -> None:
    """Name the inputs of a run. MLflow itself keeps one entry a (name, digest), so repeating this is free."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=dataset.name,
                digest=dataset.digest,
                source_type=urlsplit(dataset.source).scheme or "local",
                source=json.dumps({"uri": dataset.source}),
                profile=json.dumps({"num_rows": dataset.rows}),
            ),
            [InputTag("mlflow.data.context", dataset.context)],
        )
        for dataset in datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def _publish_artifacts(client: "MlflowClient", run: "Run", artifacts: Mapping[str, bytes | str]) -> None:
    """Upload the files, unless the run's tag says that these very bytes are there."""
    files = {name: content.encode() if isinstance(content, str) else content for name, content in artifacts.items()}
    digest = fingerprint({name: sha256_bytes(data) for name, data in files.items()})
    if not files or run.data.tags.get("kd.artifacts") == digest:
        return
    with scratch() as directory:
        for name, data in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        client.log_artifacts(run.info.run_id, str(directory))
    client.set_tag(run.info.run_id, "kd.artifacts", digest)


def _finish(client: "MlflowClient", run: "Run", seconds: float) -> None:
    """Close a run that is still open; a closed one keeps its end."""
    if run.info.status != "FINISHED":
        client.set_terminated(run.info.run_id, "FINISHED", end_time=run.info.start_time + int(seconds * 1000))


# ---------------------------------------------------------------------------------------------- registry


def _publish_version(client: "MlflowClient", tracking_uri: str, run_id: str, model: ModelInfo) -> int:
    """Find the version of this source, or make it; bring its tags up to date."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        **model.digests,
        "kd.source": model.source,
        "kd.verdict": "promote" if model.promote else "keep",
        "kd.reasons": "\n".join(model.reasons),
        **({} if model.ledger_number is None else {_LEDGER: str(model.ledger_number)}),
    }
    version = _find_version(client, model.name, model.source)
    if version is None:
        source = _accepted_source(tracking_uri, model.source)
        return int(client.create_model_version(model.name, source, run_id, tags=tags, await_creation_for=0).version)
    for name, value in tags.items():
        if version.tags.get(name) != value:
            client.set_model_version_tag(model.name, version.version, name, value)
    return int(version.version)


def _find_version(client: "MlflowClient", name: str, source: str) -> "ModelVersion | None":
    """The first version with this kd.source, or None. Compared here: MLflow's filter language has no escape for quotes."""
    found = [version for version in _versions(client, name) if version.tags.get("kd.source") == source]
    return min(found, key=lambda version: int(version.version), default=None)


def _versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """All versions of a model; none where it is not registered."""
    token, found = None, []
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def _accepted_source(tracking_uri: str, source: str) -> str:
    """The source as this MLflow accepts it: a server takes no local paths, so there they become kd-file:// addresses."""
    if not _is_server(tracking_uri) or urlsplit(source).scheme not in ("", "file"):
        return source
    return "kd-file://" + quote(Path(source.removeprefix("file://")).resolve().as_posix())


def _point_aliases(client: "MlflowClient", model: ModelInfo, version: int) -> int | None:
    """Move the aliases and read them back; the champion's version, or None where there is no champion."""
    aliases = client.get_registered_model(model.name).aliases
    for alias in (CHALLENGER, CHAMPION) if model.promote else (CHALLENGER,):
        if alias not in aliases or int(aliases[alias]) != version:
            client.set_registered_model_alias(model.name, alias, str(version))
    aliases = client.get_registered_model(model.name).aliases
    champion = int(aliases[CHAMPION]) if CHAMPION in aliases else None
    if model.promote and champion != version:
        raise KDError(f"{model.name}: champion was set to version {version} and reads {champion}: another promotion ran; run again")
    return champion


# ---------------------------------------------------------------------------------------------- MLflow's manners


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the length of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or stderr from MLflow, alembic, git and urllib3's retries: what matters is raised."""
    urllib3 = logging.getLogger("urllib3")
    level = urllib3.level
    with _environment(_SILENT), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

        enabled = MLFLOW_LOGGING_STREAM.enabled
        MLFLOW_LOGGING_STREAM.enabled = False
        urllib3.setLevel(logging.ERROR)
        try:
            yield
        finally:
            urllib3.setLevel(level)
            MLFLOW_LOGGING_STREAM.enabled = enabled


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One publisher at a time on a sqlite file: MLflow's first use of it makes the tables, and two at once break them."""
    database = _sqlite_path(uri)
    if database is None:
        yield
        return
    make_directory(database.parent)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or by a kill
        yield


@contextmanager
def _explained(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or the network raise into a KDError that says what to do."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, CommandError, OSError, ImportError) as error:
        reason = hide_passwords(str(error), tracking_uri)
        if isinstance(error, MlflowException) and error.error_code not in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
            raise KDError(f"MLflow at {redact_url(tracking_uri)} refused: {reason}") from error
        raise KDError(
            f"MLflow at {redact_url(tracking_uri)} cannot be used: {reason}; start it (kd up), "
            "or choose another with --set run.tracking=sqlite:///.kd/mlflow.db, then run again: only the publication is left to do"
        ) from error


def _reach_database(uri: str) -> None:
    """Connect once, so that a wrong path or a dead database fails now: MLflow tries ten times, over 100 s."""
    if _is_server(uri):
        return
    from sqlalchemy import create_engine

    engine = create_engine(uri, connect_args={} if _sqlite_path(uri) is not None else {"connect_timeout": 10})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite:/// URI, absolute; None for any other tracking URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(urlsplit(uri).path.removeprefix("/")).absolute()
