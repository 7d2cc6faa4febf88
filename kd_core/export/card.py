"""The model card: what a reader of the exported directory must know, from the records and nothing else.

It claims no more than was measured: every score has its interval, what is not known is called unknown, and the limits
are derived from the evidence. Text of users (paths, descriptions, model names) stands as code, never as Markdown.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kd_core.evaluate.charts import label_of
from kd_core.evaluate.statistics import metric_of
from kd_core.export.lineage import Lineage
from kd_core.export.parity import Parity
from kd_core.recipe import (
    DatasetSource,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    SourceSuite,
    TrainedClassifier,
    TrainedTeacher,
)
from kd_core.recipe.core_yaml import write_yaml
from kd_core.summaries import CurateSummary, PromptsSummary, TeacherSummary, of

__all__ = ["Card", "recipe_text", "render_card"]

UNKNOWN = "unknown"
_FEW_ITEMS = 100
_HEX = 12


@dataclass(frozen=True)
class Card:
    """What the card is written from.

    Attributes:
        lineage: of the student.
        generation: the generation config's fields that are set.
        has_template: whether the tokenizer has a chat template.
        parity: comparisons of further forms with the float model.
        made_by: package -> version of the export.
        quantize: the form of the weights; None is float.
    """

    lineage: Lineage
    generation: Mapping[str, Any]
    has_template: bool
    parity: tuple[Parity, ...]
    made_by: Mapping[str, str]
    quantize: str | None


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML, without ``run``: what was computed, and not where."""
    return write_yaml(recipe.model_dump(mode="json", exclude={"run"}))


def render_card(card: Card) -> str:
    """README.md of the export: Markdown with the YAML header that model hubs read. Deterministic."""
    lineage, student = card.lineage, card.lineage.student
    shown = {
        "header": _yaml(_header(lineage)).rstrip(),
        "sources": list(_sources(lineage)),
        "teacher": _teacher(lineage),
        "trained": lineage.trained,
        "curated": of(lineage.records["curate"], CurateSummary),
        "gold_counts": of(lineage.records["teacher"], TeacherSummary).counts,
        "overlaps": _overlaps(lineage),
        "limits": list(_limits(card)),
        "generation": {name: value for name, value in card.generation.items() if name not in ("suppress_tokens", "transformers_version")},
        "made": {name: _yaml(student.identity[name]) for name in ("student", "objective", "training")},
    }
    template = _environment().get_template("card.md.jinja")
    return template.render(card=card, lineage=lineage, recipe=lineage.recipe, student=student, report=lineage.report, **shown)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"code": _code, "fence": _fence, "label": label_of}
    environment.globals |= {"metric_of": metric_of, "hex_digits": _HEX}
    return environment


def _code(value: object) -> str:
    """A value as inline code in a line or a table cell: no Markdown, no HTML, no line break of its own.

    >>> _code("a|b `c`")
    '`` a\\\\|b `c` ``'
    """
    text = " ".join(str(value).split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {text} {ticks}" if longest else f"`{text}`"


def _fence(text: str, language: str = "") -> str:
    """A block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=120)


# ---------------------------------------------------------------------------------------------- what it says


def _header(lineage: Lineage) -> dict[str, Any]:
    """Fields that model hubs read. A licence stands here only where the weights come from somebody's licensed weights."""
    recipe = lineage.recipe
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["knowledge-distillation"]}
    if lineage.derived:
        header["license"] = lineage.base_licence or UNKNOWN
    base = recipe.student if isinstance(recipe.student, PretrainedStudent) else recipe.teacher
    if lineage.derived and isinstance(base, PretrainedStudent | PretrainedTeacher) and base.revision is not None:
        header["base_model"] = base.model
    learnt = (*recipe.prompts.sources, *(recipe.teacher.sources if isinstance(recipe.teacher, TrainedTeacher) else ()))
    datasets = sorted({source.id for source in learnt if isinstance(source, DatasetSource)})
    return {**header, "datasets": datasets} if datasets else header


def _pin(source: Mapping[str, Any]) -> str:
    """What exactly was read, from a source's identity."""
    match source["kind"]:
        case "file":
            return ", ".join(f"{file['name']} (sha256 {file['sha256'][:_HEX]})" for file in source["files"])
        case "dataset":
            config = f" {source['config']}" if source["config"] else ""
            return f"{source['id']}{config} {source['split']} at {source['revision'][:_HEX]}"
        case _:
            return f"reasoning-gym {source['version']} {source['task']}, {source['num']:,} rows from seed {source['seed']}"


def _sources(lineage: Lineage) -> Iterator[tuple[str, str]]:
    """(what for, what exactly) of everything that was read."""
    prompts, teacher = lineage.records["prompts"].identity, lineage.records["teacher"].identity
    for source in prompts["sources"]:
        yield "prompts", _pin(source)
    for source in teacher.get("sources", ()):
        yield "the teacher's gold data", _pin(source)
    for benchmark in prompts["benchmarks"]:
        yield f"benchmark {benchmark['name']}, measured only", _pin(benchmark["source"])


def _teacher(lineage: Lineage) -> str:
    """The teacher and its licence, in Markdown."""
    teacher, size = lineage.recipe.teacher, of(lineage.records["teacher"], TeacherSummary).parameters
    counted = f", {size:,} parameters" if size else ""
    licence = f"Licence: {_code(lineage.teacher_licence) if lineage.teacher_licence else UNKNOWN}."
    match teacher:
        case TrainedTeacher():
            return f"A model trained by this recipe from scratch on the gold data above{counted}. Nobody else's licence is on its weights."
        case PretrainedTeacher():
            revision = f" at {_code(teacher.revision)}" if teacher.revision else ""
            return f"{_code(_model_name(teacher.model))}{revision}{counted}, run in {teacher.dtype}. {licence}"
        case TrainedClassifier():
            begun = "from scratch" if teacher.model is None else f"from {_code(_model_name(teacher.model))}"
            return f"A classifier trained by this recipe {begun} on the gold data above{counted}. {licence}"
        case ServerTeacher():
            return f"{_code(teacher.model)}, version {_code(teacher.revision)}, behind a server: only its texts were seen. {licence}"


def _model_name(model: str) -> str:
    """A hub id or package file as it is; of a local directory its name, as the rest is somebody's disk."""
    return model if model.startswith("pkg://") or not Path(model).is_absolute() else Path(model).name


def _overlaps(lineage: Lineage) -> list[tuple[str, int, int]]:
    """(suite, prompts removed from training, of them from the teacher's gold data) of every benchmark with a source of its own."""
    prompts = of(lineage.records["prompts"], PromptsSummary).counts
    teacher = of(lineage.records["teacher"], TeacherSummary).counts
    suites = [suite.name for suite in lineage.recipe.evaluation.suites if isinstance(suite, SourceSuite)]
    return [(name, prompts.get(f"overlap.{name}", 0), teacher.get(f"overlap.{name}", 0)) for name in suites]


def _metric(lineage: Lineage, name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = lineage.report["models"]["student"]["metrics"].get(name)
    return found


def _limits(card: Card) -> Iterator[str]:
    """What the evidence does not show, in whole sentences."""
    lineage, recipe = card.lineage, card.lineage.recipe
    suites = ", ".join(_code(suite.name) for suite in recipe.evaluation.suites)
    yield f"It was measured on {suites} and on nothing else: other tasks, other languages, safety and bias were not examined."
    items = max((found["n"] for found in lineage.report["models"]["student"]["metrics"].values()), default=0)
    if items < _FEW_ITEMS:
        yield f"The suites are small (at most {items} items): read the intervals, not the values."
    if len(recipe.seeds) == 1:
        yield "One training seed: the intervals are over items and do not show how much another seed would differ."
    else:
        yield f"The scores are over {len(recipe.seeds)} training seeds; this is the student of seed {lineage.trained.seed}."
    told_apart = [pair for pair in lineage.report["comparisons"] if pair["low"] <= 0.0 <= pair["high"]]
    if told_apart:
        pairs = ", ".join(f"{pair['metric']} against {label_of(pair['b']).lower()}" for pair in told_apart)
        yield f"Differences that these items do not show, in either direction: {pairs}."
    cut = _metric(lineage, "truncated")
    if cut is not None and cut["value"] > 0.0:
        yield f"{cut['value']:.0%} of its answers met the token limit of the evaluation and were cut."
    sampling = recipe.evaluation.generate
    if sampling is None:
        yield "Answers were never sampled in the evaluation: only its probabilities of given texts were measured."
    elif sampling.temperature > 0.0:
        yield f"Its answers were scored at temperature {sampling.temperature:g}; the generation config here is greedy."
    if card.quantize is not None:
        yield f"The scores are those of the float weights; the {card.quantize} weights were compared with them only as said under Parity."
    if not lineage.report["verdict"]["promote"]:
        yield "The gate refused it: do not put it in service on the strength of this card."
    if lineage.derived and lineage.base_licence is None:
        yield "Its weights come from a model whose licence is not known here; find it out before you use or pass them on."
