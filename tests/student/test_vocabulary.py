"""A trimmed tokenizer is a true one: what it was trimmed for it reads alike, and anything else it still reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_core.errors import RecipeError, TeacherError, TrainingError, VersionError
from kd_core.recipe import CharacterTokenizer
from kd_core.student.vocabulary import kept_tokens, trim_model, trim_tokenizer
from kd_core.tokens.encoding import character_tokenizer, num_columns
from kd_core.tokens.token_map import TokenMap, read_token_map, write_token_map

SEEN = ["running together because seven plus eight", "7+5=12"]
UNSEEN = ["electromagnetic counting", "Zoë's \u4e2d\u6587 \U0001f600\n\ttab", "", "99+1= apples"]


def unigram(byte_fallback: bool) -> PreTrainedTokenizerFast:
    """A Unigram as sentencepiece makes them: spaces are part of pieces."""
    spelt = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else list("abcdefghijklmnopqrstuvwxyz0123456789+=")
    longer = ["\u2581running", "\u2581to", "gether", "\u2581together", "\u2581seven", "\u2581eight", "run", "ning", "et", "because"]
    letters = list("\u2581abcdefghijklmnopqrstuvwxyz") if byte_fallback else ["\u2581"]
    pieces = [("<unk>", 0.0), *((piece, -9.0 - i / 100) for i, piece in enumerate([*spelt, *letters]))]
    pieces += [*((piece, -2.0 - i / 10) for i, piece in enumerate(longer)), ("</s>", -99.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()] if byte_fallback else [decoders.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", len(pieces) - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def spelt_in_bytes() -> PreTrainedTokenizerFast:
    """A BPE with bytes to fall back to, added tokens in front and behind, and merges that make one token in two ways."""
    longer = ["ab", "bc", "abc", "de", "def", "fg", "zz", "<s>"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefgz", *longer]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("d", "e"), ("de", "f"), ("f", "g"), ("z", "z")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.RobertaProcessing(("<s>", vocab["<s>"]), ("<s>", vocab["<s>"]), trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return tokenizer


def trimmed(full: Any, texts: list[str], **options: int) -> tuple[Any, TokenMap]:
    seen = {i for text in texts for i in full.encode(text, add_special_tokens=False)}
    token_map = kept_tokens(full, seen, **options)
    return trim_tokenizer(full, token_map), token_map


def restored(tokenizer: Any, token_map: TokenMap, text: str, **options: bool) -> list[int]:
    found: list[int] = token_map.restore(np.array(tokenizer.encode(text, **options), np.int64)).tolist()
    return found


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("make", "texts", "removed"),
    [
        (None, SEEN, "electromagnetic"),
        (lambda: unigram(byte_fallback=False), ["running together 7+5"], "\u2581seven"),
        (lambda: unigram(byte_fallback=True), ["running together"], "\u2581seven"),
        (spelt_in_bytes, ["abc defg"], "zz"),
    ],
)
def test_texts_are_read_alike_and_others_still_are_read(make: Any, texts: list[str], removed: str, special: bool, bpe_tokenizer) -> None:
    full = bpe_tokenizer if make is None else make()
    small, token_map = trimmed(full, texts)
    assert removed in full.get_vocab() or full.tokenize(f" {removed}") != small.tokenize(f" {removed}")
    assert removed not in small.get_vocab()
    assert len(token_map.kept) == num_columns(small) < num_columns(full) == token_map.num_full
    for text in texts:
        assert restored(small, token_map, text, add_special_tokens=special) == full.encode(text, add_special_tokens=special)
    for text in [*texts, *UNSEEN, removed]:
        there_and_back = [t.decode(t.encode(text, add_special_tokens=special)) for t in (small, full)]
        assert there_and_back[0] == there_and_back[1]


@settings(max_examples=40, deadline=None)
@given(seen=st.lists(st.text(max_size=12), max_size=4), text=st.text(max_size=40))
def test_any_text_survives_and_what_was_seen_is_segmented_as_before(bpe_tokenizer, seen: list[str], text: str) -> None:
    small, token_map = trimmed(bpe_tokenizer, [*seen, *SEEN])
    assert small.decode(small.encode(text), clean_up_tokenization_spaces=False) == text
    for known in [*seen, *SEEN]:
        assert restored(small, token_map, known) == bpe_tokenizer.encode(known)


def test_every_kept_token_can_be_made(bpe_tokenizer) -> None:
    """Each kept token that merges make is joined, by a kept merge, from kept tokens; nothing is kept without need."""
    small, token_map = trimmed(bpe_tokenizer, [" electromagnetic"])
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    made = {a + b for a, b in model["merges"]}
    full = json.loads(bpe_tokenizer.backend_tokenizer.to_str())["model"]
    of_merges = {a + b for a, b in full["merges"]}
    assert made == of_merges & model["vocab"].keys()
    assert all("electromagnetic".find(token.lstrip("\u0120")) >= 0 for token in made)
    assert len(token_map.kept) == 3 + 256 + len(made)


def test_both_ways_to_make_a_token_are_kept() -> None:
    """'abc' is a + bc or ab + c; which one a text takes depends on its neighbours."""
    small, _ = trimmed(spelt_in_bytes(), ["abc"])
    assert {"ab", "bc", "abc"} <= small.get_vocab().keys()
    assert not {"zz", "z", "de"} & small.get_vocab().keys()


def test_common_tokens_may_be_kept_too(bpe_tokenizer) -> None:
    full = json.loads(bpe_tokenizer.backend_tokenizer.to_str())["model"]
    small, token_map = trimmed(bpe_tokenizer, SEEN, num_common=60)
    assert {a + b for a, b in full["merges"][:60]} <= small.get_vocab().keys()
    assert len(token_map.kept) > len(trimmed(bpe_tokenizer, SEEN)[1].kept)
    likely = trimmed(unigram(byte_fallback=False), ["7"], num_common=4)[0]
    assert "\u2581running" in likely.get_vocab()
    assert "because" not in likely.get_vocab()


def test_plain_transformers_loads_it_with_its_template(bpe_tokenizer, tmp_path: Path) -> None:
    small, token_map = trimmed(bpe_tokenizer, SEEN)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "seven plus eight"}]
    prompts = [t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (loaded, bpe_tokenizer)]
    assert prompts[0] == prompts[1]
    assert restored(loaded, token_map, prompts[0]) == bpe_tokenizer.encode(prompts[0])
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|end|>")
    assert loaded.decode(loaded.encode("seven<|end|>"), skip_special_tokens=True) == "seven"


def test_the_map_is_written_and_read_back(tmp_path: Path) -> None:
    token_map = TokenMap((0, 2, 5), 7, "abc")
    assert read_token_map(tmp_path) is None
    write_token_map(token_map, tmp_path)
    assert read_token_map(tmp_path) == token_map
    assert token_map.trim(np.array([[5, 0], [2, 2]])).tolist() == [[2, 0], [1, 1]]
    with pytest.raises(TrainingError, match="token id 4 is not in the student's trimmed vocabulary"):
        token_map.trim(np.array([0, 4]))
    (tmp_path / "token_map.json").write_text('{"version": 2}')
    with pytest.raises(VersionError, match="a token map of version 2; this code reads version 1; update the package, or"):
        read_token_map(tmp_path)


def test_other_kinds_of_tokenizer_are_refused_by_name() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    for tokenizer, kind in (
        (character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789+-=,#")), "WordLevel"),
        (PreTrainedTokenizerFast(tokenizer_object=wordpiece, eos_token="[UNK]"), "WordPiece"),
    ):
        with pytest.raises(RecipeError, match=f"the tokenizer is a {kind}, and only a BPE or a Unigram can spell what was removed"):
            kept_tokens(tokenizer, [1])


def test_a_tokenizer_that_merges_make_of_two_trainings_is_read_alike() -> None:
    """Suffixed BPE of old: 'low</w>' is another token than 'low'."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(["low lower lowest slow slower"] * 9, trainer)
    full = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>", unk_token="<unk>")
    small, token_map = trimmed(full, ["slow low"])
    assert restored(small, token_map, "slow low") == full.encode("slow low")
    assert "lowest</w>" in full.get_vocab()
    assert "lowest</w>" not in small.get_vocab()


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("tied", [False, True])
def test_a_trimmed_model_says_of_kept_tokens_what_the_whole_one_says(bpe_tokenizer, tied: bool) -> None:
    torch.manual_seed(0)
    num = num_columns(bpe_tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=num + 4, tie_word_embeddings=tied, bos_token_id=num + 2, eos_token_id=[0, 2], pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    small, token_map = trimmed(bpe_tokenizer, SEEN)
    ids = torch.tensor([bpe_tokenizer.encode(SEEN[0])])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        before = sum(p.numel() for p in model.parameters())
        trim_model(model, token_map)
        ours = model(input_ids=torch.tensor([small.encode(SEEN[0])])).logits
    assert torch.equal(ours, whole[:, :, torch.from_numpy(token_map.full_ids)])
    assert before - sum(p.numel() for p in model.parameters()) == (num + 4 - len(token_map.kept)) * 16 * (1 if tied else 2)
    assert model.config.vocab_size == len(token_map.kept)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    trimmed_ids = token_map.trim(np.array([0, 2])).tolist()
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (trimmed_ids, trimmed_ids)
    assert model.config.bos_token_id is None, "no token has this id, so none can stand for it"


def test_a_model_with_fewer_rows_than_ids_is_refused(bpe_tokenizer) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=None, eos_token_id=0, **sizes))
    with pytest.raises(TeacherError, match=r"the tokenizer has token id 4\d\d, and the model only 300 rows"):
        trim_model(model, kept_tokens(bpe_tokenizer, [419]))
