"""The stage in which a model learns: the student, and the compared models that differ from it in one field."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from kd_core.errors import SoftLabelError, TrainingError
from kd_core.recipe import (
    Arm,
    HiddenStateFeatures,
    PretrainedStudent,
    Recipe,
    ServerTeacher,
    StudentFromConfig,
    StudentFromTeacher,
    Training,
)
from kd_core.recipe.block_pairs import block_pairs
from kd_core.rows.range_cache import RangeCache
from kd_core.softlabels.forward import decoder_blocks
from kd_core.softlabels.kept import kept_mass
from kd_core.stages.job import Job
from kd_core.stages.ranks import on_ranks
from kd_core.stages.scoring import token_rows, usable_rows
from kd_core.stages.sharded import frozen_rows
from kd_core.stages.teacher import load_teacher
from kd_core.student.activations import sample_rows
from kd_core.student.adapters import add_adapters, merge_adapters
from kd_core.student.describe import teacher_config
from kd_core.student.make import new_model, student_from_teacher, trainable
from kd_core.student.vocabulary import trim_model
from kd_core.summaries import CurateSummary, ModelIdentity, TeacherSummary, TrainSummary, TrimmedVocabulary
from kd_core.teacher.models import LoadedModel, load_model, load_tokenizer, pick_device, save_model
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import num_columns, tokenizer_identity
from kd_core.tokens.lengths import expect_enough
from kd_core.tokens.token_map import TokenMap, read_token_map
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import CachedStates, FeatureTask, LiveTeacher
from kd_core.train.history import to_jsonl
from kd_core.train.loop import train
from kd_core.train.row_order import Rows, TrainingData
from kd_core.train.stored_rows import ShardGroups, StoredRows, file_rows
from kd_core.train.trimmed import FullFeatures, TrimmedRows, trimmed_row

__all__ = ["train_stage"]

_LOG = logging.getLogger(__name__)

_MASS_ROWS = 512
"""Training rows on which the kept tokens' share of the teacher's probability is measured."""


def train_stage(job: Job) -> TrainSummary:
    """Files: model/ (Hugging Face layout), metrics.jsonl."""
    return on_ranks(job, _learn) if job.recipe.run.num_processes > 1 else _learn(job, 0)


def _learn(job: Job, rank: int) -> TrainSummary:
    arm: Arm = job.node.group  # type: ignore[assignment]  # a train node's group is its arm
    recipe = job.recipe.arm(arm)
    seed = int(job.node.name.rpartition(".")[2])
    validation = token_rows(job.read_table("curate", "validation.parquet"))
    student = _make_student(job, seed)
    features = _feature_task(job, recipe, student)
    vocabulary: TrimmedVocabulary | None = None
    with _training_rows(job, recipe) as rows:
        if student.token_map is not None:
            validation = [trimmed_row(row, student.token_map) for row in validation]
            soft = recipe.objective.supervision == "soft"
            kept = _kept_mass(recipe, rows, student.token_map, seed=seed) if soft else None
            vocabulary = TrimmedVocabulary(student.num_columns, student.token_map.num_full, kept)
            rows = TrimmedRows(rows, student.token_map)
            features = None if features is None else replace(features, source=FullFeatures(features.source, student.token_map))
        used = usable_rows(job, rows.num_tokens, rows.first_supervised, student=student.max_positions)
        expect_enough(used, recipe.training)
        _LOG.info("rows: %s", used)
        result = train(
            student.model,
            TrainingData(rows, validation),
            num_columns=student.num_columns,
            training=_training(job).model_copy(update={"max_tokens": used.limit.tokens}),
            objective=recipe.objective,
            seed=seed,
            run=recipe.run,
            checkpoints=Checkpoints(job.store, job.node.fingerprint, recipe.run.keep_checkpoints),
            tick=job.tick,
            features=features,
        )
        num_rows = len(rows.num_tokens)
    merge_adapters(student.model)
    if rank == 0:
        save_model(student, job.directory)
        (job.directory / "metrics.jsonl").write_text(to_jsonl(result.metrics))
    return TrainSummary(
        arm=arm,
        seed=seed,
        parameters=student.num_parameters,
        bytes=student.num_bytes,
        training=result.summary(num_rows=num_rows, used=used),
        vocabulary=vocabulary,
        feature_blocks=None if features is None else tuple((pair.student, pair.teacher) for pair in features.pairs),
    )


def _training(job: Job) -> Training:
    """The recipe's training, its epochs counted on all curated rows: compared models take the same steps, whatever each learns from."""
    return job.recipe.training.for_rows(job.summary("curate", CurateSummary).rows)


def _make_student(job: Job, seed: int) -> LoadedModel:
    spec = job.recipe.student
    if isinstance(spec, StudentFromTeacher):
        teacher = load_teacher(job)

        def rows(num_rows: int) -> list[TokenRow]:
            with job.files(job.inputs["curate"]) as files:
                curated = file_rows(files / "rows.parquet", None)
                return sample_rows(curated, num_rows, max_tokens=job.recipe.training.max_tokens, seed=seed)

        student = LoadedModel(student_from_teacher(teacher, spec, rows=rows), teacher.tokenizer, teacher.num_columns)
    elif isinstance(spec, StudentFromConfig):
        tokenizer, token_map = _tokenizer(job)
        return LoadedModel(new_model(spec.architecture, tokenizer, seed=seed), tokenizer, num_columns(tokenizer), token_map)
    else:
        student = _pretrained_student(job, spec)
    if spec.vocabulary is not None:
        tokenizer, token_map = _tokenizer(job)
        assert token_map is not None, "the vocabulary stage writes one"
        student = LoadedModel(trim_model(student.model, token_map), tokenizer, num_columns(tokenizer), token_map)
    if spec.adapter is not None:
        add_adapters(student.model, spec.adapter, seed=seed)
    return student


def _tokenizer(job: Job) -> tuple[PreTrainedTokenizerBase, TokenMap | None]:
    """The teacher's, or what the vocabulary stage kept."""
    role, folder = ("vocabulary", "tokenizer") if "vocabulary" in job.inputs else ("teacher", "model")
    with job.files(job.inputs[role]) as files:
        return load_tokenizer(files / folder, trust_remote_code=job.recipe.trusts_code), read_token_map(files / folder)


def _kept_mass(recipe: Recipe, rows: Rows, token_map: TokenMap, *, seed: int) -> float:
    """The teacher's mean probability of kept tokens, over the positions of some training rows drawn by the seed.

    Raises:
        TrainingError: it is less than the recipe allows.
    """
    spec = recipe.student.vocabulary
    assert spec is not None, "a student with a token map has one"
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(rows.num_tokens))[:_MASS_ROWS]
    found = float(kept_mass(rows.targets(np.sort(drawn).tolist()), token_map).mean())
    if found < spec.least_kept_mass:
        raise TrainingError(
            f"student.vocabulary keeps {len(token_map.kept):,} of {token_map.num_full:,} tokens, and they hold {found:.4f} of the "
            f"teacher's probability on {len(drawn)} training rows, where least_kept_mass asks for {spec.least_kept_mass:g}; raise "
            "num_common, give more rows, or lower least_kept_mass"
        )
    return found


def _pretrained_student(job: Job, spec: PretrainedStudent) -> LoadedModel:
    tokenizer = load_tokenizer(spec)
    if not isinstance(job.recipe.teacher, ServerTeacher):
        teacher, ours = job.summary("teacher", TeacherSummary).teacher, tokenizer_identity(tokenizer)
        assert isinstance(teacher, ModelIdentity), "a teacher that is no server runs here"
        if (teacher.tokenizer.vocabulary, teacher.tokenizer.probe) != (ours.vocabulary, ours.probe):
            raise TrainingError("teacher and student have different tokenizers; use a student with the teacher's tokenizer")
    loaded = load_model(spec, device=pick_device("cpu"), tokenizer=tokenizer)
    trainable(loaded.model)
    return loaded


@contextmanager
def _training_rows(job: Job, recipe: Recipe) -> Iterator[Rows]:
    """Rows of a compared model: soft labels from their shards, else the curated file; all compared models number them alike."""
    keys = job.read_table("soft_labels", "keys.parquet") if "soft_labels" in job.inputs else None
    if recipe.objective.supervision == "soft":
        assert keys is not None, "a soft objective has soft labels upstream"
        yield _stored_rows(job, "soft_labels", keys)
        return
    with job.files(job.inputs["curate"]) as files:
        numbers = None if keys is None else keys["row"].to_numpy()
        if recipe.objective.supervision == "gold":
            source = pq.read_table(files / "rows.parquet", columns=["source"])["source"]
            numbers = np.flatnonzero(pc.equal(source, "gold").to_numpy(zero_copy_only=False))
            if not len(numbers):
                raise TrainingError(
                    f"{job.node.name}: no row has a gold answer; give prompts.sources a gold template, or drop baseline from "
                    "evaluation.compare"
                )
        yield file_rows(files / "rows.parquet", numbers)


def _stored_rows(job: Job, role: str, keys: pa.Table) -> StoredRows:
    """Rows of an upstream node's shards, in the order of their keys."""
    cache, snapshot = frozen_rows(job, role)
    run = job.recipe.run
    groups = ShardGroups(cache, snapshot, RangeCache(job.store, Path(run.disk_cache), run.disk_cache_bytes), keys["key"].to_pylist())
    sizes = {name: keys[name].to_numpy() for name in ("num_tokens", "first_supervised")}
    return StoredRows(groups, groups.group, groups.row, **sizes)


def _feature_task(job: Job, recipe: Recipe, student: LoadedModel) -> FeatureTask | None:
    """Block pairs and the teacher's side of the model's features; None if it has none."""
    features = recipe.objective.features
    if features is None or recipe.objective.supervision != "soft":
        return None
    student_blocks = len(decoder_blocks(student.model))
    if isinstance(features, HiddenStateFeatures) and features.source == "cached":
        assert recipe.hidden_states is not None, "the recipe allows no cached features without hidden states"
        config = teacher_config(recipe)
        assert config is not None, "the recipe allows no features of a server teacher"
        pairs = block_pairs(
            features, student_blocks=student_blocks, teacher_blocks=config.num_hidden_layers, captured=recipe.hidden_states.blocks
        )
        task = FeatureTask(features, pairs, CachedStates(_state_rows(job), pairs))
    else:
        teacher = load_teacher(job)
        teacher_blocks = len(decoder_blocks(teacher.model))
        pairs = block_pairs(features, student_blocks=student_blocks, teacher_blocks=teacher_blocks, captured=None)
        task = FeatureTask(features, pairs, LiveTeacher(teacher, features, pairs))
    _LOG.info("features: the student's blocks learn from the teacher's: %s", ", ".join(f"{p.student} from {p.teacher}" for p in pairs))
    return task


def _state_rows(job: Job) -> StoredRows:
    """Captured states, numbered as the rows with soft labels are."""
    labels, states = (job.read_table(role, "keys.parquet") for role in ("soft_labels", "hidden_states"))
    place = {row: i for i, row in enumerate(states["row"].to_pylist())}
    if missing := [row for row in labels["row"].to_pylist() if row not in place]:
        raise SoftLabelError(
            f"{len(missing)} curated rows have soft labels and no hidden states, the first is row {missing[0]}: the teacher gave NaN or "
            "infinite states there and finite logits; load it in float32, or set objective.features.source: live"
        )
    return _stored_rows(job, "hidden_states", states.take([place[row] for row in labels["row"].to_pylist()]))
