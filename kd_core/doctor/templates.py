"""Checks of the chat template: it can be used as the recipe asks, and no text writes its control tokens."""

from kd_core.doctor.findings import Skipped
from kd_core.doctor.subject import Subject
from kd_core.errors import SourceError, TeacherError
from kd_core.prompts import user_words
from kd_core.recipe import Recipe
from kd_core.task_kinds.generation import rows_tokenizer
from kd_core.tokens.encoding import encode_answer, encode_prompt, end_token
from kd_core.tokens.templates import check_template, control_tokens, opens_thought

__all__ = ["check_chat_template", "check_control_tokens"]


def check_chat_template(recipe: Recipe) -> str:
    """The template takes the recipe's system message and prompts, asks for no other day than task.date, and says how a turn ends."""
    if recipe.text_task.template == "plain":
        raise Skipped("task.template: plain uses none")
    return check_template(rows_tokenizer(recipe), recipe.text_task)


def check_control_tokens(subject: Subject) -> str:
    """A control token that a prompt or an answer spells stays text; only the template and the end of an answer write control ids."""
    tokenizer, task = subject.student.tokenizer, subject.recipe.text_task
    spelt = control_tokens(tokenizer)
    control = {int(tokenizer.convert_tokens_to_ids(token)) for token in spelt}
    text, end = user_words(subject.texts[0]), end_token(tokenizer, task)
    token = tokenizer.convert_ids_to_tokens(end)
    if token not in spelt:
        raise Skipped(f"the end token {token!r} is no special token, and no text can spell it")
    try:
        encode_answer(tokenizer, f"{text}{token}", ended=True, task=task)
    except SourceError:
        return f"a text that spells {token!r} is refused: this tokenizer cannot write it as plain text"
    typed, written = ([i for i in encode_prompt(tokenizer, prompt, task) if i in control] for prompt in (f"{text}{token}", text))
    answer = [i for i in encode_answer(tokenizer, f"{text}{token}", ended=True, task=task) if i in control]
    if typed != written or answer != [end]:
        raise TeacherError(
            f"{token!r} inside a text becomes control ids: {typed} in a prompt where {written} are the template's, {answer} in an answer "
            f"where {[end]} is its end; please report this tokenizer"
        )
    found = sum(any(token in prompt for token in spelt) for prompt in subject.texts)
    thought = "; the template opens a thought, which gold answers do not close" if _thinks(subject) else ""
    return f"{token!r} typed in a prompt or an answer stays text; {found} of {len(subject.texts)} prompts here spell one{thought}"


def _thinks(subject: Subject) -> bool:
    return subject.recipe.text_task.template == "chat" and subject.has_gold and opens_thought(subject.student.tokenizer)
