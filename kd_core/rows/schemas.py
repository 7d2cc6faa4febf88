"""Columns of the row stores: what is kept of an answer, of soft labels, of hidden states. Importable without torch.

Plain columns stand beside the one binary column, so that a query engine answers from them where they lie.
"""

import pyarrow as pa

__all__ = ["ANSWER_SCHEMA", "CODEC_MODEL", "CURATED_SCHEMA", "HIDDEN_STATE_SCHEMA", "ROW_TABLES", "SOFT_LABEL_SCHEMA"]

CODEC_MODEL = b"kd.codec_model"
"""Key in the footer of a soft-label shard under which the codec's model is, that decodes its targets."""

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("answer_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

_SCORED_ROW = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("sample_index", pa.int32()),
    pa.field("source", pa.string(), nullable=False),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("ids", pa.list_(pa.int32()), nullable=False),
    pa.field("first_supervised", pa.int32(), nullable=False),
    pa.field("num_supervised", pa.int32(), nullable=False),
]

SOFT_LABEL_SCHEMA = pa.schema(
    [
        *_SCORED_ROW,
        pa.field("mean_entropy", pa.float32(), nullable=False),
        pa.field("mean_gold_logprob", pa.float32(), nullable=False),
        pa.field("min_gold_logprob", pa.float32(), nullable=False),
        pa.field("targets", pa.binary(), nullable=False),
    ]
)

HIDDEN_STATE_SCHEMA = pa.schema([*_SCORED_ROW, pa.field("states", pa.binary(), nullable=False)])

ROW_TABLES = {"answers": ANSWER_SCHEMA, "soft_labels": SOFT_LABEL_SCHEMA, "hidden_states": HIDDEN_STATE_SCHEMA}
"""Columns of the rows of each table."""

CURATED_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # 'teacher' or 'gold'
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("first_supervised", pa.int32(), nullable=False),
    ]
)
"""A row that a student learns from, or is validated on."""
