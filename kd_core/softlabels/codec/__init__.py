"""Soft labels of rows as bytes and back: the binary column of a soft-label shard.

A shard has a model (in its Parquet footer) and a blob a row. A blob is decoded with its shard's model and its row's own tokens
(``labels``: the ids at its supervised positions, which the shard holds anyway); its checksum covers all three, so damage and
what does not belong together raise SoftLabelError.

What comes back: ids, counts, dense log-probabilities, normalisers and tails as they were; entropies within 1/128 nat; the gold
log-probability -x within 1/250 + x/60 nat; top-k log-probabilities as levels of p^(1/2Tmax), so fine that the KL
from the kept distribution to the decoded one is about 1e-4 nat on average, at every temperature of the grid. Drawn ids
come back by falling count, the gold id last; top-k ids by falling log-probability. Where T0 is 1 the entropy at T0 is the entropy.

The compiler takes 0.4 s to import: it is imported where rows are coded, not here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd_core.softlabels.targets import Targets

if TYPE_CHECKING:
    from kd_core.softlabels.codec.model import Model

__all__ = ["decode_mixed_rows", "decode_rows", "encode_rows", "parse_model"]


def encode_rows(rows: Sequence[Targets], labels: Sequence[np.ndarray], known: bytes = b"") -> tuple[bytes, list[bytes]]:
    """Make one model and a blob a row of the rows of a shard.

    Args:
        rows: at least one; all of one policy and vocabulary.
        labels: gold ids at each row's supervised positions, int64.
        known: the model of another shard, or nothing: it is this one's too if it serves these rows about as well as one of their own.

    Raises:
        SoftLabelError: rows of different kinds, labels that do not fit them, an id outside the vocabulary or twice at one
            position, draws that do not add up, NaN, or more than 2^20 columns.
    """
    from kd_core.softlabels.codec import rows as codec_rows

    return codec_rows.encode_rows(rows, labels, parse_model(known) if known else None)


def parse_model(data: bytes) -> "Model":
    """Read a shard's model.

    Raises:
        SoftLabelError: not a model, or damaged.
        VersionError: a model of another version.
    """
    from kd_core.softlabels.codec import model as codec_model

    return codec_model.parse_model(data)


def decode_rows(model: "Model", blobs: Sequence[bytes], labels: Sequence[np.ndarray]) -> Targets:
    """Make the targets of rows of one shard, their positions one after the other.

    Args:
        model: the shard's.
        blobs: the rows'.
        labels: gold ids at each row's supervised positions, int64 or int32.

    Raises:
        SoftLabelError: a damaged blob, or one that belongs to other labels or another model.
        VersionError: a blob of another version.
    """
    return decode_mixed_rows([model], np.zeros(len(blobs), np.int64), blobs, labels)


def decode_mixed_rows(models: Sequence["Model"], model_R: np.ndarray, blobs: Sequence[bytes], labels: Sequence[np.ndarray]) -> Targets:
    """Make the targets of rows of several shards, in the order given, their positions one after the other.

    Args:
        models: of the shards; the same policy and vocabulary.
        model_R: index of each row's model, int64.
        blobs: see ``decode_rows``.
        labels: see ``decode_rows``.

    Raises:
        SoftLabelError: see ``decode_rows``; or shards of different kinds.
        VersionError: a blob of another version.
    """
    from kd_core.softlabels.codec import rows as codec_rows

    return codec_rows.decode_rows(models, model_R, blobs, labels)
