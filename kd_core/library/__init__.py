"""The library alone: soft labels of rows of one's own, and their loss, for a training loop of one's own.

No recipe and no stages. Labels are kept by content in the row store in which a recipe with this teacher and policy looks for
them, so neither pays for what the other has. docs/library.md has a whole example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kd_core.errors import SoftLabelError
from kd_core.fingerprint import fingerprint
from kd_core.losses.divergences import FORWARD_KL
from kd_core.losses.objective import StepWeights, supervised_loss
from kd_core.recipe import Divergence, PretrainedTeacher, Run, SoftLabels
from kd_core.rows.keys import about_soft_labels
from kd_core.rows.range_cache import RangeCache
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache
from kd_core.rows.work import Packed, work_in_shards
from kd_core.softlabels.capture import ScoredRow, row_key, score_rows
from kd_core.softlabels.targets import Targets, move
from kd_core.stages.scoring import CuratedRow
from kd_core.stages.soft_labels import pack_soft_labels
from kd_core.store import open_store
from kd_core.summaries import ModelIdentity
from kd_core.teacher.loaders import Place, read_config
from kd_core.teacher.models import LoadedModel, load_model, load_tokenizer, pick_device
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import Batch, TokenRow, collate
from kd_core.tokens.encoding import num_columns, tokenizer_identity
from kd_core.train.stored_rows import ShardGroups, StoredRows

__all__ = ["ScoredRows", "distillation_loss", "scored_rows"]

_OWN = {"prompt_id": "", "sample_index": None, "source": "library", "finish_reason": ""}
"""What stands beside rows that come from no recipe."""


@dataclass(frozen=True)
class ScoredRows:
    """Rows whose soft labels are in the store, by number."""

    stored: StoredRows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.stored.num_tokens)

    def batch(self, numbers: Sequence[int]) -> tuple[Batch, Targets]:
        """Read rows as one padded batch, and the soft labels of its supervised tokens in the order of ``labels_N``.

        Raises:
            StoreError: a shard is gone, or damaged: ``scored_rows`` computes its rows again.
        """
        rows = self.stored.read(numbers)
        return collate([(row.ids, row.first_supervised) for row in rows]), self.stored.targets(numbers)


def scored_rows(teacher: PretrainedTeacher, rows: Sequence[TokenRow], policy: SoftLabels, run: Run) -> ScoredRows:
    """Have a teacher score rows, and keep what the policy keeps. Rows that the store holds cost nothing; with all of them the
    teacher's weights are not even loaded.

    Args:
        teacher: which model; its tokenizer made the rows' ids.
        rows: token ids, and where the answer begins; at least one.
        policy: what of the teacher's distribution is kept.
        run: the store, the device, the sizes of shards and forward passes.

    Raises:
        SoftLabelError: a row cannot be scored; the shards before its own are kept.
        TeacherError: the model cannot be loaded.
    """
    identity = _identity(teacher)
    about = about_soft_labels(policy, identity)
    store = open_store(run.store, run.s3)
    cache = RowCache(store, "soft_labels", fingerprint(about))
    cache.describe(about)
    keyed = [(row_key(cache.namespace, row), row) for row in rows]
    loaded = list[LoadedModel]()
    models = [b""]  # of the codec: a shard goes on with the last one while it serves

    def compute(shard: list[tuple[str, TokenRow]]) -> list[tuple[CuratedRow, ScoredRow]]:
        if not loaded:
            loaded.append(load_model(teacher, device=pick_device(run.device), tokenizer=load_tokenizer(teacher)))
        found = score_rows(loaded[0], shard, policy=policy, micro_batch_tokens=run.micro_batch_tokens)
        for key, reason in found.refused.items():
            number = next(i for i, (other, _) in enumerate(keyed) if other == key)
            raise SoftLabelError(f"row {number} cannot be scored: {reason}; leave it out")
        return [(_row(scored.key, row), scored) for scored, (_, row) in zip(found.scored, shard, strict=True)]

    def pack(found: list[tuple[CuratedRow, ScoredRow]]) -> Packed:
        packed = pack_soft_labels(found, models[-1])
        models.append(packed.metadata[CODEC_MODEL])
        return packed

    snapshot, _ = work_in_shards(cache, lambda: keyed, compute, pack, shard_rows=run.shard_rows, done=lambda num: None)
    copies = RangeCache(store, Path(run.disk_cache), run.disk_cache_bytes)
    groups = ShardGroups(cache, snapshot, copies, [key for key, _ in keyed])
    num_tokens = np.array([len(row.ids) for row in rows], np.int32)
    first_supervised = np.array([row.first_supervised for row in rows], np.int32)
    return ScoredRows(StoredRows(groups, groups.group, groups.row, num_tokens=num_tokens, first_supervised=first_supervised))


def distillation_loss(
    student: PreTrainedModel, batch: Batch, targets: Targets, weights: StepWeights, divergence: Divergence = FORWARD_KL
) -> Tensor:
    """The objective of a batch: hard * CE + soft * T^2 * D(teacher_T || student_T), mean over its supervised tokens, in nats.

    Logits are cut to the columns that teacher and tokenizer share, and shifted to the tokens they predict.

    Args:
        student: a causal language model with the teacher's tokenizer, on any device.
        batch, targets: of ``ScoredRows.batch``.
        weights: hard, soft and T.
        divergence: D.

    Raises:
        SoftLabelError: the labels do not serve this temperature, divergence or vocabulary.
    """
    batch, targets = batch.to(student.device), move(targets, student.device)
    logits_NV = student(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits[batch.predict_BT]
    loss, _ = supervised_loss(logits_NV[:, : targets.common.num_columns], batch.labels_N, targets, weights, divergence)
    return loss / len(batch.labels_N)


def _identity(teacher: PretrainedTeacher) -> ModelIdentity:
    """The identity that ``models.teacher_identity`` gives the loaded model, without its weights."""
    tokenizer = load_tokenizer(teacher)
    columns = min(num_columns(tokenizer), read_config(Place.of(teacher)).get_text_config().vocab_size)
    return ModelIdentity(reference_identity(teacher), tokenizer_identity(tokenizer), columns, teacher.dtype, "transformers")


def _row(key: str, row: TokenRow) -> CuratedRow:
    columns = {"key": key, "ids": list(row.ids), "first_supervised": row.first_supervised, "num_supervised": row.num_supervised}
    return CuratedRow(row, {**_OWN, **columns})
