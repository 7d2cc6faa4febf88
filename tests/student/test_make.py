"""Students: from blocks keeps exactly the named blocks and leaves the teacher alone; from a config is a function of its seed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_core.errors import RecipeError
from kd_core.recipe import Architecture, CharacterTokenizer
from kd_core.student.make import new_model, student_from_blocks
from kd_core.tokens.encoding import character_tokenizer

TOKENIZER = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="01+="))
SIZE = Architecture(hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, intermediate_size=32, max_positions=64)
IDS = torch.tensor([[2, 3, 4, 5, 1]])


def test_every_second_block_of_four_is_blocks_0_and_2(tiny_model) -> None:
    teacher = tiny_model(num_layers=4)
    before = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    student = student_from_blocks(teacher, 2)
    assert len(student.model.layers) == student.config.num_hidden_layers == 2
    for kept, block in zip((0, 2), student.model.layers, strict=True):
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, before[f"model.layers.{kept}.{name}"])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.state_dict()[name], before[name])
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        for weight in student.parameters():
            weight.zero_()
    assert len(teacher.model.model.layers) == teacher.model.config.num_hidden_layers == 4
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_all_blocks_give_the_teacher_itself(tiny_model) -> None:
    teacher = tiny_model(num_layers=4)
    student = student_from_blocks(teacher, 1).eval()
    torch.testing.assert_close(student(input_ids=IDS).logits.detach(), teacher.model(input_ids=IDS).logits, rtol=0, atol=0)


def test_a_student_from_blocks_decodes_with_a_cache_and_survives_saving(tiny_model, tmp_path) -> None:
    """Blocks carry their own index into the key-value cache; it must follow them to their new place."""
    student = student_from_blocks(tiny_model(num_layers=5), 2).eval()
    whole = student(input_ids=IDS, use_cache=False).logits
    first = student(input_ids=IDS[:, :3], use_cache=True)
    rest = student(input_ids=IDS[:, 3:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 3:], rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, whole, rtol=0, atol=0)


def test_a_half_precision_teacher_gives_a_float32_student(tiny_model) -> None:
    teacher = tiny_model(num_layers=4)
    teacher.model.bfloat16()
    assert {p.dtype for p in student_from_blocks(teacher, 2).parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}


def test_too_few_blocks_are_refused(tiny_model) -> None:
    with pytest.raises(RecipeError, match=r"student\.every_nth_block: 4, and the teacher has 4 blocks; use at most 3"):
        student_from_blocks(tiny_model(num_layers=4), 4)


def test_a_new_model_is_a_function_of_its_seed_and_has_exactly_the_tokenizers_columns() -> None:
    first, again, other = (new_model(SIZE, TOKENIZER, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    assert first(input_ids=IDS).logits.shape == (1, 5, 6)
    assert first.config.eos_token_id == TOKENIZER.eos_token_id
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert (len(first.model.layers), first.config.hidden_size, first.config.num_key_value_heads) == (3, 16, 1)


def test_an_end_token_that_pads_too_starts_and_learns_like_any_other() -> None:
    tokenizer = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="01+="))
    tokenizer.pad_token = tokenizer.eos_token
    model = new_model(SIZE, tokenizer, seed=5)
    assert model.config.pad_token_id == model.config.eos_token_id == 1
    assert model.model.embed_tokens.weight[1].abs().sum() > 0
    embedded = model.model.embed_tokens(torch.tensor([1]))
    embedded.sum().backward()
    assert model.model.embed_tokens.weight.grad[1].abs().sum() > 0
