"""Low-rank adapters (LoRA, DoRA) inside a student: put in before training, folded into the weights before it is written.

The model keeps its own class and forward; its projections become peft's layers, of which the adapters alone learn. An
artifact never holds adapters: whoever writes a student calls ``merge_adapters`` first. Needs the extra ``lora``.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from kd_core.errors import RecipeError, TrainingError
from kd_core.recipe import Adapter

__all__ = ["adapter_parameters", "add_adapters", "merge_adapters"]


def add_adapters(model: PreTrainedModel, adapter: Adapter, *, seed: int) -> PreTrainedModel:
    """The same model with adapters on its projections; everything else stands still. Its logits are what they were.

    Raises:
        RecipeError: peft is not installed, or the model has no module of a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RecipeError("student.adapter: needs the package peft; run: pip install 'knowledge-distillery[lora]'") from error
    _projections(model, adapter)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=list(adapter.modules),
    )
    inject_adapter_in_model(config, model)
    return model


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its adapters, if any, folded into plain weights.

    Raises:
        TrainingError: a merged weight is not finite.
    """
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.lora import Linear

    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise TrainingError(f"{name}: its adapter does not merge: {error}; lower training.learning_rate") from error
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    return model.requires_grad_(True)


def adapter_parameters(model: nn.Module, adapter: Adapter) -> int:
    """Parameters that the adapters of a model would have; its weights may be on the meta device.

    Raises:
        RecipeError: the model has no module of a name.
    """
    projections = _projections(model, adapter)
    rows = sum(module.out_features for module in projections) if adapter.kind == "dora" else 0
    return rows + sum(adapter.rank * (module.in_features + module.out_features) for module in projections)


def _projections(model: nn.Module, adapter: Adapter) -> list[nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {name.rpartition(".")[2] for name in linear}
    if missing := [name for name in adapter.modules if name not in names]:
        raise RecipeError(
            f"student.adapter.modules: a {type(model).__name__} has no {', '.join(missing)}; it has {', '.join(sorted(names))}"
        )
    return [module for name, module in linear.items() if name.rpartition(".")[2] in adapter.modules]
