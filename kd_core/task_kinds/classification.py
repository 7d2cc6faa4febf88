"""Classes of texts and images: an input in, a probability a class out; a row is the hash of its input and the class.

The input's 256-bit hash stands in a row as eight numbers, and the class is the one supervised position: cache, codec and order of rows
know no difference to a text. Models read the input itself, each through its own processor (``kd_core.teacher.classifiers``).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kd_core.errors import SourceError, TeacherError
from kd_core.evaluate.measure import Measured
from kd_core.evaluate.measure_classes import measure_classes
from kd_core.progress import Tick
from kd_core.prompts import INPUTS_FILE, Inputs, InputsWriter, PromptSet, collect_gold, collect_prompts
from kd_core.prompts.inputs import content_hash
from kd_core.recipe import (
    ClassificationTask,
    NewClassifier,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    SoftLabels,
    TrainedClassifier,
)
from kd_core.softlabels.capture import ScoredRow, Scores
from kd_core.softlabels.targets import Targets, move, position_uniforms, reduce_logits, split
from kd_core.store.scratch import scratch
from kd_core.summaries import ClassifierIdentity, TeacherSummary
from kd_core.task_kinds.protocol import Curation, NewTeacher, TaskModel, Workplace
from kd_core.teacher.classifiers import (
    Classifier,
    InputKind,
    InputReader,
    check_families,
    classifier_identity,
    load_classifier,
    load_processor,
    new_classifier,
    new_image_processor,
    new_tokenizer,
    save_classifier,
)
from kd_core.teacher.models import pick_device
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.class_rows import class_row, input_hash, number_of
from kd_core.train.class_reading import ClassReading

__all__ = ["Classification"]

_SCORED_ITEMS = 256
"""Items of a forward pass in curation."""


class Classification:
    """Texts or images in classes."""

    def collect(self, recipe: Recipe, directory: Path) -> PromptSet:
        """Leave the inputs of all prompts and suites in the directory."""
        with InputsWriter(directory / INPUTS_FILE) as writer:
            found = collect_prompts(recipe, writer.add)
            _keep_texts(recipe, writer, [found.table, *found.suites.values()])
        return found

    def pretrained_teacher(self, work: Workplace) -> tuple[TaskModel, Mapping[str, Any]]:
        """Leave config and processor in model/: later stages read the classes there."""
        teacher = work.recipe.teacher
        assert isinstance(teacher, PretrainedTeacher), "the recipe allows no other pre-trained teacher"
        check_families(work.recipe)
        device = pick_device(work.recipe.run.device)
        loaded = load_classifier(teacher, _input(work.recipe), device=device, inputs=Inputs.none())
        loaded.model.config.save_pretrained(work.directory / "model")
        loaded.processor.save_pretrained(work.directory / "model")
        return loaded, reference_identity(teacher)

    def new_teacher(self, work: Workplace) -> NewTeacher:
        """A classifier with random weights, or a pre-trained one that is tuned, and gold classes."""
        recipe, spec = work.recipe, work.recipe.teacher
        assert isinstance(spec, TrainedClassifier), "the recipe allows no other trained teacher"
        check_families(recipe)
        with scratch() as folder:
            with InputsWriter(folder / INPUTS_FILE) as writer:
                gold, counts = collect_gold(
                    spec.sources or recipe.prompts.sources,
                    task=recipe.task,
                    split=recipe.prompts.split,
                    suites=recipe.evaluation.suites,
                    max_characters=recipe.prompts.max_characters,
                    s3=recipe.run.s3,
                    keep=writer.add,
                )
                _keep_texts(recipe, writer, [gold])
            inputs = Inputs(folder / INPUTS_FILE)
        classes = sorted(set(gold["gold"].to_pylist()))
        if len(classes) < 2:
            raise SourceError(
                f"teacher.sources: all {gold.num_rows} rows are of the class {classes[0]!r}; give rows of two classes at least"
            )
        index = {name: i for i, name in enumerate(classes)}
        hashes = [_hash(recipe, prompt) for prompt in gold["prompt"].to_pylist()]
        rows = [class_row(sha256, index[name]) for sha256, name in zip(hashes, gold["gold"].to_pylist(), strict=True)]
        return NewTeacher(_new_teacher(spec, recipe, inputs, gold["prompt"].to_pylist(), classes), rows, counts)

    def save(self, model: TaskModel, directory: Path) -> None:
        """Weights and processor."""
        save_classifier(_classifier(model), directory)

    def identity(self, model: TaskModel, weights: Mapping[str, Any]) -> ClassifierIdentity:
        """Weights, processor, classes, dtype."""
        return classifier_identity(_classifier(model), weights)

    def load_teacher(self, work: Workplace) -> TaskModel:
        """The teacher, over the inputs of the upstream node 'prompts'."""
        if isinstance(work.recipe.teacher, PretrainedTeacher):
            device = pick_device(work.recipe.run.device)
            return load_classifier(work.recipe.teacher, _input(work.recipe), device=device, inputs=_inputs(work))
        with work.files(work.inputs["teacher"]) as files:
            return self.load(work, files / "model")

    def load(self, work: Workplace, directory: Path) -> TaskModel:
        """A classifier, over the inputs of the upstream node 'prompts'."""
        device = pick_device(work.recipe.run.device)
        return load_classifier(directory, _input(work.recipe), device=device, inputs=_inputs(work))

    def student(self, work: Workplace, seed: int) -> TaskModel:
        """A new classifier with the teacher's classes, or a pre-trained one with a new head for them."""
        spec, kind, classes, inputs = work.recipe.student, _input(work.recipe), _classes(work), _inputs(work)
        if isinstance(spec, PretrainedStudent):
            student = load_classifier(spec, kind, device=torch.device("cpu"), inputs=inputs, classes=classes, seed=seed)
        else:
            assert isinstance(spec, NewClassifier), "the recipe allows no other student of classes"
            with work.files(work.inputs["teacher"]) as files:
                processor = load_processor(files / "model", kind)
            if kind == "image":
                processor = new_image_processor(spec.config, like=processor)
            model = new_classifier(spec.family, spec.config, processor, classes, kind, seed=seed, field="student")
            student = Classifier(model, processor, classes, InputReader(processor, model.config, inputs, kind))
        student.model.float().requires_grad_(True)
        return student

    def curate(self, work: Workplace, answers: pa.Table | None) -> Curation:
        """Rows by their gold class, or by the teacher's where they have none; none of a class that is left out."""
        recipe, classes = work.recipe, _classes(work)
        left_out = set(recipe.curate.leave_out_classes or ())
        if unknown := sorted(left_out - set(classes)):
            raise SourceError(f"curate.leave_out_classes: {', '.join(unknown)}: no class of the teacher; it has {', '.join(classes)}")
        prompts = work.read_table("prompts", "prompts.parquet").sort_by("prompt_id").to_pylist()
        train = [row for row in prompts if row["split"] == "train"]
        said = _teacher_classes(self, work, train) if left_out or any(row["gold"] is None for row in train) else None
        rows: list[dict[str, Any]] = []
        rejected: list[dict[str, str]] = []
        num_gold = 0
        for i, row in enumerate(train):
            guess = None if said is None else classes[said[i]]
            name = guess if row["gold"] is None else row["gold"]
            assert name is not None, "the teacher was asked where a row has no class"
            if {name, guess} & left_out:
                rejected.append({"prompt_id": row["prompt_id"], "reason": "left_out_class"})
            elif row["gold"] is not None and recipe.curate.gold_rows is not None and num_gold >= recipe.curate.gold_rows:
                rejected.append({"prompt_id": row["prompt_id"], "reason": "over_limit"})
            else:
                num_gold += row["gold"] is not None
                rows.append(_curated(recipe, row, name, classes, source="teacher" if row["gold"] is None else "gold"))
        validation = [
            _curated(recipe, row, row["gold"], classes, source="gold")
            for row in prompts
            if row["split"] == "validation" and row["gold"] is not None and row["gold"] not in left_out
        ]
        counts: dict[str, int] = dict(Counter(row["reason"] for row in rejected))
        counts |= {"teacher": len(rows) - num_gold, "gold": num_gold, "validation": len(validation)}
        table = pa.Table.from_pylist(rejected, pa.schema([("prompt_id", pa.string()), ("reason", pa.string())]))
        return Curation(rows, validation, table, counts)

    def score(self, teacher: TaskModel, rows: Sequence[tuple[str, TokenRow]], policy: SoftLabels, *, micro_batch_tokens: int) -> Scores:
        """The teacher's distribution over classes, one position a row."""
        classifier = _classifier(teacher)
        scored: list[ScoredRow] = []
        refused: dict[str, str] = {}
        for part in _parts(rows, classifier.reader.batch_size(micro_batch_tokens)):
            targets, finite_N = _targets(classifier, part, policy)
            for (key, _), one, finite in zip(part, split(targets, [1] * len(part)), finite_N.tolist(), strict=True):
                if finite:
                    scored.append(ScoredRow(key, one))
                else:
                    refused[key] = "the teacher gave NaN or infinite logits"
        return Scores(tuple(scored), refused)

    def reading(self, model: TaskModel) -> ClassReading:
        """Inputs by their hash."""
        return ClassReading(_classifier(model).reader)

    def is_right(self, recipe: Recipe, answer: str, reference: str) -> bool:
        """The same class."""
        return answer == reference

    def measure(
        self, work: Workplace, model: TaskModel, suites: Mapping[str, pa.Table], *, teacher: TaskModel | None, seed: int
    ) -> Measured:
        """Accuracy, loss of the gold class, distance to the teacher, and recall of classes that were left out."""
        return measure_classes(
            _classifier(model),
            suites,
            teacher=None if teacher is None else _classifier(teacher),
            hash_of=lambda prompt: bytes.fromhex(_hash(work.recipe, prompt)),
            unseen=work.recipe.curate.leave_out_classes or (),
            seed=seed,
            tick=work.tick,
        )


def _classifier(model: TaskModel) -> Classifier:
    return cast(Classifier, model)


def _input(recipe: Recipe) -> InputKind:
    assert isinstance(recipe.task, ClassificationTask), "another kind of task has another file"
    return recipe.task.input


def _inputs(work: Workplace) -> Inputs:
    with work.files(work.inputs["prompts"]) as files:
        return Inputs(files / INPUTS_FILE)


def _keep_texts(recipe: Recipe, writer: InputsWriter, tables: Sequence[pa.Table]) -> None:
    """Keep the prompts of tables where these are the inputs; images were kept as they were read."""
    for table in tables if _input(recipe) == "text" else ():
        for text in table["prompt"].to_pylist():
            writer.add(text.encode())


def _hash(recipe: Recipe, prompt: str) -> str:
    """Hash of the input behind a prompt: an image's prompt is its hash."""
    return prompt if _input(recipe) == "image" else content_hash(prompt.encode())


def _classes(work: Workplace) -> tuple[str, ...]:
    teacher = work.summary("teacher", TeacherSummary).teacher
    assert isinstance(teacher, ClassifierIdentity), "the recipe allows no other teacher"
    return teacher.classes


def _new_teacher(spec: TrainedClassifier, recipe: Recipe, inputs: Inputs, prompts: Sequence[str], classes: Sequence[str]) -> Classifier:
    kind, seed = _input(recipe), recipe.seeds[0]
    if spec.reference is not None:
        tuned = load_classifier(spec.reference, kind, device=torch.device("cpu"), inputs=inputs, classes=classes, seed=seed)
        tuned.model.float().requires_grad_(True)
        return tuned
    if kind == "image":
        processor = new_image_processor(spec.config, first=inputs.read(bytes.fromhex(prompts[0])))
    else:
        longest = spec.config.get("max_position_embeddings", 512)
        processor = new_tokenizer(prompts, spec.word_pieces, longest=longest if isinstance(longest, int) else 512)
    assert spec.family is not None, "a teacher without a reference has a family"
    model = new_classifier(spec.family, spec.config, processor, classes, kind, seed=seed, field="teacher")
    return Classifier(model, processor, tuple(classes), InputReader(processor, model.config, inputs, kind))


# ---------------------------------------------------------------------------------------------- rows


def _curated(recipe: Recipe, row: Mapping[str, Any], name: str, classes: Sequence[str], *, source: str) -> dict[str, Any]:
    if name not in classes:
        raise SourceError(
            f"prompt {row['prompt_id']} of {row['source']} has the class {name!r}, and the teacher knows {len(classes)} others: "
            f"{', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}; correct the gold template, or train the teacher on it too"
        )
    numbers = class_row(_hash(recipe, row["prompt"]), list(classes).index(name))
    ids = {"ids": list(numbers.ids), "first_supervised": numbers.first_supervised}
    return {"prompt_id": row["prompt_id"], "source": source, "sample_index": 0, "finish_reason": "stop", "text": name, **ids}


def _parts(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.inference_mode()
def _teacher_classes(kind: Classification, work: Workplace, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The teacher's likeliest class of each row."""
    teacher = _classifier(kind.load_teacher(work))
    found: list[int] = []
    for part in _parts([bytes.fromhex(_hash(work.recipe, row["prompt"])) for row in rows], _SCORED_ITEMS):
        logits_NV = teacher.logits(part)
        if not bool(torch.isfinite(logits_NV).all()):
            raise TeacherError("the teacher gave NaN or infinite logits for a training row, so its class is not known; run it in float32")
        found += logits_NV.argmax(-1).tolist()
        work.tick(Tick(len(found), len(rows), "rows", "the teacher's classes"))
    return found


@torch.inference_mode()
def _targets(classifier: Classifier, rows: Sequence[tuple[str, TokenRow]], policy: SoftLabels) -> tuple[Targets, Tensor]:
    logits_NV = classifier.logits([input_hash(row) for _, row in rows])
    labels_N = torch.tensor([number_of(row) for _, row in rows], device=logits_NV.device)
    uniform_N = torch.from_numpy(np.concatenate([position_uniforms(key, 1) for key, _ in rows]))
    targets, finite_N = reduce_logits(logits_NV, labels_N, policy, uniform_N=uniform_N)
    return move(targets, torch.device("cpu")), finite_N.cpu()
