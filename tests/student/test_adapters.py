"""Adapters: the model as it was before the first step, adapters alone learn, merging changes the form and not the numbers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_core.errors import RecipeError, TrainingError
from kd_core.recipe import Adapter
from kd_core.student.adapters import adapter_parameters, add_adapters, merge_adapters
from kd_core.student.make import student_from_blocks

IDS = torch.tensor([[2, 3, 4, 5, 11, 7, 1]])


def adapter(kind: str, **fields: object) -> Adapter:
    return Adapter.model_validate({"kind": kind, "rank": 3, "alpha": 6.0, **fields})


def trained(model: torch.nn.Module) -> None:
    """A few steps, so that the adapters say something."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learnt, lr=0.5)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_speak_as_the_adapters_did(kind: str, tiny_model, tmp_path) -> None:
    teacher = tiny_model(num_layers=2)
    model = student_from_blocks(teacher, 1).eval()
    before = model(input_ids=IDS).logits.detach()
    names = set(model.state_dict())
    assert add_adapters(model, adapter(kind), seed=0) is model
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), before, rtol=1e-5, atol=1e-5)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_parameters(teacher.model, adapter(kind))
    trained(model)
    adapted = model(input_ids=IDS).logits.detach()
    assert (adapted - before).abs().max() > 0.1
    merge_adapters(model)
    assert set(model.state_dict()) == names
    assert {type(module) for module in model.modules()} == {type(module) for module in teacher.model.modules()}
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), adapted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits.detach(), adapted, rtol=1e-4, atol=1e-4)


def test_the_update_is_alpha_over_rank_b_a(tiny_model) -> None:
    model = student_from_blocks(tiny_model(), 1)
    plain = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    add_adapters(model, adapter("lora", modules=["up_proj"]), seed=0)
    trained(model)
    layer = model.model.layers[1].mlp.up_proj
    update = 6.0 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merge_adapters(model)
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, plain + update.detach())


def test_adapters_are_a_function_of_their_seed(tiny_model) -> None:
    first, again, other = (add_adapters(student_from_blocks(tiny_model(), 1), adapter("lora"), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_model_without_adapters_is_left_as_it_is(tiny_model) -> None:
    model = tiny_model().model
    assert merge_adapters(model) is model
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_without_such_projections_is_refused() -> None:
    config = AutoConfig.for_model("gpt_neox", vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(RecipeError, match=r"^student\.adapter\.modules: a GPTNeoXForCausalLM has no q_proj, .*; it has .*dense"):
        add_adapters(AutoModelForCausalLM.from_config(config), adapter("lora"), seed=0)


def test_a_merge_that_is_not_finite_ends_the_run(tiny_model) -> None:
    model = add_adapters(student_from_blocks(tiny_model(), 1), adapter("lora", modules=["q_proj"]), seed=0)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"^model\.layers\.0\.self_attn\.q_proj: its adapter does not merge: "):
        merge_adapters(model)
