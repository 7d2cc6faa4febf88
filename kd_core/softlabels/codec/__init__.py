"""Soft labels of rows as bytes and back: the binary column of a soft-label shard, versioned.

Version 3 is written: a model a shard (in the Parquet footer) and a blob a row. A blob is decoded with its shard's model and its
row's own tokens (``labels``: the ids at its supervised positions, which the shard holds anyway); its checksum covers all
three, so damage and what does not belong together raise SoftLabelError. Rows of versions 1 and 2 go on
being read; those of version 1 need neither.

What comes back: ids, counts, dense log-probabilities, normalisers and tails as they were; entropies within 1/128 nat; the gold
log-probability -x within 1/250 + x/60 nat; top-k log-probabilities as levels of p^(1/2Tmax), so fine that the KL
from the kept distribution to the decoded one is about 1e-4 nat on average, at every temperature of the grid. Drawn ids
come back by falling count, the gold id last; top-k ids by falling log-probability. Where T0 is 1 the entropy at T0 is the entropy.

The compiler behind versions 2 and 3 takes 0.4 s to import: it is imported where rows are coded, not here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd_core.errors import SoftLabelError
from kd_core.softlabels.codec import v1 as codec_v1
from kd_core.softlabels.targets import Targets, concatenate

if TYPE_CHECKING:
    from kd_core.softlabels.codec.model import Model

__all__ = ["decode_mixed_rows", "decode_rows", "encode_rows", "parse_model"]


def encode_rows(rows: Sequence[Targets], labels: Sequence[np.ndarray], known: bytes = b"") -> tuple[bytes, list[bytes]]:
    """The rows of a shard as one model and a blob a row.

    Args:
        rows: at least one; all of one policy and vocabulary.
        labels: gold ids at each row's supervised positions, int64.
        known: the model of another shard: it is this one's too if it serves these rows about as well as one of their own.

    Raises:
        SoftLabelError: rows of different kinds, labels that do not fit them, an id outside the vocabulary or twice at one
            position, draws that do not add up, NaN, or more than 2^20 columns.
    """
    from kd_core.softlabels.codec import rows as codec_v3

    return codec_v3.encode_rows(rows, labels, parse_model(known))


def parse_model(data: bytes) -> "Model | None":
    """A shard's model; None for a shard of version 1, which has none (b"").

    Raises:
        SoftLabelError: not a model, of another version, or damaged.
    """
    from kd_core.softlabels.codec import model as codec_model

    return codec_model.parse_model(data) if data else None


def decode_rows(model: "Model | None", blobs: Sequence[bytes], labels: Sequence[np.ndarray]) -> Targets:
    """Targets of rows of one shard, their positions one after the other.

    Args:
        model: what ``parse_model`` gave for the shard.
        blobs: at least one if the shard has no model.
        labels: gold ids at each row's supervised positions, int64 or int32.

    Raises:
        SoftLabelError: a damaged blob, one of an unknown version, or one that belongs to other labels or another model.
    """
    return decode_mixed_rows([model], np.zeros(len(blobs), np.int64), blobs, labels)


def decode_mixed_rows(
    models: Sequence["Model | None"], model_R: np.ndarray, blobs: Sequence[bytes], labels: Sequence[np.ndarray]
) -> Targets:
    """Targets of rows of several shards, in the order given, their positions one after the other.

    Args:
        models: of the shards; the same policy and vocabulary.
        model_R: whose each row is, int64.
        blobs: see ``decode_rows``.
        labels: see ``decode_rows``.

    Raises:
        SoftLabelError: see ``decode_rows``; or shards of different kinds.
    """
    known = [model for model in models if model is not None]
    if len(known) == len(models):
        from kd_core.softlabels.codec import rows as codec_v3

        return codec_v3.decode_rows(known, model_R, blobs, labels)
    if known:
        return concatenate([decode_rows(models[m], [blob], [gold]) for m, blob, gold in zip(model_R, blobs, labels, strict=True)])
    rows = [codec_v1.decode(blob) for blob in blobs]
    lengths = [len(row.common.gold_logprob_N) for row in rows]
    if lengths != [len(gold) for gold in labels]:
        raise SoftLabelError(f"soft labels of {sum(lengths)} positions for labels of {sum(len(gold) for gold in labels)}")
    return concatenate(list(rows))
