"""A smaller tokenizer and smaller embeddings that read the given texts exactly as the full ones do.

Owns what is kept beside the ids that occur, the rewriting of a tokenizer, and the cutting of a model's rows. A BPE keeps
with every token the tokens that its merges join, so each kept token can still be made; as all merges that the full
tokenizer applied to a text are among the kept ones, and it takes the first that applies, the trimmed one takes the same
(by induction over merges). A Unigram's best path stays the best of fewer. Both are checked on all texts all the same.
Any text stays readable: tokens that no merge makes (the bytes of a byte-level BPE) are kept, or the bytes to fall back to.
It refuses other kinds of tokenizer, in which a removed token leaves a hole that nothing else can spell.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_core.errors import RecipeError, TeacherError
from kd_core.store.scratch import scratch
from kd_core.teacher.loaders import Place, read_tokenizer
from kd_core.tokens.encoding import num_columns, tokenizer_identity
from kd_core.tokens.token_map import TokenMap

__all__ = ["kept_tokens", "trim_model", "trim_tokenizer"]

_SPACE = "\u2581"  # as sentencepiece writes it
_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_IDS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
)


def kept_tokens(tokenizer: PreTrainedTokenizerBase, seen: Iterable[int], *, num_common: int = 0) -> TokenMap:
    """Find what is kept of a tokenizer: ids seen, special and added tokens, whatever spells any text, and what makes all of these.

    Args:
        tokenizer: a BPE or a Unigram.
        seen: ids that occur.
        num_common: also the results of a BPE's first merges, or a Unigram's most likely pieces: so many.

    Raises:
        RecipeError: another kind of tokenizer.
    """
    state = _state(tokenizer)
    added = {int(token["id"]) for token in state["added_tokens"]} | {int(i) for i in tokenizer.all_special_ids}
    kept = {*seen, *added}
    model = state["model"]
    if model["type"] == "BPE":
        kept = _closed(model, kept, num_common)
    else:
        kept |= _unigram_base(model)
        likely = sorted(range(len(model["vocab"])), key=lambda i: (-model["vocab"][i][1], i))
        kept |= set(likely[:num_common])
    return TokenMap(tuple(sorted(kept)), num_columns(tokenizer), tokenizer_identity(tokenizer).vocabulary)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json of a tokenizer that can be trimmed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = type(tokenizer).__name__ if backend is None else state["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise RecipeError(
            f"student.vocabulary: the tokenizer is a {kind}, and only a BPE or a Unigram can spell what was removed; leave vocabulary out"
        )
    return state


def _closed(model: dict[str, Any], wanted: set[int], num_common: int) -> set[int]:
    """Add to every token of a BPE all tokens that its merges join, down to those that no merge makes."""
    vocab: dict[str, int] = model["vocab"]
    parents: dict[int, list[int]] = {}
    merges = _merges(model)
    for a, b, made in merges:
        parents.setdefault(vocab[made], []).extend((vocab[a], vocab[b]))
    base = {vocab[token] for token in _byte_tokens(vocab)} if model["byte_fallback"] else set(vocab.values()) - parents.keys()
    unknown = {vocab[model["unk_token"]]} if model["unk_token"] in vocab else set()
    kept, waiting = set[int](), [*wanted, *base, *unknown, *(vocab[made] for _, _, made in merges[:num_common])]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += parents.get(token, ())
    return kept


def _merges(model: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List (left, right, what they make) of a BPE's merges, in their order."""
    prefix = len(model["continuing_subword_prefix"] or "")
    return [(a, b, a + b[prefix:]) for a, b in model["merges"]]


def _byte_tokens(vocab: Iterable[str]) -> set[str]:
    """Find what a tokenizer falls back to, and the mark of a space, which would not come back as a space from its bytes."""
    return {_SPACE, *(f"<0x{byte:02X}>" for byte in range(256))}.intersection(vocab)


def _unigram_base(model: dict[str, Any]) -> set[int]:
    pieces = [piece for piece, _ in model["vocab"]]
    base = _byte_tokens(pieces) if model["byte_fallback"] else {piece for piece in pieces if len(piece) == 1}
    found = {i for i, piece in enumerate(pieces) if piece in base}
    return found if model["unk_id"] is None else {*found, int(model["unk_id"])}


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, token_map: TokenMap) -> PreTrainedTokenizerBase:
    """A tokenizer of the kept tokens alone, under their trimmed ids; template, special tokens and the rest are the full one's.

    Raises:
        TeacherError: the library gave other ids than the map's.
    """
    state, place = _state(tokenizer), {full: trimmed for trimmed, full in enumerate(token_map.kept)}
    model = state["model"]
    if model["type"] == "BPE":
        vocab = {token: place[i] for token, i in model["vocab"].items() if i in place}
        model["merges"] = [[a, b] for a, b, made in _merges(model) if a in vocab and b in vocab and made in vocab]
        model["vocab"] = vocab
    else:
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in place]
        model["unk_id"] = None if model["unk_id"] is None else place[model["unk_id"]]
    for token in state["added_tokens"]:
        token["id"] = place[token["id"]]
    if state["padding"] is not None:
        state["padding"]["pad_id"] = place[state["padding"]["pad_id"]]
    _renumber(state["post_processor"], place)
    trimmed = _rewritten(tokenizer, state)
    theirs = {token: place[i] for token, i in tokenizer.get_vocab().items() if i in place}
    if trimmed.get_vocab() != theirs:
        other = next(iter(sorted(theirs.items() ^ trimmed.get_vocab().items())))
        raise TeacherError(
            f"the tokenizer cannot be trimmed: token {other[0]!r} has no id {other[1]} on both sides; leave student.vocabulary out"
        )
    return trimmed


def _renumber(processor: Any, place: dict[int, int]) -> None:
    """Ids of special tokens inside a post-processor, in place."""
    if processor is None:
        return
    for step in processor.get("processors", ()):
        _renumber(step, place)
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [place[i] for i in token["ids"]]
    for end in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if end in processor:
            processor[end] = [processor[end][0], place[processor[end][1]]]


def _rewritten(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with another tokenizer.json, as plain transformers loads it: by that file alone, whatever its family."""
    with scratch() as folder:
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        about = {key: value for key, value in about.items() if key not in ("added_tokens_decoder", "auto_map")}
        (folder / "tokenizer_config.json").write_text(json.dumps(about | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        for file in folder.iterdir():
            if not file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                file.unlink()  # vocab.json, merges.txt and the like: of the full vocabulary
        return read_tokenizer(Place.directory(folder, trust_remote_code=False))


def trim_model(model: PreTrainedModel, token_map: TokenMap) -> PreTrainedModel:
    """The same model with the kept rows of its embeddings and output projection; ids in its configs are trimmed ids.

    Raises:
        TeacherError: the model has fewer rows than the tokenizer has ids.
    """
    rows_S = torch.from_numpy(token_map.full_ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    there = min(len(embedding.weight), len(head.weight))
    if token_map.kept[-1] >= there:
        raise TeacherError(f"the tokenizer has token id {token_map.kept[-1]}, and the model only {there} rows; they do not belong together")
    bias_S = None if head.bias is None else head.bias.detach()[rows_S].clone()
    kept = [module.weight.detach()[rows_S].clone() for module in (embedding, head)]
    embedding.padding_idx = None
    model.resize_token_embeddings(len(rows_S), mean_resizing=False)
    with torch.no_grad():
        for module, weight_SH in zip((model.get_input_embeddings(), model.get_output_embeddings()), kept, strict=True):
            module.weight.copy_(weight_SH)
        if bias_S is not None:
            model.get_output_embeddings().bias.copy_(bias_S)
    for config in (model.config.get_text_config(), model.generation_config):
        if config is not None:
            for name in _ID_FIELDS:
                setattr(config, name, _trimmed_ids(getattr(config, name, None), token_map))
    for name in _GENERATION_IDS:
        if getattr(model.generation_config, name, None) is not None:
            setattr(model.generation_config, name, None)
    return model


def _trimmed_ids(ids: int | Sequence[int] | None, token_map: TokenMap) -> int | list[int] | None:
    """Ids of a config; one that was removed stands in no text and is left out."""
    if ids is None:
        return None
    whole = np.array([ids] if isinstance(ids, int) else ids)
    found = [int(i) for i in token_map.trimmed_ids[whole[whole < token_map.num_full]] if i >= 0]
    return (found[0] if found else None) if isinstance(ids, int) else found
