"""Hidden states: block i is block i's output, within half a step of int8; damaged bytes are refused."""

import pytest
import torch

from kd_core.errors import SoftLabelError, TeacherError, VersionError
from kd_core.recipe import HiddenStates
from kd_core.softlabels.capture import row_key
from kd_core.softlabels.hidden import RowStates, capture_hidden, decode_states, encode_states, projection
from kd_core.tokens.batches import TokenRow

ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, 1), 4),
    TokenRow((3, 14, 1), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 1),
]
KEYED = [(row_key("n", row), row) for row in ROWS]


@torch.no_grad()
def own_states(loaded, row: TokenRow) -> list[torch.Tensor]:
    """transformers' list (the embedding first, the last one normalised) at the positions that predict supervised tokens."""
    states = loaded.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    return [state_BTH[0, row.first_supervised - 1 : -1] for state_BTH in states]


@pytest.mark.parametrize("budget", [1, 1000])
def test_block_i_is_the_output_of_block_i_within_half_a_step(tiny_model, budget: int) -> None:
    """Trap 23: transformers' hidden_states[i] is the block before."""
    loaded = tiny_model(num_layers=3)
    found = capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0, 1, 2)), micro_batch_tokens=budget)
    assert found.refused == {}
    assert [row.key for row in found.captured] == [key for key, _ in KEYED]
    for (_, row), captured in zip(KEYED, found.captured, strict=True):
        own = own_states(loaded, row)
        states_NLW = captured.states.states()
        assert states_NLW.shape == (row.num_supervised, 3, 16)
        for block in (0, 1):
            half_step_N1 = own[block + 1].abs().amax(-1, keepdim=True) / 254
            assert bool(((states_NLW[:, block] - own[block + 1]).abs() <= half_step_N1 * 1.001 + 1e-6).all())
            assert float((states_NLW[:, block] - own[block]).abs().max()) > 10 * float(half_step_N1.max())
        last_NW = loaded.model.model.norm(states_NLW[:, 2])
        assert float((last_NW - own[3]).abs().max()) < 0.05


def test_the_head_does_not_run(tiny_model) -> None:
    loaded = tiny_model()

    def fail(*_: object) -> None:
        raise AssertionError("the head ran")

    loaded.model.lm_head.register_forward_hook(fail)
    assert len(capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(1,)), micro_batch_tokens=64).captured) == 3
    assert not loaded.model.model.layers[1]._forward_hooks


def test_a_slice_is_the_first_columns_and_a_projection_keeps_inner_products(tiny_model) -> None:
    loaded = tiny_model()
    row = [KEYED[0]]
    whole_NW = capture_hidden(loaded, row, wanted=HiddenStates(blocks=(1,)), micro_batch_tokens=64).captured[0].states.states()[:, 0]
    slice_NW = capture_hidden(loaded, row, wanted=HiddenStates(blocks=(1,), width=5), micro_batch_tokens=64).captured[0].states.states()
    assert slice_NW.shape == (7, 1, 5)
    torch.testing.assert_close(slice_NW[:, 0], whole_NW[:, :5], atol=float(whole_NW.abs().max()) / 127, rtol=0)
    wanted = HiddenStates(blocks=(1,), width=12, reduce="project")
    projected_NW = capture_hidden(loaded, row, wanted=wanted, micro_batch_tokens=64).captured[0].states.states()[:, 0]
    torch.testing.assert_close(projected_NW, whole_NW @ projection(16, 12), atol=float(whole_NW.abs().max()) / 16, rtol=0)
    wide_HW = projection(64, 4096)
    torch.testing.assert_close(wide_HW @ wide_HW.T, torch.eye(64), atol=5 * 2**0.5 / 64, rtol=0)  # sd sqrt(2 / W) on the diagonal
    assert wide_HW[0, :2].tolist() == pytest.approx(projection(64, 4096)[0, :2].tolist())


def test_the_fixed_projection_never_moves() -> None:
    """Stored states mean nothing under another matrix."""
    assert projection(2, 2).flatten().tolist() == pytest.approx([-0.7121248, 0.293349, 0.7079071, -0.1455047])


def test_a_block_or_a_width_that_is_not_there_is_refused(tiny_model) -> None:
    loaded = tiny_model()
    with pytest.raises(SoftLabelError, match=r"hidden_states\.blocks: 2, and the teacher's blocks are 0 to 1"):
        capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0, 2)), micro_batch_tokens=64)
    with pytest.raises(SoftLabelError, match=r"hidden_states\.width: 17, and the teacher's states have 16 columns"):
        capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0,), width=17), micro_batch_tokens=64)
    loaded.model.train()
    with pytest.raises(TeacherError, match="not in eval mode"):
        capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0,)), micro_batch_tokens=64)


def test_a_row_that_is_not_finite_is_refused_alone(tiny_model) -> None:
    loaded = tiny_model()
    loaded.model.model.embed_tokens.weight[14] = torch.nan
    found = capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0,)), micro_batch_tokens=1000)
    assert found.refused == dict.fromkeys([KEYED[0][0], KEYED[1][0]], "the teacher gave NaN or infinite hidden states")
    assert [row.key for row in found.captured] == [KEYED[2][0]]


def states(num: int, blocks: tuple[int, ...] = (3, 70), width: int = 6) -> RowStates:
    generator = torch.Generator().manual_seed(num)
    codes_NLW = torch.randint(-127, 128, (num, len(blocks), width), generator=generator).to(torch.int8)
    return RowStates(blocks, codes_NLW, torch.rand(num, len(blocks), generator=generator))


@pytest.mark.parametrize("num", [0, 1, 40])
def test_rows_survive_their_bytes(num: int) -> None:
    row = states(num)
    data = encode_states(row)
    assert len(data) == num * 2 * (6 + 4) + 2 * 2 + 19
    back = decode_states(data)
    assert back.blocks == row.blocks
    assert torch.equal(back.codes_NLW, row.codes_NLW)
    assert torch.equal(back.scales_NL, row.scales_NL)


def test_every_flipped_byte_and_every_cut_is_refused() -> None:
    data = encode_states(states(3))
    for at in range(len(data)):
        with pytest.raises(VersionError if at == len(b"kdhs") else SoftLabelError):
            decode_states(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        with pytest.raises(SoftLabelError):
            decode_states(data[:at])
    with pytest.raises(SoftLabelError):
        decode_states(data + b"\0")


def test_states_of_zero_are_zero(tiny_model) -> None:
    loaded = tiny_model()
    for parameter in loaded.model.parameters():
        parameter.zero_()
    (row, *_) = capture_hidden(loaded, KEYED, wanted=HiddenStates(blocks=(0,)), micro_batch_tokens=64).captured
    assert int(row.states.codes_NLW.abs().max()) == 0
    assert bool((row.states.states() == 0).all())


def test_another_version_is_refused_by_name() -> None:
    data = encode_states(states(3))
    assert data[4] == 1
    with pytest.raises(VersionError, match="a row of hidden states of version 7; this code reads version 1; update the package, or"):
        decode_states(data[:4] + b"\7" + data[5:])
