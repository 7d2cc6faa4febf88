"""The row of a prompt: as a source gives it, and as every later stage reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import pyarrow as pa

from kd_core.prompts.cleaning import Side
from kd_core.prompts.turns import Turn

__all__ = ["PROMPT_SCHEMA", "PromptRow", "RawRow", "to_table"]


@dataclass(frozen=True, slots=True)
class RawRow:
    """What a source says, before cleaning; `at` names file and line for messages.

    A prompt is a text, or the turns of a chat; where it is an image, that is `media`.
    """

    at: str
    prompt: str | tuple[Turn, ...] | None
    gold: str | None
    reference: str | None
    media: bytes | None = None

    @property
    def prompt_texts(self) -> tuple[str, ...]:
        """The prompt's text, or those of its turns."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(turn.content for turn in self.prompt or ())

    @property
    def prompt_characters(self) -> int:
        """Length of the prompt's texts."""
        return sum(map(len, self.prompt_texts))


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt.

    Attributes:
        prompt_id: 32 hex over the normalised prompt.
        prompt: the cleaned text, or the cleaned turns of a chat as ``kd_core.prompts.turns`` keeps them; of an image the SHA-256 of its
            file, 64 hex digits.
        gold: the worked gold answer, or None.
        reference: the final answer to verify against, or None.
        split: the side it falls on, by hash of its text.
        source: 'file:train.jsonl', 'dataset:openai/gsm8k' or 'reasoning_gym:chain_sum'.
    """

    prompt_id: str
    prompt: str
    gold: str | None
    reference: str | None
    split: Side
    source: str


PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("gold", pa.string()),
        pa.field("reference", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


def to_table(rows: Iterable[PromptRow]) -> pa.Table:
    """Rows as a table of PROMPT_SCHEMA, sorted by prompt_id."""
    ordered = sorted(rows, key=lambda row: row.prompt_id)
    columns = {field.name: [getattr(row, field.name) for row in ordered] for field in fields(PromptRow)}
    return pa.table(columns, schema=PROMPT_SCHEMA)
