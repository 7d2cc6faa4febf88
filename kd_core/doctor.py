"""Checks of a user's own recipe, models and cache against the known ways in which distillation goes silently wrong.

Axes: B rows, T positions, N supervised positions, V vocabulary columns.

``examine`` takes a handful of the recipe's own rows through the very path that training takes (capture, codec, decode,
``collate``, the objective) and compares what must be equal: the teacher with itself, a batch with its parts, the cache
with the live teacher, one tokenizer with the other. Nothing is written, nothing is trained, nothing is fixed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from kd_core.artifacts import Record, find
from kd_core.cache.catalog import read_shard
from kd_core.cache.explode import decode_rows_of
from kd_core.errors import ArtifactError, KDError, SoftLabelError, SourceError, TeacherError, TrainingError
from kd_core.losses import forward_kl, step_weights, supervised_loss
from kd_core.progress import Tick, Ticker, silent
from kd_core.prompts import collect_prompts
from kd_core.recipe import (
    Dense,
    PretrainedStudent,
    PretrainedTeacher,
    Ramp,
    Recipe,
    Sampled,
    ServerTeacher,
    SoftLabels,
    StudentFromConfig,
    TopK,
    schedule_values,
)
from kd_core.row_keys import soft_label_namespace
from kd_core.shards import RowCache
from kd_core.softlabels import Targets, concatenate, decode_rows, encode_rows, parse_model
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.softlabels.targets import move
from kd_core.stages.graph import build_graph
from kd_core.stages.job import Job
from kd_core.stages.teaching import load_teacher
from kd_core.store import Store
from kd_core.student.make import new_model, student_from_teacher
from kd_core.teacher.models import LoadedModel, load_model, load_tokenizer, pick_device
from kd_core.tokens import Batch, character_tokenizer, collate, encode_gold, encode_prompt, num_columns, tokenizer_identity
from kd_core.train.data import TokenRow, token_batches

__all__ = ["Finding", "examine"]

_ROWS, _TOKENS, _CANDIDATES = 12, 384, 256
_FEW = 3  # rows of the checks that run a model several times
_SCORE_TOKENS, _BATCH_TOKENS = 192, 320  # padded tokens a pass: different on the two sides, so that padding is different too
_SPLIT_TOLERANCE = 1e-4  # float32 sums in another order: 7e-6 seen with 64M parameters
# by the teacher's dtype, what rounding may do to KL and a probability (seen: 9e-6, 6e-6 and 2e-3, 7e-2), and rounding and codec
# together to a gold log-probability x, as a share of 1 + |x| (seen: 0.012 and 0.1)
_NOISE = {torch.float32: (1e-4, 1e-3, 0.02), torch.bfloat16: (2e-2, 2e-1, 0.2)}
# by the policy, what the codec may do to KL and a probability: levels of top-k log-probabilities, steps of a sampled entropy
_CODEC_NOISE = {"topk": (2e-4, 1e-2), "sampled": (1 / 128, 0.0), "dense": (0.0, 0.0)}
_SAFE_SINCE = {
    "transformers": ("5.3", "earlier ones run code from a model's config.json without trust_remote_code"),
    "torch": ("2.6", "earlier ones can run code while loading a checkpoint"),
}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: its name, and what was found against what is required, and what to do."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


class _Skipped(Exception):  # noqa: N818 (no error)
    """A check that has nothing to examine in this recipe; the message says why."""


@dataclass(frozen=True)
class _Subject:
    """What is examined: models, a handful of rows, and where the teacher's weights are from.

    Attributes:
        teacher: None for a server teacher.
        record: the finished teacher in the store, if there is one.
        rows: prompts with their gold answers; where no prompt has gold, prompts with their second half supervised.
        has_gold: which of the two.
        note: what the reader must know about the teacher's weights; may be empty.
    """

    recipe: Recipe
    store: Store
    teacher: LoadedModel | None
    record: Record | None
    student: LoadedModel
    texts: tuple[str, ...]
    rows: tuple[TokenRow, ...]
    has_gold: bool
    note: str

    def scored(self) -> tuple[LoadedModel, SoftLabels]:
        """The teacher and the policy of soft labels; skips where one of them is missing."""
        if self.teacher is None:
            raise _Skipped("a server teacher only speaks text: there is nothing to score here")
        if self.recipe.soft_labels is None:
            raise _Skipped("the recipe keeps no soft labels")
        return self.teacher, self.recipe.soft_labels

    @property
    def few(self) -> list[int]:
        """Indices of a few rows, the shortest and the longest among them."""
        last = len(self.rows) - 1
        return sorted({i * last // (_FEW - 1) for i in range(_FEW)})

    @cached_property
    def targets(self) -> list[Targets]:
        """Soft labels of the rows, through capture, encoding and decoding."""
        teacher, policy = self.scored()
        return _captured(teacher, self.rows, policy)


def examine(recipe: Recipe, store: Store, *, tick: Ticker = silent) -> tuple[Finding, ...]:
    """Run every check; one that breaks is a failed one and does not hide the others.

    Args:
        recipe: the recipe.
        store: where a trained teacher and soft labels may already be; only read.
        tick: progress, in checks.
    """
    findings: list[Finding] = []

    def run(name: str, check: Callable[[], str]) -> None:
        tick(Tick(len(findings), len(_CHECKS) + 3, "checks", name))
        findings.append(_finding(name, check))

    run("packages", _check_packages)
    run("device", lambda: _check_device(recipe))
    subjects: list[_Subject] = []
    run("models", lambda: _admit(recipe, store, subjects))
    for name, check in _CHECKS.items():
        if subjects:
            run(name, lambda check=check: check(subjects[0]))  # type: ignore[misc]
        else:
            findings.append(Finding(name, "skipped", "needs the models, which could not be loaded"))
    tick(Tick(len(findings), len(findings), "checks"))
    return tuple(findings)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except _Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except KDError as error:
        return Finding(name, "failed", str(error))
    except Exception as error:  # what a defect looks like from here: an index out of range, a shape that does not fit
        return Finding(name, "failed", f"broke with {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------- packages and device


def _check_packages() -> str:
    found = {name: metadata.version(name) for name in _SAFE_SINCE}
    bad = [
        f"{name} {found[name]} is below {since}: {why}"
        for name, (since, why) in _SAFE_SINCE.items()
        if Version(found[name]) < Version(since)
    ]
    if bad:
        raise KDError(f"{'; '.join(bad)}; upgrade")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _check_device(recipe: Recipe) -> str:
    device = pick_device(recipe.run.device)
    dtypes = {
        recipe.training.dtype,
        *(m.dtype for m in (recipe.teacher, recipe.student) if isinstance(m, PretrainedTeacher | PretrainedStudent)),
    }
    if "bfloat16" in dtypes and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError("the recipe asks for bfloat16, and this device has none; use float32")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    for name in sorted(dtypes):
        dtype = getattr(torch, name)
        error = float(((a.to(device, dtype) @ b.to(device, dtype)).cpu().double() - a.double() @ b.double()).abs().max())
        allowed = 256 * torch.finfo(dtype).eps
        if not error <= allowed:
            raise TrainingError(f"a 64 x 64 product in {name} on {device} is off by {error:.2g}, at most {allowed:.2g} is rounding")
    return f"{device}, {torch.get_num_threads()} threads; products are right in {' and '.join(sorted(dtypes))}"


# ---------------------------------------------------------------------------------------------- what is examined


def _admit(recipe: Recipe, store: Store, subjects: list[_Subject]) -> str:
    """Load models and rows, append them to ``subjects``, and describe them."""
    teacher, record, note = _teacher(recipe, store)
    if teacher is not None:
        tokenizer = teacher.tokenizer
    else:
        assert isinstance(recipe.student, PretrainedStudent), "the recipe allows no other student beside a server teacher"
        tokenizer = load_tokenizer(recipe.student)
    texts, rows, has_gold = _rows(recipe, tokenizer)
    student = _student(recipe, teacher, rows)
    subjects.append(_Subject(recipe, store, teacher, record, student, texts, rows, has_gold, note))
    who = "a server" if teacher is None else f"{teacher.num_parameters:,} parameters{note}"
    lengths = sorted(len(row.ids) for row in rows)
    what = f"{len(rows)} {'gold rows' if has_gold else 'prompts (none has a gold answer)'} of {lengths[0]} to {lengths[-1]} tokens"
    return f"teacher: {who}; student: {student.num_parameters:,} parameters; {what}"


def _teacher(recipe: Recipe, store: Store) -> tuple[LoadedModel | None, Record | None, str]:
    """The teacher ready to run, its record, and a note on its weights."""
    spec, node = recipe.teacher, build_graph(recipe, store)["teacher"]
    if isinstance(spec, ServerTeacher):
        return None, None, ""
    record = find(store, node.stage, node.fingerprint)
    if record is not None:
        return load_teacher(Job(recipe, node, store, {"teacher": record}, Path(), silent)), record, ""
    device = pick_device(recipe.run.device)
    if isinstance(spec, PretrainedTeacher):
        loaded = load_model(spec, device=device, tokenizer=load_tokenizer(spec), trust_remote_code=spec.trust_remote_code)
        return loaded, None, ""
    tokenizer = character_tokenizer(spec.tokenizer)
    model = new_model(spec.architecture, tokenizer, seed=recipe.seeds[0])
    loaded = LoadedModel(model.to(device).eval().requires_grad_(False), tokenizer, num_columns(tokenizer))
    _give_opinions(loaded, max(_temperatures(recipe)))
    return loaded, None, " (not trained yet: its architecture with random weights)"


def _give_opinions(loaded: LoadedModel, temperature: float) -> None:
    """Scale the tied embeddings of random weights so that a token repeats itself with probability near e / (e + 1) at T.

    Fresh weights give every token the same probability, and then the labels of any position fit at every other.
    """
    head = loaded.model.get_output_embeddings().weight.data
    num_columns, hidden_size = head.shape
    head *= temperature * (math.log(num_columns) + 1.0) / (float(head.square().mean().sqrt()) * hidden_size)


def _student(recipe: Recipe, teacher: LoadedModel | None, rows: Sequence[TokenRow]) -> LoadedModel:
    """The student before its first step, in float32, in eval mode, on the recipe's device."""
    spec = recipe.student
    if isinstance(spec, PretrainedStudent):
        loaded = load_model(spec, device=pick_device("cpu"), tokenizer=load_tokenizer(spec))
    else:
        assert teacher is not None, "the recipe allows only a pre-trained student beside a server teacher"
        if isinstance(spec, StudentFromConfig):
            model = new_model(spec.architecture, teacher.tokenizer, seed=recipe.seeds[0])
            loaded = LoadedModel(model, teacher.tokenizer, num_columns(teacher.tokenizer))
        else:
            model = student_from_teacher(teacher, spec, rows=lambda num_rows: rows[:num_rows])
            loaded = LoadedModel(model, teacher.tokenizer, teacher.num_columns)
    loaded.model.float().to(pick_device(recipe.run.device)).eval().requires_grad_(True)
    return loaded


def _rows(recipe: Recipe, tokenizer: Any) -> tuple[tuple[str, ...], tuple[TokenRow, ...], bool]:
    """Prompt texts, rows of mixed length within a small budget of tokens, and whether they are gold rows."""
    prompts = [row for row in collect_prompts(recipe).table.to_pylist() if row["split"] == "train"]
    golds = [row for row in prompts if row["gold"]]
    candidates: list[tuple[str, TokenRow]] = []
    for prompt in (golds or prompts)[:_CANDIDATES]:
        ids = encode_prompt(tokenizer, prompt["prompt"], recipe.task)
        row = TokenRow((*ids, *encode_gold(tokenizer, prompt["gold"])), len(ids)) if golds else TokenRow(tuple(ids), max(1, len(ids) // 2))
        candidates += [(prompt["prompt"], row)] if row.num_supervised >= 2 else []
    if not candidates:
        raise SourceError("no prompt has two tokens to supervise; check prompts.sources and task.template")
    candidates.sort(key=lambda item: (len(item[1].ids), item[1].ids))
    picked = [candidates[i * len(candidates) // _ROWS] for i in range(_ROWS)] if len(candidates) > _ROWS else candidates
    while len(picked) > 2 and sum(len(row.ids) for _, row in picked) > _TOKENS:
        picked.pop()
    return tuple(text for text, _ in picked), tuple(row for _, row in picked), bool(golds)


# ---------------------------------------------------------------------------------------------- tokens


def _check_tokenizers(subject: _Subject) -> str:
    """Same vocabulary, template and ids on both sides; logits cut to exactly the tokenizer's columns."""
    student, teacher = subject.student, subject.teacher
    ours = tokenizer_identity(student.tokenizer)
    if teacher is not None:
        theirs = tokenizer_identity(teacher.tokenizer)
        differ = [name for name in ours if ours[name] != theirs[name] and (name != "template" or subject.recipe.task.template == "chat")]
        if differ:
            raise TeacherError(
                f"teacher's and student's tokenizers differ in {', '.join(differ)}; use a student with the teacher's tokenizer"
            )
        for text in subject.texts:
            pair = [encode_prompt(model.tokenizer, text, subject.recipe.task) for model in (teacher, student)]
            if pair[0] != pair[1]:
                raise TeacherError(f"teacher and student read {text[:40]!r} as different tokens: {pair[0][:12]} and {pair[1][:12]}")
    notes = [
        f"columns of the {name}: {_columns(name, model)}"
        for name, model in (("teacher", teacher), ("student", student))
        if model is not None
    ]
    template = f"template {ours['template'][:8]}" if subject.recipe.task.template == "chat" else "no template"
    return f"{'; '.join(notes)}; {template}, end token {ours['eos']}"


def _columns(name: str, loaded: LoadedModel) -> str:
    needed, there = num_columns(loaded.tokenizer), int(loaded.model.get_output_embeddings().weight.shape[0])
    if needed > there:
        raise TeacherError(
            f"the {name}'s tokenizer has ids up to {needed - 1}, and its logits only {there} columns; they do not belong together"
        )
    if loaded.num_columns != needed:
        raise TeacherError(
            f"the {name}'s logits are cut to {loaded.num_columns} columns, and its tokenizer has {needed}; cut before normalising"
        )
    return f"{needed} of {there}"


def _check_supervision(subject: _Subject) -> str:
    """Every answer token counts once, no other does, and a gold answer teaches its end."""
    rows, end = subject.rows, int(subject.student.tokenizer.eos_token_id)
    beyond = [i for row in rows for i in row.ids if i >= subject.student.num_columns]
    if beyond:
        raise SourceError(
            f"a row has token id {beyond[0]}, and there are {subject.student.num_columns} columns; use the model's own tokenizer"
        )
    batch = collate([(row.ids, row.first_supervised) for row in rows])
    counts, wanted = batch.predict_BT.sum(1).tolist(), [row.num_supervised for row in rows]
    labels = [i for row in rows for i in row.ids[row.first_supervised :]]
    before = [i for row in rows for i in row.ids[row.first_supervised - 1 : -1]]
    if counts != wanted or batch.labels_N.tolist() != labels:
        raise TrainingError(
            f"a mixed batch supervises {counts} tokens of its rows, {wanted} expected: prompt or padding counts, or answers are cut"
        )
    if batch.ids_BT[batch.predict_BT].tolist() != before:
        raise TrainingError("logits are taken at other positions than just before the supervised tokens: the shift is wrong")
    if not subject.has_gold:
        return f"{sum(counts)} supervised tokens in {len(rows)} prompts, none lost; no gold rows, so no end token to look for"
    if any(row.ids[-1] != end or end in row.ids[row.first_supervised : -1] for row in rows):
        raise TrainingError(
            f"a gold row does not end with the end token {end}, or holds it before its end: the student would not learn to stop"
        )
    return f"{sum(counts)} supervised tokens in {len(rows)} rows, none lost; each answer ends with the end token {end}, supervised"


# ---------------------------------------------------------------------------------------------- soft labels


@dataclass(frozen=True)
class _Distance:
    """Stored soft labels against a live model at one temperature.

    Attributes:
        mean_kl: over positions, nats.
        allowed_kl: what rounding and, for sampled labels, chance may make of zero.
        moved: largest |p - q| over all positions and columns: the gradient of KL by a logit, times the temperature.
        allowed_moved: the same for it; a systematic draw is off by less than 1 / draws.
    """

    temperature: float
    mean_kl: float
    allowed_kl: float
    moved: float
    allowed_moved: float

    @property
    def is_zero(self) -> bool:
        """Within what is allowed; NaN is not."""
        return abs(self.mean_kl) <= self.allowed_kl and self.moved <= self.allowed_moved

    def __str__(self) -> str:
        kl = f"KL {self.mean_kl:.2g} nats a token (allowed {self.allowed_kl:.2g})"
        return f"{kl}, largest probability moved {self.moved:.2g} (allowed {self.allowed_moved:.2g}) at T = {self.temperature:g}"


def _captured(teacher: LoadedModel, rows: Sequence[TokenRow], policy: SoftLabels) -> list[Targets]:
    keyed = [(row_key("doctor", row), row) for row in rows]
    scores = score_rows(teacher, keyed, policy=policy, micro_batch_tokens=_SCORE_TOKENS)
    if scores.refused:
        raise SoftLabelError(f"{len(scores.refused)} of {len(rows)} rows cannot be scored: {next(iter(scores.refused.values()))}")
    labels = [np.array(row.ids[row.first_supervised :], np.int64) for row in rows]
    model, blobs = encode_rows([scored.targets for scored in scores.scored], labels)
    parsed = parse_model(model)
    return [decode_rows(parsed, [blob], [gold]) for blob, gold in zip(blobs, labels, strict=True)]


def _temperatures(recipe: Recipe) -> tuple[float, ...]:
    """Temperatures at which the recipe uses its soft labels; those they are kept at where the objective has no soft part."""
    if recipe.objective.supervision == "soft":
        schedule = recipe.objective.temperature
        return (schedule.start, schedule.end) if isinstance(schedule, Ramp) else tuple(sorted(set(schedule_values(schedule) or ())))
    match recipe.soft_labels:
        case Sampled():
            return (recipe.soft_labels.temperature,)
        case TopK():
            return recipe.soft_labels.temperatures
        case _:
            return (1.0,)


def _distances(
    loaded: LoadedModel, rows: Sequence[TokenRow], targets: Sequence[Targets], *, policy: SoftLabels, temperatures: Sequence[float]
) -> list[_Distance]:
    """Compare stored targets with a live model at the same rows, the way training does, one entry a temperature."""
    kls: dict[float, list[Tensor]] = {temperature: [] for temperature in temperatures}
    moved, surprise = dict.fromkeys(temperatures, 0.0), dict.fromkeys(temperatures, 0.0)
    for part in token_batches(rows, _BATCH_TOKENS):
        batch = collate([(rows[i].ids, rows[i].first_supervised) for i in part]).to(loaded.device)
        logits_NV = _logits(loaded, batch).detach().float().requires_grad_()
        stored = move(concatenate([targets[i] for i in part]), loaded.device)
        for temperature in temperatures:
            kl_N = forward_kl(logits_NV, stored, temperature=temperature)
            (grad_NV,) = torch.autograd.grad(kl_N.sum(), logits_NV)
            kls[temperature].append(kl_N.detach().double().cpu())
            moved[temperature] = max(moved[temperature], float(grad_NV.abs().max()) * temperature)
            lowest = torch.log_softmax(logits_NV.detach() / temperature, -1).min()
            surprise[temperature] = max(surprise[temperature], -float(lowest))
    kl_noise, moved_noise = (a + b for a, b in zip(_NOISE[loaded.model.dtype], _CODEC_NOISE[policy.kind], strict=False))
    found = []
    for temperature in temperatures:
        kl_N = torch.cat(kls[temperature])
        by_chance = 0.0
        if isinstance(
            policy, Sampled
        ):  # 4 standard errors, and ten draws on the least likely token: chance that a small sample has not seen
            standard_error = float(kl_N.std(correction=0)) / math.sqrt(len(kl_N))
            by_chance = 4.0 * standard_error + 10.0 * surprise[temperature] / (policy.num_draws * len(kl_N))
        step = 1.0 / policy.num_draws if isinstance(policy, Sampled) else 0.0
        found.append(_Distance(temperature, float(kl_N.mean()), kl_noise + by_chance, moved[temperature], moved_noise + step))
    return found


def _logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits at supervised positions, cut to the valid columns, (N, V): as the training loop takes them."""
    with torch.set_grad_enabled(any(p.requires_grad for p in loaded.model.parameters())):
        logits_BTV: Tensor = loaded.model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
    return logits_BTV[batch.predict_BT][:, : loaded.num_columns]


def _check_teacher_as_student(subject: _Subject) -> str:
    """A student that is the teacher has nothing to learn from its own soft labels."""
    teacher, policy = subject.scored()
    found = _distances(teacher, subject.rows, subject.targets, policy=policy, temperatures=_temperatures(subject.recipe))
    if wrong := [distance for distance in found if not distance.is_zero]:
        raise SoftLabelError(
            f"the teacher as its own student is not at zero: {'; '.join(map(str, wrong))}{subject.note}: "
            "what is stored is not what the student is compared with; look at the checks alignment and tokenizers, then at temperatures"
        )
    return f"{'; '.join(map(str, found))}{subject.note}"


def _check_alignment(subject: _Subject) -> str:
    """Labels of the token before or after must not fit as well as those of the token itself. Dense ones: chance must not hide it."""
    teacher, _ = subject.scored()
    temperatures, dense = _temperatures(subject.recipe)[:1], Dense(kind="dense")
    rows = [subject.rows[i] for i in subject.few]
    later = [TokenRow(row.ids, row.first_supervised + 1) for row in rows]
    earlier = [TokenRow(row.ids[:-1], row.first_supervised) for row in rows]

    def distance(live: Sequence[TokenRow], stored: Sequence[TokenRow]) -> _Distance:
        (found,) = _distances(teacher, live, _captured(teacher, stored, dense), policy=dense, temperatures=temperatures)
        return found

    aligned, shifted = distance(rows, rows), {"+1": distance(earlier, later).mean_kl, "-1": distance(later, earlier).mean_kl}
    limit = max(2.0 * aligned.allowed_kl, 10.0 * abs(aligned.mean_kl))
    numbers = f"KL {aligned.mean_kl:.2g} in place, {', '.join(f'{kl:.2g} shifted by {name}' for name, kl in shifted.items())} nats a token"
    if not min(shifted.values()) > limit:
        raise SoftLabelError(f"{numbers}; shifted must be above {limit:.2g}: soft labels and logits are off by one position{subject.note}")
    return f"{numbers} (above {limit:.2g} required){subject.note}"


def _check_cached_soft_labels(subject: _Subject) -> str:
    """A few rows of the cache, scored again by the teacher as it is now."""
    teacher, policy = subject.scored()
    if subject.record is None:
        raise _Skipped("the store has no finished teacher for this recipe, so no soft labels of its")
    cache = RowCache(subject.store, "soft_labels", soft_label_namespace(policy, subject.record))
    commits = cache.snapshot().commits
    if not commits:
        raise _Skipped("the store has no soft labels of this teacher and policy yet")
    commit = min(commits, key=lambda commit: commit.size_bytes)
    keys = list(commit.keys[:_FEW])
    table = read_shard(cache, commit).slice(0, _FEW)
    rows = [TokenRow(tuple(row["ids"]), row["first_supervised"]) for row in table.select(["ids", "first_supervised"]).to_pylist()]
    if [row_key(cache.namespace, row) for row in rows] != keys:
        raise ArtifactError(f"{cache.prefix}: rows of shard {commit.sha256[:12]} are not those their keys name; delete its commit")
    stored = [decode_rows_of(table.slice(i, 1)) for i in range(len(keys))]
    live = score_rows(teacher, list(zip(keys, rows, strict=True)), policy=policy, micro_batch_tokens=_SCORE_TOKENS)
    stored_N, live_N = (torch.cat([t.common.gold_logprob_N for t in found]) for found in (stored, [s.targets for s in live.scored]))
    gap_N = (stored_N - live_N) / (1 + live_N.abs())
    largest, mean = float(gap_N.abs().max()), abs(float(gap_N.mean()))
    allowed = _NOISE[teacher.model.dtype][2]
    allowed_mean = 1.4 * allowed / math.sqrt(len(gap_N))  # rounding is even: 4 standard errors of its mean
    found = _distances(teacher, rows, stored, policy=policy, temperatures=_temperatures(subject.recipe))
    off = f"off by {largest:.2g} of 1 + their size (allowed {allowed:.2g}), {mean:.2g} on average (allowed {allowed_mean:.2g})"
    numbers = f"{len(rows)} rows: gold log-probabilities {off}; {'; '.join(map(str, found))}"
    if not (largest <= allowed and mean <= allowed_mean and all(distance.is_zero for distance in found)):
        raise SoftLabelError(
            f"{numbers}: the cache is not of this teacher as it runs here; delete {cache.prefix} to have it computed again, "
            "or run the teacher with the packages and the device that made it"
        )
    return numbers


# ---------------------------------------------------------------------------------------------- batches


def _check_batch_split(subject: _Subject) -> str:
    """Loss and gradient of the student are the same in one batch, row by row, and with more padding."""
    recipe, student = subject.recipe, subject.student
    picked = subject.few
    rows = [subject.rows[i] for i in picked]
    soft = recipe.objective.supervision == "soft"
    targets = [subject.targets[i] for i in picked] if soft else None
    whole = sum(len(row.ids) for row in rows) * len(rows)
    loss, gradient = _loss_and_gradient(recipe, student, rows, targets, budget_tokens=whole, padding=0)
    norm = _norm(gradient)
    worst = 0.0
    for name, budget_tokens, padding in (("row by row", 1, 0), ("with 7 more padded positions", whole, 7)):
        other, changed = _loss_and_gradient(recipe, student, rows, targets, budget_tokens=budget_tokens, padding=padding)
        off = abs(other - loss) / abs(loss), _norm([a.sub_(b) for a, b in zip(changed, gradient, strict=True)]) / norm
        if not max(off) <= _SPLIT_TOLERANCE:
            raise TrainingError(
                f"{name}, the loss differs by {off[0]:.2g} and the gradient by {off[1]:.2g} of itself (allowed {_SPLIT_TOLERANCE:g}): "
                "padding counts, or a mean is taken over micro-batches"
            )
        worst = max(worst, *off)
    return f"loss {loss:.4f} and gradient of {len(rows)} rows: off by {worst:.2g} of itself at most (allowed {_SPLIT_TOLERANCE:g})"


def _loss_and_gradient(
    recipe: Recipe, student: LoadedModel, rows: Sequence[TokenRow], targets: Sequence[Targets] | None, *, budget_tokens: int, padding: int
) -> tuple[float, list[Tensor]]:
    """Mean loss over supervised tokens in the middle of the run, and its gradient by every parameter it reaches."""
    weights = step_weights(recipe.objective, step=recipe.training.steps // 2, steps=recipe.training.steps)
    num_tokens = sum(row.num_supervised for row in rows)
    total = 0.0
    student.model.zero_grad(set_to_none=True)
    for part in token_batches(rows, budget_tokens):
        batch = _padded(collate([(rows[i].ids, rows[i].first_supervised) for i in part]), padding).to(student.device)
        stored = None if targets is None else move(concatenate([targets[i] for i in part]), student.device)
        loss, _ = supervised_loss(_logits(student, batch), batch.labels_N, stored, weights)
        (loss / num_tokens).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / num_tokens
    gradient = [p.grad for p in student.model.parameters() if p.grad is not None]
    student.model.zero_grad(set_to_none=True)
    return total, gradient


def _padded(batch: Batch, padding: int) -> Batch:
    """The batch with more padded positions on the right."""

    def pad(values_BT: Tensor) -> Tensor:
        return torch.nn.functional.pad(values_BT, (0, padding), value=0)

    return replace(batch, ids_BT=pad(batch.ids_BT), attention_BT=pad(batch.attention_BT), predict_BT=pad(batch.predict_BT))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


_CHECKS: dict[str, Callable[[_Subject], str]] = {
    "tokenizers": _check_tokenizers,
    "supervision": _check_supervision,
    "teacher_as_student": _check_teacher_as_student,
    "alignment": _check_alignment,
    "batch_split": _check_batch_split,
    "cached_soft_labels": _check_cached_soft_labels,
}
