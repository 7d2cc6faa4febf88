"""A finished run as the registry is told of it, and what MLflow can hold of it.

MLflow refuses names over 250 characters or with other signs, cuts values over 6,000 without a mark, and stores an infinity as
1.8e308. ``fitted`` puts in their place what it takes, and says so: shortened names and values end with a checksum, whole ones
are in ``LONG_VALUES``, and numbers that are none are left out and named by the tag kd.not_finite.
"""

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kd_core.fingerprint import sha256_bytes

__all__ = ["LONG_VALUES", "DatasetInfo", "ModelInfo", "Publication", "StageRun", "fitted"]

LONG_VALUES = "long_values.json"
"""File of the run's artifacts: each name and value that is not in MLflow as it is, whole."""
_NAME_CHARACTERS, _PARAMETER_CHARACTERS, _TAG_CHARACTERS = 250, 6000, 5000
_NAMED_POINTS = 20


@dataclass(frozen=True)
class StageRun:
    """One stage: a nested run.

    Attributes:
        name: of the stage, shown as the run's name.
        step_key: its fingerprint; one nested run a key under one parent.
        parameters: name -> value.
        metrics: name -> final value, logged at step 0. No name may also be in ``series``.
        series: name -> (step, value) pairs with rising steps.
        seconds: how long it took.
        status: how the result came about, for example computed or reused; the tag kd.status.
    """

    name: str
    step_key: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[tuple[int, float]]]
    seconds: float
    status: str


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that the run used: name, digest (at most 36 characters), address, rows, and context (training ...)."""

    name: str
    digest: str
    source: str
    rows: int
    context: str


@dataclass(frozen=True)
class ModelInfo:
    """The student as a model version.

    Attributes:
        name: registered model name.
        source: address of the payload in the store: s3://... or an absolute path.
        digests: tags that name the bytes.
        promote: whether the alias champion moves to this version.
        ledger_number: of the ledger's entry that made these bytes champion; None where none did.
        reasons: lines of the verdict.
        metrics: headline metrics, logged to the parent run, which the version links to.
    """

    name: str
    source: str
    digests: Mapping[str, str]
    promote: bool
    reasons: Sequence[str]
    metrics: Mapping[str, float]
    ledger_number: int | None = None


@dataclass(frozen=True)
class Publication:
    """All that MLflow is told about one finished run.

    Attributes:
        name: experiment and name of the parent run (the recipe's name).
        run_key: fingerprint; one parent run a key.
        parameters: name -> value; what a fingerprint stands for, flat.
        tags: name -> value; may change between calls.
        stages: nested runs, in the order in which they ran.
        datasets: inputs of the parent run.
        artifacts: file name -> content, for example report.html.
        model: the version to register.
    """

    name: str
    run_key: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    stages: tuple[StageRun, ...]
    datasets: tuple[DatasetInfo, ...]
    artifacts: Mapping[str, bytes | str]
    model: ModelInfo


def fitted(publication: Publication) -> Publication:
    """The same publication, with what MLflow would refuse or change replaced by what it takes, and said."""
    whole: dict[str, str] = {}

    def named(values: Mapping[str, str], limit: int, where: str) -> dict[str, str]:
        found = {}
        for name, value in values.items():
            short, held = _name(name), _value(value, limit)
            if (short, held) != (name, value):
                whole[f"{where}{name}"] = value
            found[short] = held
        return found

    def numbers(values: Mapping[str, float]) -> dict[str, float]:
        return {_name(name): value for name, value in values.items() if math.isfinite(value)}

    def series(points: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
        kept = {_name(name): [(step, value) for step, value in line if math.isfinite(value)] for name, line in points.items()}
        return {name: line for name, line in kept.items() if line}

    stages = tuple(
        replace(
            stage,
            parameters=named(stage.parameters, _PARAMETER_CHARACTERS, f"{stage.name}: "),
            metrics=numbers(stage.metrics),
            series=series(stage.series),
        )
        for stage in publication.stages
    )
    lost = list(_not_finite(publication))
    tags = {**publication.tags, **({"kd.not_finite": "; ".join(lost)} if lost else {})}
    model = publication.model
    reasons = "\n".join(model.reasons)
    held = named({"kd.reasons": reasons}, _TAG_CHARACTERS, "")["kd.reasons"]
    model = replace(model, digests=named(model.digests, _TAG_CHARACTERS, ""), reasons=[held], metrics=numbers(model.metrics))
    parameters, tags = named(publication.parameters, _PARAMETER_CHARACTERS, ""), named(tags, _TAG_CHARACTERS, "")
    artifacts = {**publication.artifacts, **({LONG_VALUES: json.dumps(whole, indent=1, ensure_ascii=False)} if whole else {})}
    return replace(publication, parameters=parameters, tags=tags, stages=stages, artifacts=artifacts, model=model)


def _name(name: str) -> str:
    """The name, or one that MLflow takes and that still differs from all others: cut, its other signs as '_', with its checksum."""
    plain = re.fullmatch(r"[/\w.\- :]+", name) and posixpath.normpath(name) == name and not name.startswith((".", "/"))
    if plain and len(name) <= _NAME_CHARACTERS:
        return name
    signs = re.sub(r"[^\w.\- ]", "_", name)[: _NAME_CHARACTERS - 20].strip(". ")
    return f"{signs}_{sha256_bytes(name.encode())[:8]}"


def _value(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    mark = f" ... [cut: {len(value):,} characters, sha256 {sha256_bytes(value.encode())[:16]}; whole in {LONG_VALUES}]"
    return value[: limit - len(mark)] + mark


def _not_finite(publication: Publication) -> Iterable[str]:
    """One phrase a metric with points that are no numbers: what, where, which."""
    yield from (f"{name} is {value}" for name, value in publication.model.metrics.items() if not math.isfinite(value))
    for stage in publication.stages:
        yield from (f"{stage.name}: {name} is {value}" for name, value in stage.metrics.items() if not math.isfinite(value))
        for name, line in stage.series.items():
            bad = [f"{value} at step {step}" for step, value in line if not math.isfinite(value)]
            if bad:
                more = f" and {len(bad) - _NAMED_POINTS} more" if len(bad) > _NAMED_POINTS else ""
                yield f"{stage.name}: {name} is {', '.join(bad[:_NAMED_POINTS])}{more}"
