"""The whole recipe: its parts, the compared models, and which combinations are meaningless."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kd_core.errors import RecipeError
from kd_core.recipe.defaults import fill_in
from kd_core.recipe.evaluation import BetterThan, Ceiling, Evaluation, Floor, Gate, HeldOutSuite
from kd_core.recipe.fields import Frozen, Slug, filled
from kd_core.recipe.models import (
    NewClassifier,
    PretrainedStudent,
    PretrainedTeacher,
    ServerTeacher,
    Student,
    StudentFromConfig,
    StudentFromTeacher,
    Teacher,
    TrainedClassifier,
    TrainedTeacher,
)
from kd_core.recipe.objective import ForwardKL, HiddenStateFeatures, Objective, Ramp, RelationFeatures, schedule_values
from kd_core.recipe.prompts import AnyTask, ClassificationTask, FolderSource, Prompts, ScikitLearnSource, Task
from kd_core.recipe.run import Run
from kd_core.recipe.teaching import Answers, Curate, Dense, HiddenStates, Sampled, SoftLabels, TopK
from kd_core.recipe.training import StudentTraining

__all__ = ["ARMS", "Arm", "Recipe"]


Arm = Literal["student", "baseline", "ablation_hard"]


ARMS: tuple[Arm, ...] = ("student", "baseline", "ablation_hard")


class Recipe(Frozen):
    """A recipe goes in, a promoted student with its evidence comes out."""

    name: Slug
    """Name of the recipe; part of no fingerprint but the publication's."""
    description: str = ""
    """For readers. Its first sentence that ends in a question mark is what the report says was asked."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(min_length=1, json_schema_extra=filled("[0, 1, 2]"))
    """One student (and one of each compared model) is trained a seed; the first also seeds the teacher and its answers."""
    task: AnyTask = Field(json_schema_extra=filled("template: plain beside a trained teacher, else chat"))
    """What the student shall do: generated text with template, answer form and verifier, or classes."""
    prompts: Prompts
    """Prompts for the teacher."""
    teacher: Teacher
    """Who teaches."""
    answers: Answers | None = Field(json_schema_extra=filled("one a prompt, of a server teacher four, at temperature 0.7"))
    """How the teacher answers; None (written out): no teacher answers, the student learns from gold rows (with soft labels on them)."""
    curate: Curate = Field(
        default=Curate(), json_schema_extra=filled("verified answers and all gold; all answers where nothing says what a final answer is")
    )
    """Which rows are kept."""
    soft_labels: SoftLabels | None = Field(
        json_schema_extra=filled(
            "dense for an alphabet of at most 256 characters, else 25 draws; none of a server teacher or beside supervision: hard"
        )
    )
    """How the teacher's distribution is stored; None: sequence-level distillation."""
    hidden_states: HiddenStates | None = None
    """Teacher's hidden states to keep beside the soft labels; None keeps none."""
    student: Student
    """Who learns."""
    objective: Objective = Field(
        json_schema_extra=filled("soft labels with weight 0.9 and hard ones with 0.1; without soft labels hard ones alone")
    )
    """What is minimised."""
    training: StudentTraining = Field(json_schema_extra=filled("by the kind and width of the student"))
    """How the student is trained."""
    evaluation: Evaluation = Field(json_schema_extra=filled("the held-out prompts, against the teacher and gold alone"))
    """What is measured."""
    gate: Gate = Field(
        json_schema_extra=filled(
            "better than gold alone, not worse than the champion by more than 0.02, no larger than the teacher, where these are there"
        )
    )
    """When the student is promoted."""
    publish: Slug = Field(json_schema_extra=filled("the recipe's name"))
    """Registered model name; its alias 'champion' moves when the gate says so."""
    run: Run = Run()
    """Where and how fast; no part of identity."""

    @model_validator(mode="before")
    @classmethod
    def _is_whole(cls, data: Any) -> Any:
        return fill_in(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problem = next(_unsupported(self), None)
        if problem:
            raise ValueError(problem)
        return self

    def arm(self, arm: Arm) -> "Recipe":
        """The recipe of a compared model: this recipe with one changed field, ``objective.supervision``."""
        if arm == "student":
            return self
        supervision: Literal["hard", "gold"] = "hard" if arm == "ablation_hard" else "gold"
        objective = self.objective.model_copy(update={"supervision": supervision})
        return self.model_copy(update={"objective": objective})

    def arms(self) -> tuple[Arm, ...]:
        """The student and the compared models that are trained, in a fixed order."""
        return tuple(arm for arm in ARMS if arm == "student" or arm in self.evaluation.compare)

    @property
    def text_task(self) -> Task:
        """The task of a recipe whose student writes text.

        Raises:
            RecipeError: it is of another kind.
        """
        if not isinstance(self.task, Task):
            raise RecipeError(f"task.kind: {self.task.kind} has no use for this yet: it is for recipes whose student writes text")
        return self.task

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics that this recipe measures."""
        names = {"nll"}
        if isinstance(self.task, ClassificationTask):
            names |= {"accuracy"} if self.curate.leave_out_classes is None else {"accuracy", "unseen_recall"}
        elif self.evaluation.generate is not None:
            names |= {"pass_at_1"}
        return frozenset(names if isinstance(self.teacher, ServerTeacher) else names | {"kl", "agreement"})

    @property
    def trusts_code(self) -> bool:
        """Whether code of the teacher's repository may run: its model's, and its tokenizer's, which students inherit."""
        return isinstance(self.teacher, PretrainedTeacher) and self.teacher.trust_remote_code


def _unsupported(recipe: Recipe) -> Iterator[str]:
    """Every combination that would be meaningless or silently wrong, as 'path: what is wrong; what is allowed'."""
    yield from _unsupported_kinds(recipe)
    yield from _unsupported_targets(recipe)
    yield from _unsupported_features(recipe)
    yield from _unsupported_states(recipe)
    yield from _unsupported_validations(recipe)
    if (processes := recipe.run.num_processes) > (rows := recipe.training.batch_rows):
        yield f"run.num_processes: {processes}, and a step has training.batch_rows: {rows} to share out; use at most so many"
    if len(set(recipe.seeds)) != len(recipe.seeds):
        yield "seeds: a seed stands twice; each may stand once"
    if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, StudentFromTeacher):
        yield "student.kind: from_teacher needs the teacher's weights, and a server teacher has none here; use pretrained or config"
    if isinstance(recipe.teacher, ServerTeacher) and recipe.hidden_states is not None:
        yield "hidden_states: a server teacher has none to give; leave them out"
    if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, StudentFromConfig):
        yield "student.kind: config takes the teacher's tokenizer, and a server teacher has none here; use pretrained"
    if recipe.answers is None and recipe.curate.gold_rows == 0:
        yield "curate.gold_rows: 0 with answers: null leaves no rows to learn from; allow gold rows or ask for answers"
    if recipe.student.vocabulary is not None and isinstance(recipe.teacher, TrainedTeacher):
        yield (
            "student.vocabulary: a tokenizer of single characters has no token that others could spell; leave it out, and give "
            "teacher.tokenizer.alphabet what the texts use"
        )
    if "ablation_hard" in recipe.evaluation.compare and recipe.objective.supervision != "soft":
        yield "evaluation.compare: ablation_hard compares with objective.supervision: soft, and this recipe has none"
    if "baseline" in recipe.evaluation.compare and recipe.curate.gold_rows == 0:
        yield "evaluation.compare: baseline learns from gold rows, and curate.gold_rows is 0; allow gold rows or leave baseline out"
    if "teacher" in recipe.evaluation.compare and isinstance(recipe.teacher, ServerTeacher):
        yield "evaluation.compare: teacher cannot be measured here, as a server teacher has no weights here; leave it out"
    names = [suite.name for suite in recipe.evaluation.suites]
    if len(set(names)) != len(names):
        yield f"evaluation.suites: names must differ, found {names}"
    held_out = any(isinstance(suite, HeldOutSuite) for suite in recipe.evaluation.suites)
    if held_out and recipe.prompts.split.test == 0.0:
        yield "prompts.split.test: 0 leaves nothing for the held_out suite; use a share above 0, for example 0.1"
    if len(recipe.seeds) > 1 and recipe.prompts.split.validation == 0.0:
        yield "prompts.split.validation: 0 leaves nothing to choose the published seed by; use a share above 0, for example 0.05"
    yield from _unsupported_rules(recipe)


def _unsupported_kinds(recipe: Recipe) -> Iterator[str]:
    """Parts of a recipe that its kind of task has no use for, or lacks."""
    sources = enumerate(recipe.prompts.sources)
    images = [f"prompts.sources.{i}" for i, source in sources if isinstance(source, FolderSource | ScikitLearnSource)]
    if not isinstance(recipe.task, ClassificationTask):
        if images:
            yield f"{images[0]}: images need task.kind: classification with input: image"
        if isinstance(recipe.teacher, TrainedClassifier) or isinstance(recipe.student, NewClassifier):
            yield "task.kind: generation, and a classifier writes no text; use task: {kind: classification, input: text} (or image)"
        if recipe.curate.leave_out_classes is not None:
            yield "curate.leave_out_classes: generated text has no classes; leave it out, or use task.kind: classification"
        return
    if images and recipe.task.input == "text":
        yield f"{images[0]}: holds images, and task.input is text; use input: image"
    if not isinstance(recipe.teacher, TrainedClassifier | PretrainedTeacher):
        yield f"teacher.kind: {recipe.teacher.kind} is no classifier; use trained_classifier or pretrained"
    if not isinstance(recipe.student, NewClassifier | PretrainedStudent) or recipe.student.adapter or recipe.student.vocabulary:
        yield "student: a classifier is new_classifier, or pretrained without adapter and vocabulary"
    unused = {
        "answers": recipe.answers,
        "hidden_states": recipe.hidden_states,
        "objective.features": recipe.objective.features,
        "evaluation.generate": recipe.evaluation.generate,
    }
    for name, value in unused.items():
        if value is not None:
            yield f"{name}: task.kind: classification has no use for it; set it to null"
    if recipe.run.num_processes > 1:
        yield "run.num_processes: a classifier is trained by one process; use 1, and run.parallel for seeds side by side"


def _unsupported_rules(recipe: Recipe) -> Iterator[str]:
    metrics = set(recipe.metrics)
    suites = [suite.name for suite in recipe.evaluation.suites]
    for i, rule in enumerate(recipe.gate.rules):
        where = f"gate.rules[{i}]"
        if rule.suite is not None and rule.suite not in suites:
            yield f"{where}.suite: {rule.suite} is not in evaluation.suites; found {suites}"
        if isinstance(rule, Ceiling):
            if rule.metric != "truncated" and rule.suite is not None:
                yield f"{where}.suite: {rule.metric} is the same on every suite; leave it out"
            if rule.metric == "truncated" and recipe.evaluation.generate is None:
                yield f"{where}.metric: truncated needs answers, and evaluation.generate is null; set it, or leave the rule out"
            continue
        allowed = metrics - {"nll", "kl"} if isinstance(rule, Floor) else metrics  # less is better there
        if rule.metric not in allowed:
            yield f"{where}.metric: {rule.metric} is not measured by this recipe or not for this rule; allowed: {_listed(allowed)}"
        if isinstance(rule, BetterThan):
            if rule.than not in recipe.evaluation.compare:
                yield f"{where}.than: {rule.than} is not in evaluation.compare {list(recipe.evaluation.compare)}"
            if rule.than != "teacher" and len(recipe.seeds) == 1:
                yield (
                    f"{where}: better_than {rule.than} compares two recipes, and one seed says nothing of either; give at least 2 seeds, "
                    "or leave the rule out"
                )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _unsupported_validations(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe.teacher, TrainedTeacher) and recipe.teacher.training.validate_every_steps is not None:
        yield "teacher.training.validate_every_steps: a trained teacher has no validation rows; leave it out"
    if recipe.training.validate_every_steps is not None and recipe.prompts.split.validation == 0.0:
        yield "prompts.split.validation: 0 leaves nothing for training.validate_every_steps; use a share above 0, for example 0.05"


def _unsupported_targets(recipe: Recipe) -> Iterator[str]:
    labels, objective = recipe.soft_labels, recipe.objective
    if objective.supervision != "soft":
        return
    if isinstance(recipe.teacher, ServerTeacher):
        yield "objective.supervision: soft needs a teacher that can score text, and a server teacher only speaks it; use hard"
    if labels is None:
        yield "soft_labels: objective.supervision: soft needs them; choose sampled, topk or dense, or set supervision: hard"
        return
    if isinstance(labels, TopK) and recipe.student.vocabulary is not None:
        yield (
            "soft_labels.kind: topk keeps its tail as one number, and how much of it lies on the tokens of student.vocabulary is not "
            "known; use sampled or dense"
        )
    if schedule_values(objective.soft_weight) == (0.0,):
        yield "objective.soft_weight: 0 under supervision: soft trains on hard labels alone; give it a weight, or set supervision: hard"
    temperature = objective.temperature
    used = schedule_values(temperature)
    reached = (temperature.start, temperature.end) if isinstance(temperature, Ramp) else used or ()
    if min(reached) <= 0.0:
        yield "objective.temperature: must be above 0 at every step"
    if isinstance(labels, Sampled) and not isinstance(objective.divergence, ForwardKL):
        yield (
            f"objective.divergence: {objective.divergence.kind} is not linear in the teacher's probabilities, so draws of them would make "
            "it biased; use forward_kl with soft_labels.kind: sampled, or keep topk or dense soft labels"
        )
    allowed: tuple[float, ...] | None
    match labels:
        case Sampled():
            allowed = (labels.temperature,)
        case TopK():
            allowed = labels.temperatures
        case Dense():
            allowed = None
    if allowed is not None and (used is None or not set(used) <= set(allowed)):
        found = "a ramp" if used is None else "/".join(f"{t:g}" for t in used)
        stored = ", ".join(f"{t:g}" for t in allowed)
        yield f"objective.temperature: {found} is not among the temperatures stored by soft_labels.{labels.kind}: {stored}"


def _unsupported_features(recipe: Recipe) -> Iterator[str]:
    features = recipe.objective.features
    if features is None:
        return
    where = "objective.features"
    if recipe.objective.supervision != "soft":
        yield f"{where}: supervision: {recipe.objective.supervision} is cross-entropy alone; set supervision: soft, or leave features out"
    if schedule_values(features.weight) == (0.0,):
        yield f"{where}.weight: 0 at every step teaches nothing; give it a weight, or leave features out"
    if recipe.run.compile:
        yield f"run.compile: {where} reads inside the student's blocks, which compiled code does not show; set it to false"
    if isinstance(features, HiddenStateFeatures) and features.source == "cached":
        if recipe.hidden_states is None:
            yield f"{where}.source: cached reads what hidden_states keeps, and there is none; add hidden_states, or set source: live"
        elif missing := sorted({pair.teacher for pair in features.blocks or ()} - set(recipe.hidden_states.blocks)):
            kept = list(recipe.hidden_states.blocks)
            yield f"{where}.blocks: the teacher's blocks {missing} are not among hidden_states.blocks {kept}; add them there"
    sizes = {
        "student": recipe.student.architecture.num_layers if isinstance(recipe.student, StudentFromConfig) else None,
        "teacher": recipe.teacher.architecture.num_layers if isinstance(recipe.teacher, TrainedTeacher) else None,
    }
    for side, num_blocks in sizes.items():
        highest = max((getattr(pair, side) for pair in features.blocks or ()), default=0)
        if num_blocks is not None and highest >= num_blocks:
            yield f"{where}.blocks: the {side} has no block {highest}; its blocks are 0 to {num_blocks - 1}"
    if isinstance(features, RelationFeatures):
        yield from _uneven_relations(recipe, features)


def _uneven_relations(recipe: Recipe, features: RelationFeatures) -> Iterator[str]:
    models = {"student": recipe.student, "teacher": recipe.teacher}
    for side, model in models.items():
        if not isinstance(model, StudentFromConfig | TrainedTeacher):
            continue
        for kind in features.between:
            columns = model.architecture.projected_columns(kind)
            if columns % features.num_heads:
                yield (
                    f"objective.features.num_heads: {features.num_heads} relation heads do not divide the {columns} columns of the "
                    f"{side}'s {kind}; use a common divisor"
                )


def _unsupported_states(recipe: Recipe) -> Iterator[str]:
    wanted = recipe.hidden_states
    if wanted is None or not isinstance(recipe.teacher, TrainedTeacher):
        return
    teacher = recipe.teacher.architecture
    if wanted.blocks[-1] >= teacher.num_layers:
        yield f"hidden_states.blocks: the teacher has no block {wanted.blocks[-1]}; its blocks are 0 to {teacher.num_layers - 1}"
    if wanted.width is not None and wanted.width > teacher.hidden_size:
        yield f"hidden_states.width: {wanted.width}, and the teacher's states have {teacher.hidden_size} columns; use at most those"
