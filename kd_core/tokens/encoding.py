"""Text to token ids.

The teacher's answer ids are stored and trained on as they were sampled; text is never tokenised again on the way from
teacher to student. A control token that a user, a system message or an answer spells stays text: control ids come from the
template, and the last one of an answer from its end. Only thought marks (``templates.THOUGHT``) in an answer are what they say.
"""

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd_core.curate import thoughts
from kd_core.errors import SourceError
from kd_core.fingerprint import fingerprint
from kd_core.prompts import messages_of, turns_of
from kd_core.recipe import CharacterTokenizer, Task
from kd_core.summaries import TokenizerIdentity
from kd_core.tokens.templates import THOUGHT, control_tokens, end_of_turn, literal_ids, opens_thought, render, template_ids

__all__ = [
    "character_tokenizer",
    "decode_answer",
    "encode_answer",
    "encode_gold",
    "encode_prompt",
    "end_token",
    "num_columns",
    "tokenizer_identity",
]

PAD, EOS = "<pad>", "<eos>"
_TAIL_TOKENS = 32  # of a prompt: enough for a thought tag and white space, at one token a character


def character_tokenizer(spec: CharacterTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character; <pad> is 0, <eos> is 1. An unknown character is an error, not <unk>."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *spec.alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False)


def num_columns(tokenizer: PreTrainedTokenizerBase) -> int:
    """Valid columns of the logits: the largest token id + 1, added tokens included.

    Models pad their vocabulary to round numbers; teacher and student are both cut to this number *before* they are
    normalised, or probability leaks to ids that no text can have.
    """
    return int(max(tokenizer.get_vocab().values())) + 1


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> TokenizerIdentity:
    """What makes two tokenizers the same: vocabulary, behaviour on a probe text, template and special ids."""
    probe = "Zoë's 3 + 14 = 17\n\tif x != y: return [1, 2]  # ok\u4e2d\u6587"
    try:
        probe_ids = list(tokenizer.encode(probe, add_special_tokens=False))
    except Exception:  # a closed vocabulary (characters) refuses foreign text, and that is all there is to know
        probe_ids = []
    return TokenizerIdentity(
        vocabulary=fingerprint({token: int(i) for token, i in tokenizer.get_vocab().items()}),
        probe=fingerprint([int(i) for i in probe_ids]),
        template=fingerprint(getattr(tokenizer, "chat_template", None) or ""),
        eos=tokenizer.eos_token_id,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task) -> list[int]:
    """Token ids after which the answer begins.

    Args:
        tokenizer: of the model that answers.
        prompt: a text, or turns as ``kd_core.prompts.turns`` keeps them.
        task: template, and the system message of prompts that have none of their own.

    Raises:
        SourceError: the prompt has characters the tokenizer does not know, or the tokenizer has no chat template.
        RecipeError: the chat template cannot be used as the recipe asks; see ``templates.render``.
    """
    if task.template == "plain":
        turns = turns_of(prompt)
        assert len(turns) == 1, "prompts of several turns are refused where they are read"
        return _encode(tokenizer, turns[0].content)
    text = render(tokenizer, prompt, task)
    if any(_spells(tokenizer, message["content"]) for message in messages_of(prompt, task)):
        return template_ids(tokenizer, prompt, task)
    return _plain_ids(tokenizer, text)


def encode_gold(
    tokenizer: PreTrainedTokenizerBase, answer: str, task: Task | None = None, *, prompt_ids: Sequence[int] | None = None
) -> list[int]:
    """Token ids of a worked gold answer, with its end; see ``encode_answer``."""
    return encode_answer(tokenizer, answer, ended=True, task=task, prompt_ids=prompt_ids)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, answer: str, *, ended: bool, task: Task | None = None, prompt_ids: Sequence[int] | None = None
) -> list[int]:
    """Token ids of an answer that is known as text only; one that was cut off (``ended`` is False) gets no end.

    Args:
        tokenizer: of the model that learns it.
        answer: its text. Where a thought is open already, an opening mark in front of it would stand there twice and is left out.
        ended: whether the answer came to its end.
        task: see ``end_token``.
        prompt_ids: what it follows; None: the template's generation prompt.
    """
    answer = thoughts.without_opening(answer, opened=_opens_thought(tokenizer, task, prompt_ids))
    ids = [i for piece in _between_thoughts(tokenizer, answer) for i in piece]
    return [*ids, *([end_token(tokenizer, task)] if ended else [])]


def end_token(tokenizer: PreTrainedTokenizerBase, task: Task | None = None) -> int:
    """The token that ends an answer: the template's end of turn in a chat, else the tokenizer's end token.

    Without a task, a tokenizer that has a chat template is taken to be used with it.
    """
    return end_of_turn(tokenizer) if _is_chat(tokenizer, task) else int(tokenizer.eos_token_id)


def _is_chat(tokenizer: PreTrainedTokenizerBase, task: Task | None) -> bool:
    return bool(tokenizer.chat_template) if task is None else task.template == "chat"


def _spells(tokenizer: PreTrainedTokenizerBase, text: str, *, besides: tuple[str, ...] = ()) -> bool:
    """Whether a text holds what the tokenizer would read as a control id."""
    return any(token in text for token in control_tokens(tokenizer) if token not in besides)


def _between_thoughts(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[list[int]]:
    """Ids of an answer in pieces: one, or where it spells a control token the marks of thoughts and what stands between them."""
    vocabulary = control_tokens(tokenizer).intersection(THOUGHT)
    if not _spells(tokenizer, answer, besides=THOUGHT) or not vocabulary:
        return [_encode(tokenizer, answer, besides=THOUGHT)]
    pieces = [piece for piece in re.split(f"({'|'.join(map(re.escape, sorted(vocabulary)))})", answer) if piece]
    return [[int(tokenizer.convert_tokens_to_ids(piece))] if piece in vocabulary else _encode(tokenizer, piece) for piece in pieces]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, besides: tuple[str, ...] = ()) -> list[int]:
    """Ids of a text without a template; control tokens in it are text, but for those in ``besides``."""
    if _spells(tokenizer, text, besides=besides):
        message = {"role": "user", "content": text}
        return literal_ids(tokenizer, [message], None, chat_template="{{ messages[0]['content'] }}")
    ids = _plain_ids(tokenizer, text)
    if not ids:
        raise SourceError(f"the tokenizer makes no token of {text[:60]!r}; remove such prompts")
    return ids


def decode_answer(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], *, prompt_ids: Sequence[int]) -> str:
    """Text of a generated answer without special tokens, its thought opened where the prompt has opened it.

    Thought tags stay even where the tokenizer holds them special, so that a thought is never taken for an answer.
    """
    special = {int(i) for i in tokenizer.all_special_ids}
    tags = {i for i in special if thoughts.is_thought_tag(str(tokenizer.convert_ids_to_tokens(i)))}
    kept = [i for i in answer_ids if i not in special or i in tags]
    text = tokenizer.decode(kept, skip_special_tokens=not tags)
    return thoughts.continue_thought(text, opened=_opens_thought(tokenizer, None, prompt_ids))


def _opens_thought(tokenizer: PreTrainedTokenizerBase, task: Task | None, prompt_ids: Sequence[int] | None) -> bool:
    """Whether an answer begins inside a thought: its prompt says so, else the template."""
    if prompt_ids is not None:
        return thoughts.opens_thought(str(tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]))))
    return _is_chat(tokenizer, task) and opens_thought(tokenizer)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise SourceError(
            f"the tokenizer cannot encode {text[:60]!r}: {error}; add its characters to teacher.tokenizer.alphabet"
        ) from error
