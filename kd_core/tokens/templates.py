"""Chat templates: rendered with a stated date, and asked what they write around a turn.

A template is a program that somebody else wrote. It may refuse a system message or leave it out, read the clock, fail, end a turn
in another token than the tokenizer's end token, or open a thought for the model. Each is found here, before a teacher is paid.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_core.curate import thoughts
from kd_core.errors import RecipeError, SourceError
from kd_core.prompts import messages_of, turns_of, user_words
from kd_core.recipe import Task

__all__ = ["THOUGHT", "check_template", "control_tokens", "end_of_turn", "opens_thought", "render", "template_ids"]

THOUGHT = ("<think>", "</think>")
"""What stands around a model's thought, in answers of servers and in templates that open a thought for the model."""
_NO_CLOCK = "this template asks for today's date"
_CODES = ["-d", "-m", *"aAbBcdDeFHIjmMpSTuUwWxXyY"]
"""Codes of strftime that a template may use."""
_SOME_DAY = datetime.date(2000, 1, 1)  # what a turn ends in does not depend on the day
_PROBE, _SYSTEM_PROBE, _ANSWER_PROBE = "Kdprompt", "Kdsystem", "Kdanswer"


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task) -> str:
    """A prompt as the chat template words it, up to where the answer begins.

    Raises:
        SourceError: the tokenizer has no chat template, or it refuses a prompt's turns or leaves one out.
        RecipeError: the template refuses the system message, asks for a date that task.date does not state, or fails.
    """
    messages = messages_of(prompt, task)
    try:
        text = str(_apply(tokenizer, messages, task.date, add_generation_prompt=True, tokenize=False))
    except (SourceError, RecipeError):
        raise
    except Exception as error:  # whatever the template's author wrote
        raise _refusal(tokenizer, task, error, prompt) from error
    if len(turns_of(prompt)) > 1 and (lost := next((m["role"] for m in messages if not _is_written(m["content"], text)), None)):
        raise _refused_turns(prompt, f"leaves a turn of role {lost} out without a word")
    return text


def _takes(tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task) -> bool:
    """Whether the template words a prompt."""
    try:
        _apply(tokenizer, messages_of(prompt, task), task.date or _SOME_DAY, add_generation_prompt=True, tokenize=False)
    except Exception:  # whatever the template's author wrote
        return False
    return True


def _is_written(content: str, text: str) -> bool:
    """Whether a template's text holds a turn: trimmed, without the thought of an earlier answer, or as JSON, as some word it."""
    said = content.rpartition(THOUGHT[1])[2].strip()
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def _refused_turns(prompt: str, what: str) -> SourceError:
    turns = turns_of(prompt)
    roles = ", ".join(turn.role for turn in turns[:8]) + (" ..." if len(turns) > 8 else "")
    return SourceError(
        f"the prompt of {len(turns)} turns ({roles}) whose user says {user_words(prompt)[:60]!r}: the model's chat template {what}; "
        "correct or remove such rows"
    )


def template_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task) -> list[int]:
    """Token ids of ``render`` for texts that spell control tokens: those the template writes are control ids, those of the texts are not.

    Raises:
        SourceError: this tokenizer cannot spell them.
    """
    return literal_ids(tokenizer, messages_of(prompt, task), task.date, add_generation_prompt=True)


def literal_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], date: datetime.date | None, **options: Any
) -> list[int]:
    """Token ids of messages whose texts spell control tokens, which stay text."""
    try:
        ids = _apply(tokenizer, messages, date, tokenize=True, return_dict=False, sanitize_control_tokens=True, **options)
    except Exception as error:  # the tokenizers library raises bare Exception, transformers three others
        raise SourceError(
            f"{messages[-1]['content'][:60]!r} spells a control token, and this tokenizer ({type(tokenizer).__name__}) cannot write it as "
            f"plain text: {error}; remove such rows"
        ) from error
    return [int(i) for i in ids]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], date: datetime.date | None, **options: Any) -> Any:
    template = options.pop("chat_template", None) or _template(tokenizer)
    if "strftime_now" in template:
        template = _clock(date) + template
    return tokenizer.apply_chat_template(list(messages), chat_template=template, **options)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise SourceError("task.template: chat, and this model's tokenizer has no chat template; use task.template: plain")
    return str(tokenizer.get_chat_template())


def _clock(date: datetime.date | None) -> str:
    """A macro in front of a template that stands where transformers puts the clock: the stated day, or a refusal.

    The empty expression at its end keeps a line break with which the template may begin.
    """
    body = f"{{{{ raise_exception({_NO_CLOCK!r}) }}}}"
    if date is not None:
        body = "{{ format" + "".join(f' | replace("%{code}", "{date.strftime("%" + code)}")' for code in _CODES) + " }}"
    return "{% macro strftime_now(format) %}" + body + "{% endmacro %}{{ '' }}"


def _refusal(tokenizer: PreTrainedTokenizerBase, task: Task, error: Exception, prompt: str = _PROBE) -> RecipeError | SourceError:
    """What a template's failure means for the recipe."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if _NO_CLOCK in said:
        return RecipeError(
            "task.date: the chat template writes the clock's date into every prompt, so tokens would change with the day of the run; "
            "state the day it shall write, for example task.date: 2026-01-01"
        )
    if len(turns_of(prompt)) > 1 and _takes(tokenizer, _PROBE, task):
        return _refused_turns(prompt, f"refuses it: {said}")
    if task.system is not None and _takes(tokenizer, _PROBE, task.model_copy(update={"system": None})):
        return RecipeError(f"task.system: the chat template takes no system message ({said}); leave it out, or put it into the prompts")
    return RecipeError(
        f"task.template: chat, and the chat template of this tokenizer fails: {type(error).__name__}: {said}; use task.template: plain, or "
        "mend the template"
    )


@lru_cache(maxsize=8)
def _control(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[str]:
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(t.content for t in added if t.special or (t.content in template and not t.content.isspace()))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Texts that the tokenizer reads as control ids: special tokens, and added ones that its template writes."""
    return _control(tokenizer, str(tokenizer.get_chat_template()) if tokenizer.chat_template else "")


@lru_cache(maxsize=8)
def _around(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """(what the template writes before an answer, what it writes after one)."""
    user = {"role": "user", "content": _PROBE}
    before = str(_apply(tokenizer, [user], _SOME_DAY, add_generation_prompt=True, tokenize=False)).rpartition(_PROBE)[2]
    whole = str(_apply(tokenizer, [user, {"role": "assistant", "content": _ANSWER_PROBE}], _SOME_DAY, tokenize=False))
    _, found, after = whole.rpartition(_ANSWER_PROBE)
    return before, after if found else ""  # a template of prompts alone says nothing of how an answer ends


def _turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    try:
        return _around(tokenizer, _template(tokenizer))
    except (SourceError, RecipeError):
        raise
    except Exception as error:  # whatever the template's author wrote
        raise _refusal(tokenizer, Task(template="chat", verifier="exact"), error) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the template ends an assistant's turn; the tokenizer's end token where it writes none there.

    Raises:
        SourceError, RecipeError: there is no template, or it fails.
    """
    after = _turn(tokenizer)[1].lstrip()
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    token = next((token for token in longest_first if after.startswith(token)), None)
    return int(tokenizer.eos_token_id if token is None else tokenizer.convert_tokens_to_ids(token))


def opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template's generation prompt opens a thought, so that an answer goes on inside it.

    Raises:
        SourceError, RecipeError: there is no template, or it fails.
    """
    return thoughts.opens_thought(_turn(tokenizer)[0])


def check_template(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """Render a probe and describe the template.

    Raises:
        SourceError, RecipeError: see ``render``; or a text is left out without a word.
    """
    if task.template == "plain":
        return "plain: no template"
    probe = task.model_copy(update={"system": None if task.system is None else _SYSTEM_PROBE})
    render(tokenizer, _PROBE, task)
    text = render(tokenizer, _PROBE, probe)
    for field, wanted in (("task.system", _SYSTEM_PROBE if task.system is not None else ""), ("task.template", _PROBE)):
        if wanted not in text:
            what = "system message" if field == "task.system" else "prompt"
            raise RecipeError(f"{field}: the chat template leaves the {what} out without a word; use a model whose template writes it")
    token = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    clock = f", dated {task.date}" if task.date is not None else ""
    thought = ", opens a thought for the model" if opens_thought(tokenizer) else ""
    return f"the template takes {'a' if task.system is not None else 'no'} system message, ends a turn with {token!r}{thought}{clock}"
