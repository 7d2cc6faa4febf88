"""Checks of soft labels: zero for the teacher itself, in their place, of all ids, and still those of the live teacher.

Axes: N supervised positions, V vocabulary columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.cache.catalog import read_shard
from kd_core.cache.explode import decode_rows_of
from kd_core.doctor.findings import Skipped
from kd_core.doctor.subject import SCORE_TOKENS, Subject, captured, temperatures_of, through_codec
from kd_core.errors import ArtifactError, SoftLabelError
from kd_core.losses import forward_kl
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK
from kd_core.rows.keys import soft_label_namespace
from kd_core.rows.table import RowCache
from kd_core.softlabels import Targets, concatenate
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.softlabels.targets import SampledTargets, TopKTargets, make_targets, move
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import Batch, TokenRow, collate, token_batches

__all__ = ["check_alignment", "check_cached_soft_labels", "check_largest_ids", "check_teacher_as_student", "model_logits"]

_FEW = 3
_BATCH_TOKENS = 320
# by the teacher's dtype, what rounding may do to KL and a probability (seen: 9e-6, 6e-6 and 2e-3, 7e-2), and rounding and codec
# together to a gold log-probability x, as a share of 1 + |x| (seen: 0.012 and 0.1)
_NOISE = {torch.float32: (1e-4, 1e-3, 0.02), torch.bfloat16: (2e-2, 2e-1, 0.2)}
# by the policy, what the codec may do to KL and a probability: levels of top-k log-probabilities, steps of a sampled entropy
_CODEC_NOISE = {"topk": (2e-4, 1e-2), "sampled": (1 / 128, 0.0), "dense": (0.0, 0.0)}


@dataclass(frozen=True)
class Distance:
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


def _distances(
    loaded: LoadedModel, rows: Sequence[TokenRow], targets: Sequence[Targets], *, policy: SoftLabels, temperatures: Sequence[float]
) -> list[Distance]:
    """Compare stored targets with a live model at the same rows, the way training does, one entry a temperature."""
    kls: dict[float, list[Tensor]] = {temperature: [] for temperature in temperatures}
    moved, surprise = dict.fromkeys(temperatures, 0.0), dict.fromkeys(temperatures, 0.0)
    for part in token_batches(rows, _BATCH_TOKENS):
        batch = collate([(rows[i].ids, rows[i].first_supervised) for i in part]).to(loaded.device)
        logits_NV = model_logits(loaded, batch).detach().float().requires_grad_()
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
        found.append(Distance(temperature, float(kl_N.mean()), kl_noise + by_chance, moved[temperature], moved_noise + step))
    return found


def model_logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits at supervised positions, cut to the valid columns, (N, V): as the training loop takes them."""
    with torch.set_grad_enabled(any(p.requires_grad for p in loaded.model.parameters())):
        logits_BTV: Tensor = loaded.model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
    return logits_BTV[batch.predict_BT][:, : loaded.num_columns]


def check_teacher_as_student(subject: Subject) -> str:
    """A student that is the teacher has nothing to learn from its own soft labels."""
    teacher, policy = subject.scored()
    found = _distances(teacher, subject.rows, subject.targets, policy=policy, temperatures=_all_temperatures(subject))
    if wrong := [distance for distance in found if not distance.is_zero]:
        raise SoftLabelError(
            f"the teacher as its own student is not at zero: {'; '.join(map(str, wrong))}{subject.note}: "
            "what is stored is not what the student is compared with; look at the checks alignment and tokenizers, then at temperatures"
        )
    return f"{'; '.join(map(str, found))}{subject.note}"


def _all_temperatures(subject: Subject) -> tuple[float, ...]:
    """Those that the objective uses, and the others of a stored grid."""
    stored = subject.recipe.soft_labels.temperatures if isinstance(subject.recipe.soft_labels, TopK) else ()
    used = temperatures_of(subject.recipe)
    return (*used, *(t for t in stored if t not in used))


def check_alignment(subject: Subject) -> str:
    """Labels of the token before or after must not fit as well as those of the token itself. Dense ones: chance must not hide it."""
    teacher, _ = subject.scored()
    temperatures, dense = temperatures_of(subject.recipe)[:1], Dense(kind="dense")
    rows = [subject.rows[i] for i in subject.few]
    later = [TokenRow(row.ids, row.first_supervised + 1) for row in rows]
    earlier = [TokenRow(row.ids[:-1], row.first_supervised) for row in rows]

    def distance(live: Sequence[TokenRow], stored: Sequence[TokenRow]) -> Distance:
        (found,) = _distances(teacher, live, captured(teacher, stored, dense), policy=dense, temperatures=temperatures)
        return found

    aligned, shifted = distance(rows, rows), {"+1": distance(earlier, later).mean_kl, "-1": distance(later, earlier).mean_kl}
    limit = max(2.0 * aligned.allowed_kl, 10.0 * abs(aligned.mean_kl))
    numbers = f"KL {aligned.mean_kl:.2g} in place, {', '.join(f'{kl:.2g} shifted by {name}' for name, kl in shifted.items())} nats a token"
    if not min(shifted.values()) > limit:
        raise SoftLabelError(f"{numbers}; shifted must be above {limit:.2g}: soft labels and logits are off by one position{subject.note}")
    return f"{numbers} (above {limit:.2g} required){subject.note}"


def check_cached_soft_labels(subject: Subject) -> str:
    """A few rows of the cache, scored again by the teacher as it is now."""
    teacher, policy = subject.scored()
    if subject.record is None:
        raise Skipped("the store has no finished teacher for this recipe, so no soft labels of its")
    cache = RowCache(subject.store, "soft_labels", soft_label_namespace(policy, subject.record))
    commits = cache.snapshot().commits
    if not commits:
        raise Skipped("the store has no soft labels of this teacher and policy yet")
    commit = min(commits, key=lambda commit: commit.size_bytes)
    keys = list(commit.keys[:_FEW])
    table = read_shard(cache, commit).slice(0, _FEW)
    rows = [TokenRow(tuple(row["ids"]), row["first_supervised"]) for row in table.select(["ids", "first_supervised"]).to_pylist()]
    if [row_key(cache.namespace, row) for row in rows] != keys:
        raise ArtifactError(f"{cache.prefix}: rows of shard {commit.sha256[:12]} are not those their keys name; delete its commit")
    stored = [decode_rows_of(table.slice(i, 1)) for i in range(len(keys))]
    live = score_rows(teacher, list(zip(keys, rows, strict=True)), policy=policy, micro_batch_tokens=SCORE_TOKENS)
    stored_N, live_N = (torch.cat([t.common.gold_logprob_N for t in found]) for found in (stored, [s.targets for s in live.scored]))
    gap_N = (stored_N - live_N) / (1 + live_N.abs())
    largest, mean = float(gap_N.abs().max()), abs(float(gap_N.mean()))
    allowed = _NOISE[teacher.model.dtype][2]
    allowed_mean = 1.4 * allowed / math.sqrt(len(gap_N))  # rounding is even: 4 standard errors of its mean
    found = _distances(teacher, rows, stored, policy=policy, temperatures=temperatures_of(subject.recipe))
    off = f"off by {largest:.2g} of 1 + their size (allowed {allowed:.2g}), {mean:.2g} on average (allowed {allowed_mean:.2g})"
    numbers = f"{len(rows)} rows: gold log-probabilities {off}; {'; '.join(map(str, found))}"
    if not (largest <= allowed and mean <= allowed_mean and all(distance.is_zero for distance in found)):
        raise SoftLabelError(
            f"{numbers}: the cache is not of this teacher as it runs here; delete {cache.prefix} to have it computed again, "
            "or run the teacher with the packages and the device that made it"
        )
    return numbers


def check_largest_ids(subject: Subject) -> str:
    """Ids near the vocabulary's end, and the first ones above 17 bits, survive packing."""
    _, policy = subject.scored()
    num_columns = subject.student.num_columns
    wanted = sorted({num_columns - 1, num_columns - 2, *(i for i in (2**16 + 1, 2**17 + 1) if i < num_columns)})
    labels_N = torch.tensor(wanted)
    logits_NV = torch.zeros(len(wanted), num_columns)
    logits_NV[torch.arange(len(wanted)), labels_N] = 30.0
    (found,) = through_codec(
        [make_targets(logits_NV, labels_N, policy, uniform_N=torch.full((len(wanted),), 0.5).double())], [labels_N.numpy()]
    )
    if isinstance(found, SampledTargets):
        likeliest = [int(ids[counts.argmax()]) for ids, counts in _by_position(found)]
    else:
        likeliest = (found.ids_NK[:, 0] if isinstance(found, TopKTargets) else found.logprobs_NV.argmax(-1)).tolist()
    if likeliest != wanted:
        raise SoftLabelError(f"ids {wanted} came back from the codec as {likeliest}: ids are packed in too few bits; please report it")
    return f"ids {', '.join(map(str, wanted))} survive encoding and decoding"


def _by_position(targets: SampledTargets) -> list[tuple[Tensor, Tensor]]:
    lengths = targets.offsets_N1.diff().tolist()
    return list(zip(torch.split(targets.ids_E, lengths), torch.split(targets.counts_E, lengths), strict=True))
