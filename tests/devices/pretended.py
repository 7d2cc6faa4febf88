"""A device that is not the CPU, pretended on the CPU: what meets across devices raises, as on CUDA, and what waits for the device is counted.

A tensor "on" it wraps a CPU tensor; every operator is dispatched to ``_run``, which refuses a CPU tensor beside one of the device,
computes on the wrapped ones and wraps the result. Numbers and gradients are real. What it is not: autocast does nothing, there
are no streams, kernels, or ranks, and ``inference_mode`` is ``no_grad`` because a wrapper cannot be an inference tensor.

torch learns of a device once a process, for good, and before the first backward pass (autograd starts one thread a device then).
So ``register`` belongs to a pytest session of its own: ``pytest --pretended``, which ``test_pretended.py`` starts.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
_ROOT = Path(__file__).parents[2]
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_WAITING = {
    *("_local_scalar_dense", "nonzero", "unique_consecutive", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero"),
    "repeat_interleave",  # the size of its result is on the device
}
_unregistered_tensor = torch.tensor


class Waits(Counter[str]):
    """How often the host waited for the device, by 'operator at file:line': as torch.cuda.set_sync_debug_mode sees it."""

    def add(self, operator: str) -> None:
        """Count one, at the innermost line of this project."""
        frames = [frame for frame in reversed(traceback.extract_stack()) if Path(frame.filename).is_relative_to(_ROOT)]
        own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
        place = f"{Path(own[0].filename).relative_to(_ROOT)}:{own[0].lineno}" if own else "elsewhere"
        self[f"{operator} at {place}"] += 1


_waits = Waits()


class _OnDevice(Tensor):
    """A tensor of the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "_OnDevice":
        wrapper: _OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """As CUDA's: one wait."""
        _waits.add("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA's: refused."""
        raise TypeError(f"a tensor on {NAME} has no numpy(); copy it to the CPU first")

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"


class _Dispatch(TorchDispatchMode):
    """Operators without a tensor of the device: those that make one, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on what is wrapped."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    mine = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    wanted = kwargs.get("device")
    target = (NAME if mine else "cpu") if wanted is None else torch.device(wanted).type
    if func not in _COPIES:
        _refuse_mixes(func, args, tensors, mine)
    if _waits_for_device(func, flat, mine, target, kwargs) or (func is _aten.copy_.default and _copy_waits(*args)):
        _waits.add(func._schema.name.removeprefix("aten::"))
    held = [value.held if isinstance(value, _OnDevice) else value for value in flat]
    held_args, held_kwargs = tree_unflatten(held, spec)
    if wanted is not None:
        held_kwargs["device"] = torch.device("cpu" if target == NAME else target)
    out = func(*held_args, **held_kwargs)
    if target != NAME or func is _aten._local_scalar_dense.default:
        return out
    given = {id(tensor.held): tensor for tensor in mine}  # what works in place, or with out=, gives back what it was given
    return tree_map(lambda value: given[id(value)] if id(value) in given else _wrapped(value), out)


def _wrapped(value: Any) -> Any:
    return _OnDevice(value) if isinstance(value, Tensor) else value


def _refuse_mixes(func: Any, args: Any, tensors: Sequence[Tensor], mine: Sequence[Tensor]) -> None:
    """What CUDA refuses: a tensor of another device, but for a number and for what indexes a tensor of the device."""
    if func in _INDEXED:
        tensors = [args[0], *([args[2]] if len(args) > 2 else []), *(mine if not isinstance(args[0], _OnDevice) else [])]
    numbers_too = func in (_aten.cat.default, _aten.stack.default)
    others = [tensor for tensor in tensors if not isinstance(tensor, _OnDevice) and (tensor.dim() > 0 or numbers_too)]
    if mine and others:
        raise RuntimeError(f"{func}: a tensor of shape {tuple(others[0].shape)} is on {others[0].device}, and another one on {NAME}")


def _waits_for_device(func: Any, flat: Sequence[Any], mine: Sequence[Tensor], target: str, kwargs: dict[str, Any]) -> bool:
    if func is _aten._to_copy.default:
        crosses = bool(mine) != (target == NAME)
        return crosses and not (target == NAME and kwargs.get("non_blocking", False))
    if not mine:
        return False
    if func in _INDEXED:  # a mask's size is on the device; an index on the CPU is copied to it
        return any(isinstance(v, Tensor) and (v.dtype == torch.bool or (not isinstance(v, _OnDevice) and v.dim() > 0)) for v in flat[1:])
    if func._schema.name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return func._schema.name.removeprefix("aten::") in _WAITING


def _copy_waits(into: Tensor, source: Tensor, non_blocking: bool = False) -> bool:
    crosses = isinstance(into, _OnDevice) != isinstance(source, _OnDevice)
    return crosses and not (isinstance(into, _OnDevice) and non_blocking)


def _tensor(data: Any, *args: Any, device: Any = None, **others: Any) -> Tensor:
    """torch.tensor, which copies to a device below where operators are dispatched."""
    if device is None or torch.device(device).type != NAME:
        return _unregistered_tensor(data, *args, device=device, **others)
    return _unregistered_tensor(data, *args, **others).to(device)


def register() -> None:
    """Make the device known to torch, for the rest of the process; before kd_core is imported and before any backward pass."""
    module = _DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    globals()["_library"] = library  # it is in force as long as it lives
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[assignment,misc]
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to(device) keeps parameters, and so ties, as on CUDA


@contextmanager
def pretending() -> Iterator[Waits]:
    """Within: tensors can be made on the device. Gives the waits, from none."""
    _waits.clear()
    torch.tensor = _tensor  # type: ignore[assignment]
    try:
        with _Dispatch():
            yield _waits
    finally:
        torch.tensor = _unregistered_tensor
