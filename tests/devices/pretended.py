"""A device that is not the CPU, pretended on the CPU: what meets across devices raises, as on CUDA, and what waits for it is counted.

A tensor "on" it wraps a CPU tensor; every operator is dispatched to ``_run``, which refuses a CPU tensor beside one of the device,
computes on the wrapped ones and wraps the result. Numbers and gradients are real. What it is not: autocast does nothing, there
are no streams, kernels, or ranks, and ``inference_mode`` is ``no_grad`` because a wrapper cannot be an inference tensor.

torch learns of a device once a process, for good, and before the first backward pass (autograd starts one thread a device then).
So ``register`` belongs to a pytest session of its own: ``pytest --pretended``, which ``test_pretended.py`` starts.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
_ROOT = f"{Path(__file__).parents[2]}/"
_OURS = (f"{_ROOT}kd_core/", f"{_ROOT}tests/")
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
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not (frame.f_code.co_filename.startswith(_OURS) and frame.f_code.co_filename != __file__):
            frame = frame.f_back
        place = "elsewhere" if frame is None else f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno}"
        self[f"{operator} at {place}"] += 1


waits = Waits()


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
        """Wait once, as CUDA does."""
        waits.add("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError(f"a tensor on {NAME} has no numpy(); copy it to the CPU first")

    def untyped_storage(self) -> torch.UntypedStorage:
        """What tells tied weights from others."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """Likewise."""
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:
        """Without autograd."""
        return self.detach()

    @data.setter
    def data(self, value: "_OnDevice") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A parameter's copy is a parameter."""
        copied: Tensor = _OnDevice(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

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
    tensors: list[Tensor] = []
    held_args, held_kwargs = _held(args, tensors), {name: _held(value, tensors) for name, value in kwargs.items()}
    mine = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    wanted = kwargs.get("device")
    target = (NAME if mine else "cpu") if wanted is None else torch.device(wanted).type
    if mine and func not in _COPIES:
        _refuse_mixes(func, args, tensors, mine)
    if _waits_for_device(func, args, tensors, mine, target, kwargs):
        waits.add(func._schema.name.removeprefix("aten::"))
    if wanted is not None:
        held_kwargs["device"] = torch.device("cpu" if target == NAME else target)
    out = func(*held_args, **held_kwargs)
    if target != NAME:
        return out
    return _wrapped(out, {id(tensor.held): tensor for tensor in mine})


def _held(value: Any, seen: list[Tensor]) -> Any:
    """What is wrapped, in lists too; every tensor met on the way goes to ``seen``."""
    if isinstance(value, list | tuple):
        return type(value)(_held(one, seen) for one in value)
    if isinstance(value, Tensor):
        seen.append(value)
    return value.held if isinstance(value, _OnDevice) else value


def _wrapped(value: Any, given: dict[int, _OnDevice]) -> Any:
    """Results on the device; an operator that works in place, or has an out=, gives back the tensor that it was given."""
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(one, given) for one in value)
    return given.get(id(value)) if id(value) in given else _OnDevice(value) if isinstance(value, Tensor) else value


def _refuse_mixes(func: Any, args: Any, tensors: Sequence[Tensor], mine: Sequence[Tensor]) -> None:
    """What CUDA refuses: a tensor of another device, but for a number and for what indexes a tensor of the device."""
    if func in _INDEXED:
        into = args[0]
        tensors = [into, *args[2:3]] if isinstance(into, _OnDevice) else [into, *mine]
    numbers_too = func in (_aten.cat.default, _aten.stack.default)
    for other in tensors:
        if isinstance(other, Tensor) and not isinstance(other, _OnDevice) and (other.dim() > 0 or numbers_too):
            raise RuntimeError(f"{func}: a tensor of shape {tuple(other.shape)} is on {other.device}, and another one on {NAME}")


def _waits_for_device(func: Any, args: Any, tensors: Sequence[Tensor], mine: Sequence[Tensor], target: str, kwargs: dict[str, Any]) -> bool:
    if func is _aten._to_copy.default:
        return bool(mine) != (target == NAME) and not (target == NAME and kwargs.get("non_blocking", False))
    if not mine:
        return False
    if func is _aten.copy_.default:
        return len(mine) == 1 and not (isinstance(args[0], _OnDevice) and (*args, False)[2])
    if func in _INDEXED:  # a mask's size is on the device; an index on the CPU is copied to it
        return any(index.dtype == torch.bool or (not isinstance(index, _OnDevice) and index.dim() > 0) for index in tensors[1:])
    if func._schema.name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return func._schema.name.removeprefix("aten::") in _WAITING


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
    _device_constructors()  # remembers torch.tensor at its first call, for ``with torch.device(...)``: the one of torch
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[assignment,misc]
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to(device) keeps parameters, and so ties, as on CUDA


@contextmanager
def pretending() -> Iterator[None]:
    """Within: tensors can be made on the device, and ``waits`` are counted from none."""
    waits.clear()
    torch.tensor = _tensor  # type: ignore[assignment]
    try:
        with _Dispatch():
            yield
    finally:
        torch.tensor = _unregistered_tensor
