"""Students from a teacher's blocks and width: what is kept is the teacher's, keeping everything is the teacher itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kd_core.errors import RecipeError, TrainingError
from kd_core.recipe import CharacterTokenizer, Narrower, StudentFromTeacher
from kd_core.student.activations import Importance, measure, most_important, sample_rows
from kd_core.student.make import student_from_teacher
from kd_core.student.shrink import FAMILIES, shrunk_config
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer
from kd_core.train.row_order import MemoryRows

TOKENIZER = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789+-=,#"))
IDS = torch.tensor([[2, 3, 4, 5, 11, 7, 1]])
ROWS = [TokenRow((2, 3, 4, 5, 6), 2), TokenRow((7, 8, 9, 10, 11, 12, 13, 1), 3), TokenRow((4, 4, 1), 1)]


def family(model_type: str, *, heads: int = 4, kv_heads: int = 2, tied: bool = False, **more: Any) -> LoadedModel:
    """A small random model of a family, with four blocks, and biases and norms that are not at their initial values."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return LoadedModel(model.eval().requires_grad_(False), TOKENIZER, 17)


def student(teacher: LoadedModel, **fields: Any) -> PreTrainedModel:
    spec = StudentFromTeacher.model_validate({"kind": "from_teacher", **fields})
    return student_from_teacher(teacher, spec, rows=lambda num_rows: ROWS[:num_rows]).eval()


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest) -> LoadedModel:
    return family(request.param)


# ---------------------------------------------------------------------------------------------- every family


def test_keeping_everything_is_the_teacher(teacher: LoadedModel) -> None:
    everything = {"hidden_size": 16, "num_heads": 4, "intermediate_size": 24}
    for fields in ({}, {"blocks": [0, 1, 2, 3]}, {"first_blocks": 3, "last_blocks": 1}, {"narrower": everything, "num_kv_heads": 2}):
        same = student(teacher, **fields)
        torch.testing.assert_close(same(input_ids=IDS).logits.detach(), teacher.model(input_ids=IDS).logits, rtol=0, atol=0)


def test_a_smaller_student_has_the_promised_shapes_learns_decodes_and_survives_saving(teacher: LoadedModel, tmp_path) -> None:
    width = {"num_heads": 2, "intermediate_size": 10} | ({} if "gemma" in teacher.model.config.model_type else {"hidden_size": 12})
    small = student(teacher, blocks=[1, 3], narrower=width, num_kv_heads=1)
    block, channels = small.model.layers[0], width.get("hidden_size", 16)
    assert (len(small.model.layers), small.config.num_hidden_layers) == (2, 2)
    assert block.self_attn.q_proj.weight.shape == block.self_attn.o_proj.weight.T.shape == (2 * 4, channels)
    assert block.self_attn.k_proj.weight.shape == block.self_attn.v_proj.weight.shape == (4, channels)
    assert block.mlp.down_proj.weight.shape == block.mlp.up_proj.weight.T.shape == (channels, 10)
    whole = small(input_ids=IDS, use_cache=False).logits
    first = small(input_ids=IDS[:, :3], use_cache=True)
    rest = small(input_ids=IDS[:, 3:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 3:], rtol=1e-4, atol=1e-5)
    whole.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in small.named_parameters() if "k_proj.bias" not in name)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, whole, rtol=0, atol=0)


def test_the_teacher_is_left_alone(teacher: LoadedModel) -> None:
    before, config = {n: w.clone() for n, w in teacher.model.state_dict().items()}, teacher.model.config.to_dict()
    small = student(teacher, blocks=[0, 2], narrower={"intermediate_size": 8})
    with torch.no_grad():
        for weight in small.parameters():
            weight.zero_()
    assert all(torch.equal(w, before[n]) for n, w in teacher.model.state_dict().items())
    assert teacher.model.config.to_dict() == config
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module._forward_hooks for module in teacher.model.modules()), "measuring leaves no hook behind"


# ---------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"every_nth_block": 3}, [0, 3]),
        ({"first_blocks": 2}, [0, 1]),
        ({"last_blocks": 1}, [3]),
        ({"first_blocks": 1, "last_blocks": 2}, [0, 2, 3]),
        ({"blocks": [1, 2]}, [1, 2]),
    ],
)
def test_the_named_blocks_are_kept(fields: dict[str, Any], kept: list[int]) -> None:
    teacher = family("llama")
    small = student(teacher, **fields)
    for number, block in zip(kept, small.model.layers, strict=True):
        assert all(torch.equal(w, teacher.model.state_dict()[f"model.layers.{number}.{n}"]) for n, w in block.state_dict().items())


def test_lists_with_one_entry_a_block_follow_the_blocks() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    gemma = family("gemma3_text", layer_types=types)
    assert student(gemma, blocks=[1, 2, 3]).config.layer_types == types[1:]
    smol = family("smollm3", no_rope_layers=[1, 0, 1, 1])
    small = student(smol, blocks=[1, 3])
    assert small.config.no_rope_layers == [0, 1]
    assert [layer.self_attn.use_rope for layer in small.model.layers] == [0, 1]


def test_a_teacher_of_one_block_keeps_it() -> None:
    teacher = family("llama")
    one = LoadedModel(student(teacher, first_blocks=1).requires_grad_(False), TOKENIZER, 17)
    assert len(student(one, every_nth_block=1).model.layers) == 1
    with pytest.raises(RecipeError, match=r"^student\.every_nth_block: 2, and the teacher has 1 blocks; use at most 1$"):
        student(one, every_nth_block=2)


# ---------------------------------------------------------------------------------------------- heads


def test_key_value_heads_are_the_means_of_their_neighbours() -> None:
    teacher = family("qwen2", heads=4, kv_heads=4)
    small = student(teacher, num_kv_heads=2)
    for name in ("k_proj", "v_proj"):
        theirs = getattr(teacher.model.model.layers[2].self_attn, name)
        ours = getattr(small.model.layers[2].self_attn, name)
        for new, (a, b) in enumerate([(0, 1), (2, 3)]):
            rows, left, right = (slice(4 * i, 4 * i + 4) for i in (new, a, b))
            torch.testing.assert_close(ours.weight[rows], (theirs.weight[left] + theirs.weight[right]) / 2)
            torch.testing.assert_close(ours.bias[rows], (theirs.bias[left] + theirs.bias[right]) / 2)


def test_equal_neighbours_lose_nothing_by_averaging() -> None:
    """Only if every query head still meets the key-value head of its own group are the logits the same."""
    teacher = family("llama", heads=4, kv_heads=4)
    for layer in teacher.model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            by_head = projection.weight.view(4, 4, 16)
            by_head[1], by_head[3] = by_head[0], by_head[2]
    small = student(teacher, num_kv_heads=2)
    torch.testing.assert_close(small(input_ids=IDS).logits.detach(), teacher.model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_heads_and_units_that_write_nothing_are_dropped_without_loss(kv_heads: int) -> None:
    teacher = family("llama", kv_heads=kv_heads)
    for layer in teacher.model.model.layers:
        layer.self_attn.o_proj.weight.view(16, 4, 4)[:, [0, 3]] = 0.0  # one head of each group of two
        layer.mlp.down_proj.weight[:, 5:] = 0.0
    small = student(teacher, narrower={"num_heads": 2, "intermediate_size": 5})
    torch.testing.assert_close(small(input_ids=IDS).logits.detach(), teacher.model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert small.config.num_key_value_heads == 2


def test_averaged_key_value_heads_are_not_mistaken_for_chosen_ones() -> None:
    """As many query as key-value heads are left, and still the latter are means: the recipe asked for that."""
    teacher = family("llama", kv_heads=4)
    small = student(teacher, narrower={"num_heads": 2}, num_kv_heads=2)
    theirs = teacher.model.model.layers[0].self_attn.k_proj.weight.view(2, 2, 4, 16)
    torch.testing.assert_close(small.model.layers[0].self_attn.k_proj.weight.view(2, 4, 16), theirs.mean(1))


# ---------------------------------------------------------------------------------------------- channels and statistics


def test_the_channels_that_blocks_read_most_are_kept() -> None:
    teacher = family("llama")
    kept = [1, 2, 3, 5, 7, 8, 11, 12]
    quiet = [i for i in range(16) if i not in kept]
    for name, weight in teacher.model.named_parameters():
        if name.endswith("norm.weight"):
            weight[quiet] = 1e-4
    small = student(teacher, narrower={"hidden_size": 8})
    assert torch.equal(small.model.embed_tokens.weight, teacher.model.model.embed_tokens.weight[:, kept])
    assert torch.equal(small.lm_head.weight, teacher.model.lm_head.weight[:, kept])
    assert torch.equal(small.model.layers[1].mlp.down_proj.weight, teacher.model.model.layers[1].mlp.down_proj.weight[kept])


def test_statistics_are_means_over_tokens_without_padding() -> None:
    """Rows together, padded, give what each row alone gives; and a head's value is the norm of what it adds."""
    teacher = family("llama")
    together = measure(teacher, ROWS, [1])
    alone = [measure(teacher, [row], [1]) for row in ROWS]
    total = sum(len(row.ids) for row in ROWS)
    for name in ("heads", "units_F"):
        mean = sum(getattr(one, name)[0] * len(row.ids) for one, row in zip(alone, ROWS, strict=True)) / total
        torch.testing.assert_close(getattr(together, name)[0], mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        together.channels_H, sum(a.channels_H * len(r.ids) for a, r in zip(alone, ROWS, strict=True)) / total, rtol=1e-5, atol=0
    )
    attention, seen = teacher.model.model.layers[1].self_attn, []
    hook = attention.o_proj.register_forward_hook(lambda m, i, out: seen.append(i[0][0]))
    teacher.model(input_ids=torch.tensor([ROWS[0].ids]))
    hook.remove()
    added = torch.stack([seen[0][:, 4 * h : 4 * h + 4] @ attention.o_proj.weight[:, 4 * h : 4 * h + 4].T for h in range(4)])
    torch.testing.assert_close(alone[0].heads[0], added.norm(dim=-1).mean(1).double(), rtol=1e-5, atol=0)


def test_of_equals_the_first_are_kept_in_their_order() -> None:
    config = family("llama").model.config
    spec = StudentFromTeacher(kind="from_teacher", blocks=(2,), narrower=Narrower(hidden_size=4, num_heads=2, intermediate_size=3))
    importance = Importance(torch.ones(16), [torch.tensor([1.0, 2.0, 4.0, 3.0])], [torch.arange(24.0)])
    keep = most_important(importance, config, shrunk_config(config, spec), spec)
    assert (keep.channels_H.tolist(), keep.heads[0].tolist(), keep.units_F[0].tolist()) == ([0, 1, 2, 3], [1, 2], [21, 22, 23])


def test_the_sample_is_bounded_and_a_function_of_rows_and_seed() -> None:
    rows = MemoryRows([TokenRow(tuple(range(2 + i % 7)), 1) for i in range(100)])
    first, again, other = (sample_rows(rows, 10, max_tokens=6, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 10
    assert max(len(row.ids) for row in first) <= 6
    assert len(sample_rows(rows, 1000, max_tokens=100, seed=0)) == 100
    with pytest.raises(TrainingError, match=r"none of 100 curated rows is within training\.max_tokens = 1"):
        sample_rows(rows, 10, max_tokens=1, seed=0)


# ---------------------------------------------------------------------------------------------- embeddings and padding


def test_shared_embeddings_are_one_matrix_and_stay_so(tmp_path) -> None:
    teacher = family("llama")
    small = student(teacher, share_embeddings=True)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, teacher.model.model.embed_tokens.weight)
    small.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert sum(p.numel() for p in small.parameters()) == teacher.num_parameters - 24 * 16


def test_tied_embeddings_of_the_teacher_stay_tied() -> None:
    small = student(family("llama", tied=True), first_blocks=1, narrower={"hidden_size": 8})
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_the_embedding_of_a_padding_token_learns() -> None:
    """Padding never reaches a loss; but a padding token that is the end token too stands inside of rows."""
    small = student(family("llama"))
    small(input_ids=torch.tensor([[3, 0, 4]])).logits.square().mean().backward()
    assert small.model.embed_tokens.weight.grad[0].abs().sum() > 0


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"blocks": [0, 4]}, r"student\.blocks: 4, and the teacher has 4 blocks; use numbers from 0 to 3"),
        (
            "llama",
            {"first_blocks": 3, "last_blocks": 2},
            r"student\.first_blocks \+ last_blocks: 5, and the teacher has 4 blocks; use fewer",
        ),
        ("llama", {"every_nth_block": 4}, r"student\.every_nth_block: 4, and the teacher has 4 blocks; use at most 3"),
        ("llama", {"num_kv_heads": 3}, r"student\.num_kv_heads: 3, and the teacher has 2; use at most 2"),
        ("llama", {"narrower": {"hidden_size": 17}}, r"student\.narrower\.hidden_size: 17, and the teacher has 16; use at most 16"),
        ("llama", {"narrower": {"intermediate_size": 25}}, r"student\.narrower\.intermediate_size: 25, and the teacher has 24"),
        ("llama", {"narrower": {"num_heads": 3}}, r"student\.narrower\.num_heads: 3 is no multiple of the student's 2 key-value heads"),
        (
            "llama",
            {"narrower": {"hidden_size": 10}},
            r"student\.narrower: a llama wants a hidden_size \(10\) that its num_heads \(4\) divides",
        ),
        ("gemma2", {"narrower": {"hidden_size": 8}}, r"student\.narrower\.hidden_size: a Gemma scales its embeddings by the width"),
    ],
)
def test_what_a_teacher_cannot_give_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        student(family(model_type), **fields)


def test_key_value_heads_must_divide() -> None:
    with pytest.raises(RecipeError, match=r"^student\.num_kv_heads: 3 does not divide the teacher's 4; neighbours are averaged"):
        student(family("llama", kv_heads=4), num_kv_heads=3)


@pytest.fixture
def gpt2() -> Callable[[], LoadedModel]:
    config = AutoConfig.for_model("gpt2", vocab_size=24, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)
    return lambda: LoadedModel(AutoModelForCausalLM.from_config(config), TOKENIZER, 17)


def test_another_architecture_is_refused_by_name(gpt2: Callable[[], LoadedModel]) -> None:
    with pytest.raises(RecipeError, match=r"knows the parts of gemma, .*, and the teacher is a 'gpt2'; use student\.kind: config"):
        student(gpt2())
