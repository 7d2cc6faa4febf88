"""Prompts: read from sources, cleaned, without duplicates, split by hash, decontaminated against every benchmark."""

from kd_core.prompts.collect import PromptSet, collect_gold, collect_prompts
from kd_core.prompts.inputs import INPUTS_FILE, Inputs, InputsWriter
from kd_core.prompts.rows import PROMPT_SCHEMA, PromptRow
from kd_core.prompts.sources import estimate_rows, source_identity
from kd_core.prompts.turns import Turn, messages_of, shown, turns_of, user_words

__all__ = [
    "INPUTS_FILE",
    "PROMPT_SCHEMA",
    "Inputs",
    "InputsWriter",
    "PromptRow",
    "PromptSet",
    "Turn",
    "collect_gold",
    "collect_prompts",
    "estimate_rows",
    "messages_of",
    "shown",
    "source_identity",
    "turns_of",
    "user_words",
]
