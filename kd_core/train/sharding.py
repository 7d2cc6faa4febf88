"""Weights in slices over ranks: each holds its part of every parameter, gradient and optimiser state (FSDP2, ``fully_shard``).

Blocks are gathered one at a time while they run; what lies outside them (embeddings, last norm, projection, a tied one once) is gathered
for the whole pass, so the loss finds a whole projection and its gradient goes to the slices like any other.

torch's own ``fully_shard`` and not accelerate's preparation: the latter does the same on GPUs and, on CPU ranks, silently keeps whole
copies. A launcher's request (``accelerate launch --use_fsdp``) is taken all the same; what it asks for beyond that is refused.
"""

import os

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from kd_core.errors import TrainingError
from kd_core.recipe import Run

__all__ = ["part_of", "shall_shard", "shard", "slice_of", "whole"]


def shall_shard(run: Run, num_ranks: int) -> bool:
    """Tell whether weights are sliced: ``run.shard_weights`` or the launcher asks for it, and there is more than one rank.

    Raises:
        TrainingError: the launcher asks for a kind of FSDP that is not done here, or ``run.compile`` is on.
    """
    asked = {name: os.environ.get(name, "false").lower() for name in ("ACCELERATE_USE_FSDP", *_REFUSED)}
    by_launcher = asked["ACCELERATE_USE_FSDP"] == "true"
    if by_launcher:
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise TrainingError(f"launched with FSDP version {version}: version 2 is done here; add --fsdp_version 2")
        for name, instead in _REFUSED.items():
            if asked[name] == "true":
                raise TrainingError(f"launched with {name}=true, which is not done here; {instead}")
    if (run.shard_weights or by_launcher) and run.compile:
        raise TrainingError("run.compile with sliced weights: not known to give the same numbers; use one of the two")
    return (run.shard_weights or by_launcher) and num_ranks > 1


_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "leave it out, and set run.activation_checkpointing: true",
}


def shard(module: nn.Module, blocks: list[str], *, device: torch.device, num_ranks: int, methods: tuple[str, ...]) -> FSDPModule:
    """Slice a module in place, from rank 0's weights.

    Args:
        module: all ranks have the same one, on any device.
        blocks: class names of the submodules that are gathered one at a time.
        device: of this rank.
        num_ranks: of the run.
        methods: names of methods beside ``forward`` that need weights.
    """
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            moved = tensor.detach().to(device)
            broadcast(moved, 0)
            tensor.copy_(moved)
    mesh = init_device_mesh(device.type, (num_ranks,))
    for block in [inner for inner in module.modules() if type(inner).__name__ in blocks]:
        fully_shard(block, mesh=mesh)
    sharded = fully_shard(module, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return sharded


def slice_of(tensor: Tensor) -> Tensor:
    """Slice of a tensor on this rank, sharing memory; all of a tensor that is not sliced."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Gather all of a tensor, on the CPU. All ranks must ask for it together if it is sliced.

    Args:
        tensor: sliced or not; or this rank's part of one
        like: that is sliced as this one is.
    """
    if like is not None and isinstance(like, DTensor):
        part = tensor.to(like.device)
        tensor = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sliced as ``like`` is; without any communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
