"""Classes of texts and images: an input in, a probability a class out; a row is the hash of its input and the class.

The input's 256-bit hash stands in a row as eight numbers, and the class is the one supervised position: cache, codec and order of rows
know no difference to a text. Models read the input itself, each through its own processor (``kd_core.teacher.classifiers``).
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import SourceError, TeacherError
from kd_core.evaluate.measure import Measured
from kd_core.evaluate.statistics import SCORE_SCHEMA
from kd_core.progress import Tick
from kd_core.prompts import INPUTS_FILE, Inputs, InputsWriter, PromptSet, collect_gold, collect_prompts
from kd_core.prompts.inputs import HASH_WORDS, content_hash, hash_words, words_hash
from kd_core.recipe import (
    ClassificationTask,
    NewClassifier,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    Run,
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
from kd_core.tokens.batches import TokenRow, sent
from kd_core.train.batches import MicroBatch
from kd_core.train.objective_model import ObjectiveModel
from kd_core.train.speed import Flops

__all__ = ["Classification"]

_SCORED_ITEMS = 256
"""Items of a forward pass in curation and evaluation."""
_SHOWN_CLASSES = 5
"""Likeliest classes of an item that are kept for the report."""


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
        device = pick_device(work.recipe.run.device)
        loaded = load_classifier(teacher, _input(work.recipe), device=device, inputs=Inputs.none())
        loaded.model.config.save_pretrained(work.directory / "model")
        loaded.processor.save_pretrained(work.directory / "model")
        return loaded, reference_identity(teacher)

    def new_teacher(self, work: Workplace) -> NewTeacher:
        """A classifier with random weights, or a pre-trained one that is tuned, and gold classes."""
        recipe, spec = work.recipe, work.recipe.teacher
        assert isinstance(spec, TrainedClassifier), "the recipe allows no other trained teacher"
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
        rows = [_class_row(sha256, index[name]) for sha256, name in zip(hashes, gold["gold"].to_pylist(), strict=True)]
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
            model = new_classifier(spec.family, spec.config, processor, classes, kind, seed=seed)
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
        for part in _parts(rows, max(1, micro_batch_tokens // classifier.reader.cost)):
            targets, finite_N = _targets(classifier, part, policy)
            for (key, _), one, finite in zip(part, split(targets, [1] * len(part)), finite_N.tolist(), strict=True):
                if finite:
                    scored.append(ScoredRow(key, one))
                else:
                    refused[key] = "the teacher gave NaN or infinite logits"
        return Scores(tuple(scored), refused)

    def reading(self, model: TaskModel) -> "_ClassReading":
        """Inputs by their hash."""
        return _ClassReading(_classifier(model).reader)

    def is_right(self, recipe: Recipe, answer: str, reference: str) -> bool:
        """The same class."""
        return answer == reference

    def measure(
        self, work: Workplace, model: TaskModel, suites: Mapping[str, pa.Table], *, teacher: TaskModel | None, seed: int
    ) -> Measured:
        """Accuracy, loss of the gold class, distance to the teacher, and recall of classes that were left out."""
        return _Measurement(work, _classifier(model), None if teacher is None else _classifier(teacher), seed).run(suites)


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
    model = new_classifier(spec.family, spec.config, processor, classes, kind, seed=seed)
    return Classifier(model, processor, tuple(classes), InputReader(processor, model.config, inputs, kind))


# ---------------------------------------------------------------------------------------------- rows


def _class_row(sha256: str, number: int) -> TokenRow:
    return TokenRow((*hash_words(sha256), number), HASH_WORDS)


def _hash_of(row: TokenRow) -> bytes:
    return words_hash(row.ids[:HASH_WORDS])


def _curated(recipe: Recipe, row: Mapping[str, Any], name: str, classes: Sequence[str], *, source: str) -> dict[str, Any]:
    if name not in classes:
        raise SourceError(
            f"prompt {row['prompt_id']} of {row['source']} has the class {name!r}, and the teacher knows {len(classes)} others: "
            f"{', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}; correct the gold template, or train the teacher on it too"
        )
    numbers = _class_row(_hash(recipe, row["prompt"]), list(classes).index(name))
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
    logits_NV = classifier.logits([_hash_of(row) for _, row in rows])
    labels_N = torch.tensor([row.ids[HASH_WORDS] for _, row in rows], device=logits_NV.device)
    uniform_N = torch.from_numpy(np.concatenate([position_uniforms(key, 1) for key, _ in rows]))
    targets, finite_N = reduce_logits(logits_NV, labels_N, policy, uniform_N=uniform_N)
    return move(targets, torch.device("cpu")), finite_N.cpu()


# ---------------------------------------------------------------------------------------------- training


class _ClassObjective(ObjectiveModel):
    """A classifier with the loss on top: its logits are the model's own, so there is nothing to compare them with."""

    def hidden(self, batch: MicroBatch, *, bf16: bool = False) -> Tensor:
        """The logits of a batch, float32, shape (N, V)."""
        with torch.autocast(batch.labels_N.device.type, torch.bfloat16, enabled=bf16):
            logits_NV: Tensor = self.model(**batch.inputs).logits
        return logits_NV.float()

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The same."""
        return hidden_NH

    def check(self, rows: list[TokenRow], layout: Any) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _ClassLayout:
    """Inputs as a batch: each is read by its hash, and a batch is as many as fit the budget."""

    reader: InputReader
    budget_tokens: int
    device: torch.device
    packed: bool = False

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """So many that the budget holds them, were each as long as the longest."""
        return [list(part) for part in _parts(range(len(lengths)), max(1, self.budget_tokens // self.reader.cost))]

    def batch(self, rows: Sequence[TokenRow], targets: Targets | None = None, *, share: float = 1.0) -> MicroBatch:
        """Rows, in this order, as one batch."""
        inputs = {name: sent(value, self.device) for name, value in self.reader.batch([_hash_of(row) for row in rows]).items()}
        labels_N = torch.tensor([int(row.ids[HASH_WORDS]) for row in rows])
        at_N = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
        found = None if targets is None else move(targets, self.device)
        rows_N, positions_N = (sent(at, self.device) for at in at_N)
        num_tokens = len(rows) * self.reader.cost if "input_ids" not in inputs else inputs["input_ids"].numel()
        return MicroBatch(inputs, (rows_N, positions_N), sent(labels_N, self.device), num_tokens, found, share)


@dataclass(frozen=True)
class _ClassReading:
    """Reading of inputs by a classifier."""

    reader: InputReader
    objective_model: type[ObjectiveModel] = _ClassObjective

    def layout(self, model: PreTrainedModel, run: Run, device: torch.device, *, packable: bool) -> _ClassLayout:
        """Never packed: one position a row."""
        return _ClassLayout(self.reader, run.micro_batch_tokens, device)

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """The whole model."""
        whole: nn.Module = model
        return whole

    def flops(self, model: PreTrainedModel, num_columns: int) -> Flops | None:
        """Not known: families differ too much."""
        return None


# ---------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class _Measurement:
    """One model on the suites of a recipe."""

    work: Workplace
    model: Classifier
    teacher: Classifier | None
    seed: int

    def run(self, suites: Mapping[str, pa.Table]) -> Measured:
        """Measure it on all of them."""
        rows: list[dict[str, Any]] = []
        guesses: list[dict[str, Any]] = []
        total, seconds = sum(table.num_rows for table in suites.values()), 0.0
        for suite, table in suites.items():
            for part in _parts(table.to_pylist(), _SCORED_ITEMS):
                hashes = [bytes.fromhex(_hash(self.work.recipe, item["prompt"])) for item in part]
                self.model.reader.batch(hashes)  # read and prepared before the clock runs: that is no work of the model
                began = time.perf_counter()
                log_q_NV = self._log_probabilities(self.model, hashes)
                seconds += time.perf_counter() - began
                for item, (scores, guess) in zip(part, self._score(part, hashes, log_q_NV), strict=True):
                    where = {"suite": suite, "item_id": item["prompt_id"], "seed": self.seed}
                    rows.append({**dict.fromkeys(SCORE_SCHEMA.names), **where, **scores})
                    guesses.append({**where, **guess})
                self.work.tick(Tick(len(rows), total, "items"))
        return Measured(
            scores=pa.Table.from_pylist(rows, schema=SCORE_SCHEMA),
            tokens_per_second=total / max(seconds, 1e-9),
            undecided_samples=0,
            items_beyond_positions=len(self.model.reader.cut),
            guesses=pa.Table.from_pylist(guesses),
        )

    @staticmethod
    @torch.inference_mode()
    def _log_probabilities(model: Classifier, hashes: Sequence[bytes]) -> Tensor:
        return model.logits(hashes).log_softmax(-1).cpu()

    def _score(
        self, items: Sequence[Mapping[str, Any]], hashes: Sequence[bytes], log_q_NV: Tensor
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        left_out = set(self.work.recipe.curate.leave_out_classes or ())
        log_p_NV = log_q_NV if self.teacher is self.model else None
        if self.teacher is not None and self.teacher is not self.model:
            log_p_NV = self._log_probabilities(self.teacher, hashes)
        for i, item in enumerate(items):
            log_q_V, gold = log_q_NV[i], item["gold"]
            if gold not in self.model.classes:
                raise SourceError(f"item {item['prompt_id']} of {item['source']} has the class {gold!r}, which the teacher does not know")
            right = float(self.model.classes[int(log_q_V.argmax())] == gold)
            scores = {
                "accuracy": right,
                "unseen_recall": right if gold in left_out else None,
                "nll_sum": -float(log_q_V[self.model.classes.index(gold)]),
                "tokens": 1,
                "text": self.model.classes[int(log_q_V.argmax())],
            }
            if log_p_NV is not None:
                p_V = log_p_NV[i]
                scores["kl_sum"] = float((p_V.exp() * (p_V - log_q_V)).sum())
                scores["agreement_sum"] = float(p_V.argmax() == log_q_V.argmax())
            top = log_q_V.topk(min(_SHOWN_CLASSES, len(log_q_V)))
            names = [self.model.classes[j] for j in top.indices.tolist()]
            yield scores, {"classes": names, "probabilities": top.values.exp().tolist()}
