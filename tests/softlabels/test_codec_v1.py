"""Version 1 of the binary form of soft labels, which caches still hold: it goes on being read."""

import base64
import struct
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import SoftLabelError
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK
from kd_core.softlabels import Common, DenseTargets, SampledTargets, Targets, TopKTargets, make_targets
from kd_core.softlabels.codec import decode_rows, parse_model
from kd_core.softlabels.codec.v1 import _DENSE, _HEADER, _SAMPLED, _TOPK, MAGIC, VERSION, decode

POLICIES = st.one_of(
    st.just(Dense(kind="dense")),
    st.builds(
        lambda k, grid: TopK(kind="topk", k=k, temperatures=tuple(grid)),
        st.integers(1, 12),
        st.lists(st.floats(0.1, 50.0), min_size=1, max_size=4),
    ),
    st.builds(lambda n, t: Sampled(kind="sampled", num_draws=n, temperature=t), st.integers(1, 300), st.floats(0.1, 50.0)),
)


def as_bytes(tensor: torch.Tensor, dtype: str) -> bytes:
    return tensor.cpu().numpy().astype(dtype).tobytes()


def encode(targets: Targets) -> bytes:
    """As version 1 was written; nothing writes it any more."""
    common, num = targets.common, len(targets.common.gold_logprob_N)
    match targets:
        case SampledTargets():
            kind, a, b = _SAMPLED, targets.num_draws, len(targets.ids_E)
            lengths = targets.offsets_N1.diff()
            body = struct.pack("<d", targets.temperature) + as_bytes(targets.cross_entropy_offset_N, "<f4") + as_bytes(lengths, "<u2")
            body += as_bytes(targets.ids_E, "<u4") + as_bytes(targets.counts_E, "<u2")
        case TopKTargets():
            kind, a, b = _TOPK, targets.ids_NK.shape[-1], len(targets.temperatures)
            body = struct.pack(f"<{b}d", *targets.temperatures) + as_bytes(targets.ids_NK, "<u4")
            body += as_bytes(targets.logprobs_NK, "<f4") + as_bytes(targets.log_normalizer_NG, "<f4")
        case DenseTargets():
            kind, a, b = _DENSE, 0, 0
            body = as_bytes(targets.logprobs_NV, "<f4")
    header = _HEADER.pack(MAGIC, VERSION, kind, num, common.num_columns, a, b)
    return header + as_bytes(common.gold_logprob_N, "<f4") + as_bytes(common.entropy_N, "<f4") + body


def assert_same(found: object, wanted: object) -> None:
    """Equal field by field: tensors in dtype, shape and every bit."""
    assert type(found) is type(wanted)
    for field in fields(wanted):  # type: ignore[arg-type]
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "log_tail_NG":  # version 1 does not store it
            assert torch.allclose(mine.exp(), theirs.exp(), atol=1e-5)
        elif isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), field.name
        elif isinstance(theirs, Common):
            assert_same(mine, theirs)
        else:
            assert mine == theirs, field.name


def example(policy: SoftLabels, *, num: int = 5, columns: int = 12, seed: int = 0, scale: float = 3.0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(num, columns, generator=generator)
    labels_N = torch.randint(columns, (num,), generator=generator)
    return make_targets(logits_NV, labels_N, policy, uniform_N=torch.rand(num, generator=generator, dtype=torch.float64))


@settings(max_examples=80, deadline=None)
@given(policy=POLICIES, num=st.integers(1, 9), seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1.0, 200.0]))
def test_round_trip_is_bit_exact(policy: SoftLabels, num: int, seed: int, scale: float) -> None:
    targets = example(policy, num=num, seed=seed, scale=scale)
    assert_same(decode(encode(targets)), targets)


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
    targets = make_targets(logits_1V, torch.tensor([wanted]), policy, uniform_N=torch.tensor([0.5], dtype=torch.float64))
    found = decode(encode(targets))
    assert_same(found, targets)
    if isinstance(found, SampledTargets):
        assert (found.ids_E.tolist(), found.counts_E.tolist()) == ([wanted], [25])
    else:
        assert isinstance(found, TopKTargets)
        assert found.ids_NK[0, 0] == wanted
        assert found.logprobs_NK[0, 0].exp() == 1.0


SMALL = [
    Dense(kind="dense"),
    TopK(kind="topk", k=3, temperatures=(1.0, 2.0)),
    Sampled(kind="sampled", num_draws=9, temperature=2.0),
]


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: p.kind)
def test_every_truncation_is_refused(policy: SoftLabels) -> None:
    blob = encode(example(policy))
    for length in range(len(blob)):
        with pytest.raises(SoftLabelError):
            decode(blob[:length])
    with pytest.raises(SoftLabelError, match="beyond their arrays"):
        decode(blob + b"\0")


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: p.kind)
def test_a_flipped_bit_raises_or_keeps_the_shape(policy: SoftLabels) -> None:
    """Damage to numbers is the shard checksum's business (test_shards); damage to structure must never crash or re-shape."""
    targets = example(policy)
    blob = encode(targets)
    refused = 0
    for at in range(len(blob)):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[at] ^= 1 << bit
            try:
                found = decode(bytes(damaged))
            except SoftLabelError:
                refused += 1
                continue
            assert len(found.common.gold_logprob_N) == len(targets.common.gold_logprob_N)
    assert refused >= 8 * 10  # magic, version, kind and the number of positions at least


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    blob = bytearray(encode(example(SMALL[1], num=1)))
    at = blob.index(struct.pack("<2d", 1.0, 2.0)) + 16
    blob[at : at + 4] = struct.pack("<I", 12)
    with pytest.raises(SoftLabelError, match="an id outside the vocabulary"):
        decode(bytes(blob))


def test_lost_draws_are_refused() -> None:
    targets = example(SMALL[2])
    assert isinstance(targets, SampledTargets)
    blob = bytearray(encode(targets))
    blob[-2:] = struct.pack("<H", int(targets.counts_E[-1]) - 1)
    with pytest.raises(SoftLabelError, match="do not add up"):
        decode(bytes(blob))


def test_another_version_is_refused_by_its_number() -> None:
    blob = bytearray(encode(example(SMALL[0])))
    blob[4] = 9
    with pytest.raises(SoftLabelError, match=r"not soft labels of version 1: magic b'KDSL', version 9"):
        decode(bytes(blob))


GOLDEN = {  # two positions of five columns, written when version 1 was the current one
    "dense": "S0RTTAECAgAAAAUAAAAAAAAAAAAAAMPsscCcb3/A341rPjKIJT+U92i9w+yxwLJ1M8FgXz7Ard79wB5D38BVGsm/ZL6IvrYLnsCcb3/A",
    "topk": "S0RTTAEBAgAAAAUAAAADAAAAAgAAAMPsscCcb3/A341rPjKIJT8AAAAAAADwPwAAAAAAAABAAAAAAAMAAAABAAAAAgAAAAEAAAAEAAAAlPdovWBfPsDD7LHA"
    "ZL6IvlUayb+cb3/AvlsTM7TZfj64rkKy3dbqPg==",
    "sampled": "S0RTTAEAAgAAAAUAAAAJAAAABgAAAMPsscCcb3/A341rPjKIJT8AAAAAAAAAQNHVPT+9npA/AwADAAAAAAABAAAAAwAAAAEAAAACAAAABAAAAAcAAQAB"
    "AAMABQABAA==",
}


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: p.kind)
def test_a_row_of_version_1_is_still_read(policy: SoftLabels) -> None:
    """A shard of that time has no model; its rows are read by ``decode_rows`` all the same."""
    blob = base64.b64decode(GOLDEN[policy.kind])
    found = decode_rows(parse_model(b""), [blob, blob], [np.array([1, 4]), np.array([1, 4])])
    assert found.common.gold_logprob_N.tolist() == pytest.approx([-5.56015, -3.99119] * 2, abs=1e-5)
    assert found.common.num_columns == 5
    if isinstance(found, SampledTargets):
        assert (found.temperature, found.num_draws) == (2.0, 9)
        assert (found.ids_E.tolist(), found.counts_E.tolist()) == ([0, 1, 3, 1, 2, 4] * 2, [7, 1, 1, 3, 5, 1] * 2)
    elif isinstance(found, TopKTargets):
        assert found.ids_NK.tolist() == [[0, 3, 1], [2, 1, 4]] * 2
        assert found.log_tail_NG[0].tolist() == pytest.approx([-7.8966, -4.0385], abs=1e-3)
    else:
        assert found.logprobs_NV[1].tolist() == pytest.approx([-6.97694, -1.57112, -0.26708, -4.93893, -3.99119], abs=1e-5)


def test_rows_of_version_1_need_labels_of_their_length() -> None:
    with pytest.raises(SoftLabelError, match="2 positions for labels of 3"):
        decode_rows(None, [base64.b64decode(GOLDEN["sampled"])], [np.array([1, 4, 4])])
