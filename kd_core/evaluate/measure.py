"""Measuring one model on the suites: sampled answers, held-out loss, distance to the teacher, speed.

Axes: B rows, T positions, V vocabulary columns, N supervised positions.

Every model meets the same items, and the same random streams for its samples (a stream is named by suite, item and
sample), so that differences between models are paired. KL and agreement are taken over the gold answers' tokens at T = 1,
with teacher and student cut to the shared columns.

A student with a trimmed vocabulary reads a gold answer in its own tokens, perhaps more of them; the teacher is then given
the same pieces, and cut to the tokens that the student has. Sums are divided by the teacher's number of tokens for every
model, so that a loss a token is the loss of the same text.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from kd_core.curate import judge
from kd_core.evaluate.statistics import SCORE_SCHEMA
from kd_core.fingerprint import fingerprint
from kd_core.progress import Tick, Ticker
from kd_core.recipe import Answers, Run, Task
from kd_core.teacher.generate import generate
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import Batch, TokenRow, collate, token_batches
from kd_core.tokens.encoding import decode_answer, encode_gold, encode_prompt, tokenizer_identity

__all__ = ["Measured", "measure"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Scores of one model and seed, and how fast it was.

    Attributes:
        scores: SCORE_SCHEMA, one row an item.
        tokens_per_second: generated tokens a second where answers were sampled, else scored tokens a second; on this
            machine, in this run.
        undecided_samples: samples that could not be graded; pass_at_1 counts them as not right.
        items_beyond_positions: items that may need more tokens than the model was made for.
        guesses: of classes: suite, item_id, seed, the likeliest classes and their probabilities; None for generated text.
    """

    scores: pa.Table
    tokens_per_second: float
    undecided_samples: int
    items_beyond_positions: int
    guesses: pa.Table | None = None


def measure(
    loaded: LoadedModel,
    suites: Mapping[str, pa.Table],
    *,
    seed: int,
    answers: Answers | None,
    task: Task,
    run: Run,
    teacher: LoadedModel | None,
    tick: Ticker,
) -> Measured:
    """Measure one model on all suites.

    Args:
        loaded: the model.
        suites: name -> items (PROMPT_SCHEMA).
        seed: label of the training seed in the scores; it does not change the sampling.
        answers: how to sample for pass@1; None measures losses only.
        task: template and verifier.
        run: batch sizes.
        teacher: the scorable teacher; ``loaded`` itself for the teacher's own line; None leaves kl and agreement null.
        tick: progress, in items.
    """
    rows: list[dict[str, Any]] = []
    total = sum(items.num_rows for items in suites.values())
    generated, generating, scored, scoring, undecided = 0, 0.0, 0, 0.0, 0
    for suite, table in suites.items():
        items = table.to_pylist()
        found: list[dict[str, Any]] = [{"suite": suite, "item_id": item["prompt_id"], "seed": seed} for item in items]
        if answers is not None:
            began = time.perf_counter()
            tokens, open_samples = _sample(loaded, items, found, answers=answers, task=task, batch_rows=run.generate_rows)
            generated, undecided = generated + tokens, undecided + open_samples
            generating += time.perf_counter() - began
        began = time.perf_counter()
        scored += _score(loaded, items, found, task=task, budget_tokens=run.micro_batch_tokens, teacher=teacher)
        scoring += time.perf_counter() - began
        rows.extend(found)
        tick(Tick(len(rows), total, "items"))
    table = pa.Table.from_pylist([{name: row.get(name) for name in SCORE_SCHEMA.names} for row in rows], schema=SCORE_SCHEMA)
    rate = generated / generating if generating > 0.0 else scored / max(scoring, 1e-9)
    beyond = _beyond(loaded, suites, answers=answers, task=task)
    return Measured(table, rate, undecided, beyond)


def _beyond(loaded: LoadedModel, suites: Mapping[str, pa.Table], *, answers: Answers | None, task: Task) -> int:
    """Items whose prompt with its gold answer, or with the longest sampled one, has more tokens than the model has positions."""
    positions, found = loaded.max_positions, 0
    for item in (item for table in suites.values() for item in table.to_pylist() if positions is not None):
        gold = len(encode_gold(loaded.tokenizer, item["gold"], task)) if item["gold"] else 0
        longest = max(gold, 0 if answers is None else answers.max_tokens)
        found += len(encode_prompt(loaded.tokenizer, item["prompt"], task)) + longest > (positions or 0)
    if found:
        _LOG.warning("%d items may need more than the model's %d positions, for which it was not made", found, positions)
    return found


def _sample(
    loaded: LoadedModel, items: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], *, answers: Answers, task: Task, batch_rows: int
) -> tuple[int, int]:
    """Fill pass_at_1, truncated and text; return the numbers of generated tokens and of undecided samples."""
    requests = [(i, sample) for i in range(len(items)) for sample in range(answers.num_samples)]
    prompts = [encode_prompt(loaded.tokenizer, item["prompt"], task) for item in items]
    requests.sort(key=lambda request: len(prompts[request[0]]))
    correct, cut, tokens, undecided = [0] * len(items), [0] * len(items), 0, 0
    for start in range(0, len(requests), batch_rows):
        part = requests[start : start + batch_rows]
        keys = [fingerprint([found[i]["suite"], items[i]["prompt_id"], sample]) for i, sample in part]
        for (i, sample), answer in zip(part, generate(loaded, [prompts[i] for i, _ in part], keys=keys, answers=answers), strict=True):
            text = decode_answer(loaded.tokenizer, answer.ids, prompt_ids=prompts[i])
            reference = items[i]["reference"]
            verdict = None if reference is None else judge(text, reference, task)
            correct[i] += verdict == "right"
            undecided += verdict == "undecided"
            cut[i] += answer.finish_reason == "length"
            tokens += len(answer.ids)
            if sample == 0:
                found[i]["text"] = text
    for i, item in enumerate(items):
        found[i]["truncated"] = cut[i] / answers.num_samples
        if item["reference"] is not None:
            found[i]["pass_at_1"] = correct[i] / answers.num_samples
    return tokens, undecided


@torch.inference_mode()
def _score(
    loaded: LoadedModel,
    items: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
    *,
    task: Task,
    budget_tokens: int,
    teacher: LoadedModel | None,
) -> int:
    """Fill nll_sum, kl_sum, agreement_sum and tokens for items with a worked gold answer; return the tokens scored."""
    picked = [i for i, item in enumerate(items) if item["gold"]]
    rows = [_gold_row(loaded, items[i], task) for i in picked]
    comparable, full_ids_S = _shared_ids(loaded, teacher)
    for part in token_batches(rows, budget_tokens):
        chosen = [rows[j] for j in part]
        batch = collate([(row.ids, row.first_supervised) for row in chosen]).to(loaded.device)
        log_q_NV = _logprobs(loaded, batch)
        log_p_NV = log_q_NV if teacher is loaded else None
        if teacher is not None and teacher is not loaded and comparable:
            same_text = batch if full_ids_S is None else replace(batch, ids_BT=full_ids_S[batch.ids_BT])
            log_p_NV = _logprobs(teacher, same_text, full_ids_S)
        start = 0
        for j, row in zip(part, chosen, strict=True):
            span = slice(start, start + row.num_supervised)
            start += row.num_supervised
            entry = found[picked[j]]
            counted = loaded if teacher is None else teacher
            entry["tokens"] = _gold_row(counted, items[picked[j]], task).num_supervised
            entry["nll_sum"] = -float(log_q_NV[span].gather(-1, batch.labels_N[span, None]).sum())
            if log_p_NV is not None:
                p, q = log_p_NV[span], log_q_NV[span]
                entry["kl_sum"] = float((p.exp() * (p - q)).sum())
                entry["agreement_sum"] = float((p.argmax(-1) == q.argmax(-1)).sum()) * entry["tokens"] / row.num_supervised
    return sum(len(row.ids) for row in rows)


def _gold_row(loaded: LoadedModel, item: dict[str, Any], task: Task) -> TokenRow:
    prompt_ids = encode_prompt(loaded.tokenizer, item["prompt"], task)
    gold_ids = encode_gold(loaded.tokenizer, item["gold"], task, prompt_ids=prompt_ids)
    return TokenRow((*prompt_ids, *gold_ids), len(prompt_ids))


def _logprobs(loaded: LoadedModel, batch: Batch, columns_S: Tensor | None = None) -> Tensor:
    """Log-probabilities at supervised positions, float32, (N, V); of some columns, given that it is one of them, (N, S)."""
    logits_BTV = loaded.model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
    logits_NV = logits_BTV[batch.predict_BT][:, : loaded.num_columns].float()
    return torch.log_softmax(logits_NV if columns_S is None else logits_NV[:, columns_S], -1)


def _shared_ids(loaded: LoadedModel, teacher: LoadedModel | None) -> tuple[bool, Tensor | None]:
    """Tell whether a model's ids are among the teacher's, and give the teacher's id of each; None where they are the same."""
    if teacher is None:
        return False, None
    token_map = loaded.token_map
    if token_map is not None and token_map.source == tokenizer_identity(teacher.tokenizer).vocabulary:
        return True, torch.from_numpy(token_map.full_ids).to(teacher.device)
    return teacher.num_columns == loaded.num_columns, None
