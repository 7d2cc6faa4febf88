"""The binary form of soft labels: what is promised comes back, wide ids survive, damage is an error, and it is small."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_core.errors import SoftLabelError, VersionError
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK
from kd_core.softlabels import (
    Common,
    DenseTargets,
    SampledTargets,
    Targets,
    TopKTargets,
    concatenate,
    decode_rows,
    encode_rows,
    make_targets,
    parse_model,
)
from kd_core.softlabels.codec import decode_mixed_rows
from kd_core.softlabels.targets import split

Rows = tuple[list[Targets], list[np.ndarray]]


def example(policy: SoftLabels, *, lengths: Sequence[int] = (5, 0, 1), columns: int = 12, seed: int = 0, scale: float = 3.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    num = sum(lengths) + 1  # one to cut off: a row may have no position, a scoring pass has some
    logits_NV = scale * torch.randn(num, columns, generator=generator)
    labels_N = torch.randint(columns, (num,), generator=generator)
    whole = make_targets(logits_NV, labels_N, policy, uniform_N=torch.rand(num, generator=generator, dtype=torch.float64))
    return split(whole, [*lengths, 1])[:-1], [part.numpy() for part in labels_N.split([*lengths, 1])[:-1]]


def divergence(wanted: TopKTargets, found: TopKTargets) -> list[float]:
    """Mean KL over the k + 1 buckets at each temperature; the tail's bucket is exact, so it adds nothing."""
    true_ids, true_order = wanted.ids_NK.sort(-1)
    ids, order = found.ids_NK.sort(-1)
    assert torch.equal(ids, true_ids)
    means = []
    for g, temperature in enumerate(wanted.temperatures):
        log_p = torch.log_softmax(wanted.logprobs_NK.double().gather(-1, true_order) / temperature, -1)
        log_q = torch.log_softmax(found.logprobs_NK.double().gather(-1, order) / temperature, -1)
        kept_N = -torch.expm1(wanted.log_tail_NG[:, g].double())
        means.append(float((kept_N * (log_p.exp() * (log_p - log_q)).sum(-1)).mean()))
    return means


def draws(targets: SampledTargets) -> Tensor:
    """(position, id, count) of every entry, by position and id: the order within a position says nothing."""
    position_E = torch.repeat_interleave(torch.arange(len(targets.common.entropy_N)), targets.offsets_N1.diff())
    order_E = torch.argsort(position_E * targets.common.num_columns + targets.ids_E)
    return torch.stack([position_E, targets.ids_E, targets.counts_E], -1)[order_E]


def check(wanted: Targets, found: Targets) -> None:
    """Everything that the codec's docstring promises."""
    assert type(found) is type(wanted)
    assert found.common.num_columns == wanted.common.num_columns
    if isinstance(wanted, DenseTargets) and isinstance(found, DenseTargets):
        for name in ("gold_logprob_N", "entropy_N"):
            assert torch.equal(getattr(found.common, name), getattr(wanted.common, name))
        assert torch.equal(found.logprobs_NV, wanted.logprobs_NV)
        return
    true_N, gold_N = wanted.common.gold_logprob_N, found.common.gold_logprob_N
    assert found.common.entropy_N.dtype == gold_N.dtype == torch.float32
    assert bool(((gold_N - true_N).abs() <= 1 / 250 - true_N / 60).all())
    assert bool(((found.common.entropy_N - wanted.common.entropy_N).abs() <= 1 / 128 + 1e-5).all())
    if isinstance(wanted, SampledTargets) and isinstance(found, SampledTargets):
        assert (found.temperature, found.num_draws) == (wanted.temperature, wanted.num_draws)
        assert torch.equal(found.offsets_N1, wanted.offsets_N1)
        assert torch.equal(draws(found), draws(wanted))
        assert bool(((found.cross_entropy_offset_N - wanted.cross_entropy_offset_N).abs() <= 1 / 128 + 1e-5).all())
        return
    assert isinstance(wanted, TopKTargets)
    assert isinstance(found, TopKTargets)
    assert found.temperatures == wanted.temperatures
    assert torch.equal(found.log_tail_NG, wanted.log_tail_NG) or found.ids_NK.shape[1] == found.common.num_columns
    for g, temperature in enumerate(found.temperatures):
        if temperature == 1.0:
            assert bool((found.log_normalizer_NG[:, g] == 0).all())
        else:
            assert torch.equal(found.log_normalizer_NG[:, g], wanted.log_normalizer_NG[:, g])
    assert bool((found.logprobs_NK.diff(dim=-1) <= 0).all())
    if len(found.ids_NK):
        assert max(divergence(wanted, found)) <= 2e-4


def round_trip(rows: list[Targets], labels: list[np.ndarray]) -> Targets:
    model, blobs = encode_rows(rows, labels)
    return decode_rows(parse_model(model), blobs, labels)


POLICIES = st.one_of(
    st.just(Dense(kind="dense")),
    st.builds(
        lambda k, grid: TopK(kind="topk", k=k, temperatures=tuple(grid)),
        st.integers(1, 12),
        st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), min_size=1, max_size=3, unique=True),
    ),
    st.builds(
        lambda n, t: Sampled(kind="sampled", num_draws=n, temperature=t), st.integers(1, 300), st.sampled_from([0.1, 1.0, 1.5, 50.0])
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    policy=POLICIES,
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 200.0]),
)
def test_what_was_promised_comes_back(policy: SoftLabels, lengths: list[int], seed: int, scale: float) -> None:
    rows, labels = example(policy, lengths=lengths, seed=seed, scale=scale)
    check(concatenate(rows), round_trip(rows, labels))


@st.composite
def sampled_rows(draw: st.DrawFn) -> tuple[SampledTargets, np.ndarray]:
    """Any vocabulary up to 2^20, any number of draws, any split of them: the codec knows no teacher."""
    columns = draw(st.one_of(st.integers(1, 40), st.sampled_from([(1 << 17) + 2, 151_936, 1 << 20])))
    num_draws = draw(st.one_of(st.integers(1, 60), st.sampled_from([255, 4096, 65_535])))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ids, counts = [], []
    for _ in range(draw(st.integers(0, 5))):
        num = int(rng.integers(1, min(columns, num_draws, 300) + 1))
        ids.append(np.sort(rng.choice(columns, num, replace=False)))
        cuts = np.sort(rng.choice(num_draws - 1, num - 1, replace=False)) + 1 if num > 1 else np.zeros(0, int)
        counts.append(np.diff(np.concatenate([[0], cuts, [num_draws]])))
    num = len(ids)
    flat = [torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *part]).astype(np.int64)) for part in (ids, counts)]
    offsets_N1 = torch.tensor([0, *np.cumsum([len(part) for part in ids])], dtype=torch.int64)
    entropy_N = torch.from_numpy(rng.uniform(0, math.log(columns + 1), num).astype(np.float32))
    common = Common(torch.from_numpy(-rng.exponential(5.0, num).astype(np.float32)), entropy_N, columns)
    labels = np.array([rng.choice(part) if rng.random() < 0.5 else rng.integers(columns) for part in ids], np.int64)
    return SampledTargets(common, 1.0, num_draws, entropy_N, offsets_N1, *flat), labels


@settings(max_examples=40, deadline=None)
@given(row=sampled_rows())
def test_any_draws_come_back(row: tuple[SampledTargets, np.ndarray]) -> None:
    check(row[0], round_trip([row[0]], [row[1]]))


@pytest.mark.parametrize("columns", [(1 << 17) + 2, 151_936, 262_144])
@pytest.mark.parametrize("wanted", [(1 << 17) + 1, -1])
@pytest.mark.parametrize(
    "policy", [TopK(kind="topk", k=2, temperatures=(1.0,)), Sampled(kind="sampled", num_draws=25, temperature=1.0)], ids=lambda p: p.kind
)
def test_wide_ids_survive(columns: int, wanted: int, policy: SoftLabels) -> None:
    """Trap 7: 17 bits would teach the end of a turn to another token. One position, all mass on one id."""
    wanted %= columns
    logits_1V = torch.zeros(1, columns)
    logits_1V[0, wanted] = 60.0
    labels = torch.tensor([wanted])
    targets = make_targets(logits_1V, labels, policy, uniform_N=torch.tensor([0.5], dtype=torch.float64))
    found = round_trip([targets], [labels.numpy()])
    check(targets, found)
    if isinstance(found, SampledTargets):
        assert (found.ids_E.tolist(), found.counts_E.tolist()) == ([wanted], [25])
    else:
        assert isinstance(found, TopKTargets)
        assert found.ids_NK[0, 0] == wanted
        assert found.logprobs_NK[0, 0].exp() == 1.0


SMALL = [
    Dense(kind="dense"),
    TopK(kind="topk", k=3, temperatures=(1.0, 2.0)),
    TopK(kind="topk", k=12, temperatures=(2.0,)),
    Sampled(kind="sampled", num_draws=9, temperature=2.0),
    Sampled(kind="sampled", num_draws=25, temperature=1.0),
]


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: p.kind)
def test_every_flipped_byte_and_every_truncation_is_an_error(policy: SoftLabels) -> None:
    rows, labels = example(policy)
    model, blobs = encode_rows(rows, labels)
    parsed = parse_model(model)
    for at in range(len(blobs[0])):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(blobs[0])
            damaged[at] ^= flip
            with pytest.raises(SoftLabelError if at else VersionError):
                decode_rows(parsed, [bytes(damaged), *blobs[1:]], labels)
        with pytest.raises(SoftLabelError):
            decode_rows(parsed, [blobs[0][:at], *blobs[1:]], labels)
    with pytest.raises(SoftLabelError, match="row 0: the checksum"):
        decode_rows(parsed, [blobs[0] + b"\0", *blobs[1:]], labels)
    for at in range(len(model)):
        damaged = bytearray(model)
        damaged[at] ^= 0x10
        with pytest.raises(VersionError if at == len(b"KDSM") else SoftLabelError):
            parse_model(bytes(damaged))
        if at:
            with pytest.raises(SoftLabelError):
                parse_model(model[:at])


def test_a_blob_belongs_to_its_labels_and_its_model() -> None:
    rows, labels = example(SMALL[-1])
    model, blobs = encode_rows(rows, labels)
    other, _ = encode_rows(rows[:1], labels[:1])
    with pytest.raises(SoftLabelError, match=r"row 0: the checksum .* or belong to other tokens or another shard's model"):
        decode_rows(parse_model(other), blobs, labels)
    with pytest.raises(SoftLabelError, match="row 2: the checksum"):
        decode_rows(parse_model(model), blobs, [*labels[:2], (labels[2] + 1) % 12])


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: p.kind)
def test_another_version_is_refused_by_name(policy: SoftLabels) -> None:
    rows, labels = example(policy)
    model, blobs = encode_rows(rows, labels)
    assert (model[4], {blob[0] for blob in blobs}) == (1, {1})
    said = "of version 7; this code reads version 1; update the package, or use another store"
    with pytest.raises(VersionError, match=f"row 1: soft labels {said}"):
        decode_rows(parse_model(model), [blobs[0], b"\7" + blobs[1][1:], blobs[2]], labels)
    with pytest.raises(VersionError, match=f"a soft-label model {said}"):
        parse_model(model[:4] + b"\7" + model[5:])


def test_rows_are_read_in_any_choice_and_order() -> None:
    rows, labels = example(SMALL[-1], lengths=(5, 0, 1, 4))
    model, blobs = encode_rows(rows, labels)
    order = [3, 1, 0]
    check(concatenate([rows[i] for i in order]), decode_rows(parse_model(model), [blobs[i] for i in order], [labels[i] for i in order]))


def test_what_cannot_be_written_is_refused() -> None:
    rows, labels = example(SMALL[-1], lengths=(2,))
    row = rows[0]
    assert isinstance(row, SampledTargets)
    for bad, message in [
        (replace(row, counts_E=row.counts_E + 1), "do not add up"),
        (replace(row, ids_E=row.ids_E + 12), "outside the vocabulary of 12"),
        (replace(row, ids_E=torch.zeros_like(row.ids_E)), "twice at one position"),
        (replace(row, common=replace(row.common, entropy_N=row.common.entropy_N * torch.nan)), "NaN"),
        (replace(row, common=replace(row.common, num_columns=(1 << 20) + 1)), "1048577 columns"),
    ]:
        with pytest.raises(SoftLabelError, match=message):
            encode_rows([bad], labels)
    with pytest.raises(SoftLabelError, match="labels of 1 positions"):
        encode_rows(rows, [labels[0][:1]])
    with pytest.raises(SoftLabelError, match="a label lies outside"):
        encode_rows(rows, [labels[0] + 12])


def zipf_rows(num_rows: int, num: int, *, columns: int = 4096, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a peaked law over a Zipfian vocabulary: (rows x num, columns), and labels drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    prior_V = -1.8 * torch.log(torch.arange(1, columns + 1).float())
    logits = prior_V + 3.0 * torch.randn(num_rows * num, columns, generator=generator)
    return logits, torch.distributions.Categorical(logits=logits).sample()


def test_a_shard_is_near_its_entropy() -> None:
    """Ids within a tenth of what a static unigram code of the sets would take, and all of it below 13 bytes a position."""
    logits, gold = zipf_rows(60, 40)
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0)
    uniform = torch.rand(len(gold), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = [make_targets(logits[i : i + 40], gold[i : i + 40], policy, uniform_N=uniform[i : i + 40]) for i in range(0, len(gold), 40)]
    labels = [gold[i : i + 40].numpy() for i in range(0, len(gold), 40)]
    model, blobs = encode_rows(rows, labels)
    whole = concatenate(rows)
    check(whole, decode_rows(parse_model(model), blobs, labels))
    assert isinstance(whole, SampledTargets)
    share = torch.bincount(whole.ids_E, minlength=4096) / len(whole.ids_E)
    num_N = whole.offsets_N1.diff()
    ids_bits = float(-share[whole.ids_E].log2().sum() - torch.lgamma(num_N + 1.0).sum() / math.log(2))
    for at in range(1, len(blobs[7]), 13):
        damaged = bytearray(blobs[7])
        damaged[at] ^= 0x04
        with pytest.raises(SoftLabelError, match="row 7: "):
            decode_rows(parse_model(model), [*blobs[:7], bytes(damaged)], labels[:8])
    size = sum(map(len, blobs))
    assert len(model) + size < 13 * len(gold)
    assert 8 * size < 1.1 * ids_bits + 22 * len(gold)  # counts, number of ids, entropy, gold log-probability


def test_top_128_takes_half_of_what_others_take() -> None:
    logits, gold = zipf_rows(8, 40)
    policy = TopK(kind="topk", k=128, temperatures=(1.0,))
    rows = [make_targets(logits[i : i + 40], gold[i : i + 40], policy, uniform_N=torch.zeros(40)) for i in range(0, len(gold), 40)]
    labels = [gold[i : i + 40].numpy() for i in range(0, len(gold), 40)]
    model, blobs = encode_rows(rows, labels)
    found = decode_rows(parse_model(model), blobs, labels)
    check(concatenate(rows), found)
    assert (len(model) + sum(map(len, blobs))) / len(gold) <= 172


@pytest.mark.parametrize(
    "policy",
    [Sampled(kind="sampled", num_draws=25, temperature=1.0), TopK(kind="topk", k=16, temperatures=(1.0, 2.0))],
    ids=lambda p: p.kind,
)
def test_a_model_serves_shards_that_are_like_the_first(policy: SoftLabels) -> None:
    """A reader then decodes rows of both in one call; a shard of another kind, or of other statistics, gets its own."""
    first, other, peaked = (
        example(policy, lengths=[200] * 4, columns=900, seed=seed, scale=scale) for seed, scale in ((0, 3.0), (1, 3.0), (2, 12.0))
    )
    model, blobs = encode_rows(*first)
    same, more = encode_rows(*other, known=model)
    assert same == model
    check(concatenate([*other[0], *first[0]]), decode_rows(parse_model(model), [*more, *blobs], [*other[1], *first[1]]))
    assert sum(map(len, more)) <= 1.03 * (sum(map(len, encode_rows(*other)[1])) + len(model))
    own, _ = encode_rows(*peaked, known=model)
    assert own == encode_rows(*peaked)[0] != model
    dense = example(Dense(kind="dense"))
    assert encode_rows(*dense, known=model) == encode_rows(*dense)


def test_one_strange_value_does_not_take_a_model_of_its_own() -> None:
    """It is said in full; many of them are another shard's statistics."""
    policy = Sampled(kind="sampled", num_draws=25, temperature=2.0)
    first, (rows, labels) = (example(policy, lengths=[200] * 4, columns=900, seed=seed) for seed in (0, 1))
    model, _ = encode_rows(*first)

    def strange(num: int) -> list[Targets]:
        whole = rows[2]
        assert isinstance(whole, SampledTargets)
        entropy_N, gold_N, offset_N = (
            whole.common.entropy_N.clone(),
            whole.common.gold_logprob_N.clone(),
            whole.cross_entropy_offset_N.clone(),
        )
        entropy_N[:num], offset_N[:num], gold_N[:num] = 13.8, 9.7, -55.0
        common = replace(whole.common, entropy_N=entropy_N, gold_logprob_N=gold_N)
        return [*rows[:2], replace(whole, common=common, cross_entropy_offset_N=offset_N), rows[3]]

    found, blobs = encode_rows(strange(2), labels, known=model)
    assert found == model
    check(concatenate(strange(2)), decode_rows(parse_model(model), blobs, labels))
    assert encode_rows(strange(200), labels, known=model)[0] != model


def test_rows_of_several_models_come_back_in_the_order_asked() -> None:
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0)
    shards = [example(policy, lengths=[3, 0, 7], columns=300, seed=seed, scale=scale) for seed, scale in ((0, 1.0), (1, 8.0))]
    coded = [encode_rows(*shard) for shard in shards]
    order = [(1, 2), (0, 0), (0, 2), (1, 1), (1, 0)]
    found = decode_mixed_rows(
        [parse_model(model) for model, _ in coded],
        np.array([m for m, _ in order]),
        [coded[m][1][row] for m, row in order],
        [shards[m][1][row] for m, row in order],
    )
    check(concatenate([shards[m][0][row] for m, row in order]), found)
    other = encode_rows(*example(Sampled(kind="sampled", num_draws=9, temperature=1.0), columns=300))
    with pytest.raises(SoftLabelError, match="different kinds"):
        decode_mixed_rows([parse_model(coded[0][0]), parse_model(other[0])], np.zeros(3, np.int64), coded[0][1], shards[0][1])
