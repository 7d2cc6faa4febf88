"""Templates, supervised positions and the one shift: counted exactly, in batches of mixed length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kd_core.errors import SourceError
from kd_core.recipe import CharacterTokenizer, Task
from kd_core.tokens.batches import collate
from kd_core.tokens.encoding import (
    character_tokenizer,
    decode_answer,
    encode_answer,
    encode_gold,
    encode_prompt,
    num_columns,
    tokenizer_identity,
)

SUMS = CharacterTokenizer(kind="characters", alphabet="0123456789+-=,#")
PLAIN = Task(template="plain", verifier="math")
CHAT = Task(template="chat", verifier="math", system="Be brief.")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="[]abcdefghijklmnopqrstuvwxyzBQ.? \n"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_characters_are_tokens_and_decode_back() -> None:
    tokenizer = character_tokenizer(SUMS)
    ids = encode_prompt(tokenizer, "7+5-9=", PLAIN)
    assert ids == [9, 12, 7, 13, 11, 14]
    assert tokenizer.decode(ids) == "7+5-9="
    assert num_columns(tokenizer) == 2 + 15


def test_gold_ends_with_the_end_token_and_decodes_without_it() -> None:
    tokenizer = character_tokenizer(SUMS)
    ids = encode_gold(tokenizer, "3#3")
    assert ids == [5, 16, 5, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3#3"


def test_a_foreign_character_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"cannot encode '7\*5='.*add its characters to teacher\.tokenizer\.alphabet"):
        encode_prompt(character_tokenizer(SUMS), "7*5=", PLAIN)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(SourceError, match="makes no token"):
        encode_prompt(character_tokenizer(SUMS), "", PLAIN)


def test_columns_count_added_tokens_and_gaps() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert num_columns(tokenizer) == 8  # len() would say 2 and cut id 7 off
    tokenizer.add_tokens(["c"])
    assert num_columns(tokenizer) == max(tokenizer.get_vocab().values()) + 1 > 8 - 1


def test_the_chat_template_is_applied_with_the_system_message_and_the_generation_prompt() -> None:
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "why?", CHAT)) == "[system]Be brief.\n[user]why?\n[assistant]"
    without = CHAT.model_copy(update={"system": None})
    assert tokenizer.decode(encode_prompt(tokenizer, "why?", without)) == "[user]why?\n[assistant]"


def test_a_missing_chat_template_is_refused() -> None:
    with pytest.raises(SourceError, match=r"task\.template: chat.*has no chat template"):
        encode_prompt(character_tokenizer(SUMS), "1", CHAT)


def _differing(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> set[str]:
    ours, theirs = vars(tokenizer_identity(a)), vars(tokenizer_identity(b))
    return {name for name in ours if ours[name] != theirs[name]}


def test_identity_of_tokenizers_sees_vocabulary_template_and_end() -> None:
    base, same = chat_tokenizer(), chat_tokenizer()
    assert tokenizer_identity(base) == tokenizer_identity(same)
    same.chat_template = TEMPLATE.replace("[assistant]", "[assistant] ")
    assert _differing(same, base) == {"template"}
    same.add_tokens(["<new>"])
    assert _differing(same, base) == {"template", "vocabulary"}


def test_collate_shifts_once_by_hand() -> None:
    batch = collate([([5, 6, 7, 8], 2), ([9, 4], 1), ([3, 1, 2], 1)])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0], [3, 1, 2, 0]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.predict_BT.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.labels_N.tolist() == [7, 8, 4, 1, 2]


@given(st.lists(st.integers(2, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), min_size=1, max_size=6))
def test_every_supervised_token_is_predicted_from_the_one_before_it(shapes: list[tuple[int, int]]) -> None:
    rows = [([100 * b + t for t in range(n)], first) for b, (n, first) in enumerate(shapes)]
    batch = collate(rows)
    assert batch.predict_BT.sum(1).tolist() == [n - first for n, first in shapes]
    assert (batch.ids_BT[batch.predict_BT] + 1).tolist() == batch.labels_N.tolist()
    assert not (batch.predict_BT & (batch.attention_BT == 0)).any()


@pytest.mark.parametrize("first", [0, 3])
def test_a_row_without_prompt_or_without_answer_is_refused(first: int) -> None:
    with pytest.raises(AssertionError, match="first supervised index"):
        collate([([1, 2, 3], first)])


def thought_tokenizer(*, opens: bool, special: bool) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tags = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags}) if special else tokenizer.add_tokens(tags)
    tokenizer.chat_template = TEMPLATE.replace("[assistant]", "[assistant]<think>\n") if opens else TEMPLATE
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_a_thought_that_the_template_opens_is_opened_once(special: bool) -> None:
    tokenizer = thought_tokenizer(opens=True, special=special)
    prompt_ids = encode_prompt(tokenizer, "why?", CHAT)
    opening = tokenizer.convert_tokens_to_ids("<think>")
    for answer_ids in (
        encode_answer(tokenizer, "<think>\nso\n</think>ok", ended=True, prompt_ids=prompt_ids),
        encode_answer(tokenizer, "<think>\nso\n</think>ok", ended=True),
        encode_answer(tokenizer, "so\n</think>ok", ended=True, prompt_ids=prompt_ids),
        encode_gold(tokenizer, "<think>so\n</think>ok", prompt_ids=prompt_ids),
    ):
        assert [*prompt_ids, *answer_ids].count(opening) == 1
        assert decode_answer(tokenizer, answer_ids, prompt_ids=prompt_ids) == "<think>so\n</think>ok"
    assert decode_answer(tokenizer, encode_gold(tokenizer, "so"), prompt_ids=prompt_ids) == "<think>so"


@pytest.mark.parametrize("special", [False, True])
def test_a_thought_that_the_answer_opens_stays_in_its_text(special: bool) -> None:
    tokenizer = thought_tokenizer(opens=False, special=special)
    for task in (CHAT, PLAIN):
        prompt_ids = encode_prompt(tokenizer, "why?", task)
        answer_ids = encode_gold(tokenizer, "<think>so</think>ok", prompt_ids=prompt_ids)
        assert decode_answer(tokenizer, answer_ids, prompt_ids=prompt_ids) == "<think>so</think>ok"
        assert decode_answer(tokenizer, encode_gold(tokenizer, "ok"), prompt_ids=prompt_ids) == "ok"


def test_a_plain_prompt_opens_no_thought_whatever_the_template_does() -> None:
    tokenizer = thought_tokenizer(opens=True, special=False)
    prompt_ids = encode_prompt(tokenizer, "why?", PLAIN)
    answer_ids = encode_gold(tokenizer, "<think>so</think>ok", prompt_ids=prompt_ids)
    assert decode_answer(tokenizer, answer_ids, prompt_ids=prompt_ids) == "<think>so</think>ok"
