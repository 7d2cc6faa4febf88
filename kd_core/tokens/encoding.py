"""Text to token ids, supervised positions, and the one place that shifts.

Axes: B rows of a batch, T positions, N supervised positions of the whole batch (row by row, left to right).

The teacher's answer ids are stored and trained on as they were sampled; text is never tokenised again on the way from
teacher to student. ``first_supervised`` is the index of the first answer token; the logits that predict token t stand
at t-1, and ``collate`` alone knows it.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd_core.curate.thoughts import continue_thought, is_thought_tag, opens_thought, without_opening
from kd_core.errors import SourceError
from kd_core.fingerprint import fingerprint
from kd_core.recipe import CharacterTokenizer, Task

__all__ = ["character_tokenizer", "decode_answer", "encode_answer", "encode_gold", "encode_prompt", "num_columns", "tokenizer_identity"]

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


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes two tokenizers the same: vocabulary, behaviour on a probe text, template and special ids."""
    probe = "Zoë's 3 + 14 = 17\n\tif x != y: return [1, 2]  # ok\u4e2d\u6587"
    try:
        probe_ids = list(tokenizer.encode(probe, add_special_tokens=False))
    except Exception:  # a closed vocabulary (characters) refuses foreign text, and that is all there is to know
        probe_ids = []
    return {
        "vocabulary": fingerprint({token: int(i) for token, i in tokenizer.get_vocab().items()}),
        "probe": fingerprint([int(i) for i in probe_ids]),
        "template": fingerprint(getattr(tokenizer, "chat_template", None) or ""),
        "eos": tokenizer.eos_token_id,
    }


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task) -> list[int]:
    """Token ids after which the answer begins.

    Raises:
        SourceError: the prompt has characters the tokenizer does not know, or the tokenizer has no chat template.
    """
    if task.template == "plain":
        return _encode(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise SourceError("task.template: chat, and this model's tokenizer has no chat template; use task.template: plain")
    messages = [{"role": "user", "content": prompt}]
    if task.system is not None:
        messages.insert(0, {"role": "system", "content": task.system})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise SourceError(
            f"the tokenizer cannot encode {text[:60]!r}: {error}; add its characters to teacher.tokenizer.alphabet"
        ) from error
    if not ids:
        raise SourceError(f"the tokenizer makes no token of {text[:60]!r}; remove such prompts")
    return ids


def encode_gold(tokenizer: PreTrainedTokenizerBase, answer: str, *, prompt_ids: Sequence[int] | None = None) -> list[int]:
    """Token ids of a worked gold answer, with the end token; see ``encode_answer``."""
    return encode_answer(tokenizer, answer, ended=True, prompt_ids=prompt_ids)


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, ended: bool, prompt_ids: Sequence[int] | None = None) -> list[int]:
    """Token ids of an answer that is known as text only.

    Args:
        tokenizer: the model's.
        answer: the text.
        ended: False for one that was cut off: it gets no end token.
        prompt_ids: what it follows; None: the tokenizer's own generation prompt. A thought that this opens is not opened
            again by the answer.
    """
    answer = without_opening(answer, opened=_prompt_opens_thought(tokenizer, prompt_ids))
    return [*_encode(tokenizer, answer), *([int(tokenizer.eos_token_id)] if ended else [])]


def decode_answer(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], *, prompt_ids: Sequence[int]) -> str:
    """Text of a generated answer without special tokens, its thought opened where the prompt has opened it.

    Thought tags stay even where the tokenizer holds them special, so that a thought is never taken for an answer.
    """
    special = {int(i) for i in tokenizer.all_special_ids}
    tags = {i for i in special if is_thought_tag(str(tokenizer.convert_ids_to_tokens(i)))}
    kept = [i for i in answer_ids if i not in special or i in tags]
    text = tokenizer.decode(kept, skip_special_tokens=not tags)
    return continue_thought(text, opened=_prompt_opens_thought(tokenizer, prompt_ids))


def _prompt_opens_thought(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] | None) -> bool:
    if prompt_ids is not None:
        return opens_thought(tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:])))
    if not tokenizer.chat_template:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False)
    return opens_thought(str(text))
