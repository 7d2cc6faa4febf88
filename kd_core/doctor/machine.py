"""Checks of what a recipe stands on: packages, device, and that compared models differ in the one field that is compared."""

import shutil
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version

from kd_core.doctor.findings import Skipped
from kd_core.errors import KDError, TrainingError
from kd_core.recipe import PretrainedStudent, PretrainedTeacher, Recipe
from kd_core.stages.graph import build_graph
from kd_core.store import Store
from kd_core.teacher.models import pick_device

__all__ = ["check_compared_models", "check_device", "check_packages"]

_SAFE_SINCE = {
    "transformers": ("5.3", "earlier ones run code from a model's config.json without trust_remote_code"),
    "torch": ("2.6", "earlier ones can run code while loading a checkpoint"),
}
_GPU_SIGNS = (Path("/proc/driver/nvidia"), Path("/dev/nvidia0"))
_MAY_DIFFER = {"objective", "soft_labels", "hidden_states"}


def check_packages() -> str:
    """Versions that are known not to run code from a model's files."""
    found = {name: metadata.version(name) for name in _SAFE_SINCE}
    bad = [
        f"{name} {found[name]} is below {since}: {why}"
        for name, (since, why) in _SAFE_SINCE.items()
        if Version(found[name]) < Version(since)
    ]
    if bad:
        raise KDError(f"{'; '.join(bad)}; upgrade")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def check_device(recipe: Recipe) -> str:
    """The device is there, no GPU stands idle that the recipe would take, and it multiplies in the recipe's number formats."""
    sign = _gpu_sign()
    if sign is not None and recipe.run.device != "cpu" and not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda} and sees none"
        raise TrainingError(
            f"there is a GPU here ({sign}), and torch {torch.__version__} {build}: everything would run on the CPU; install a build that "
            "its driver knows (make setup TORCH=cu130, or another name of https://download.pytorch.org/whl), or set run.device: cpu"
        )
    device = pick_device(recipe.run.device)
    dtypes = {
        recipe.training.dtype,
        *(m.dtype for m in (recipe.teacher, recipe.student) if isinstance(m, PretrainedTeacher | PretrainedStudent)),
    }
    if "bfloat16" in dtypes and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError("the recipe asks for bfloat16, and this device has none; use float32")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    for name in sorted(dtypes):
        dtype = getattr(torch, name)
        error = float(((a.to(device, dtype) @ b.to(device, dtype)).cpu().double() - a.double() @ b.double()).abs().max())
        allowed = 256 * torch.finfo(dtype).eps
        if not error <= allowed:
            raise TrainingError(f"a 64 x 64 product in {name} on {device} is off by {error:.2g}, at most {allowed:.2g} is rounding")
    return f"{device}, {torch.get_num_threads()} threads; products are right in {' and '.join(sorted(dtypes))}"


def _gpu_sign() -> str | None:
    """What shows that this machine has an NVIDIA GPU, whatever torch says."""
    return next((str(path) for path in _GPU_SIGNS if path.exists()), shutil.which("nvidia-smi"))


def check_compared_models(recipe: Recipe, store: Store) -> str:
    """A compared model has the student's rows, steps, learning rate and first weights: only what supervises it differs."""
    others = [arm for arm in recipe.arms() if arm != "student"]
    if not others:
        raise Skipped("evaluation.compare names no trained model")
    nodes = build_graph(recipe, store)
    for arm in others:
        for seed in recipe.seeds:
            mine, theirs = nodes[f"student.{seed}"], nodes[f"{arm}.{seed}"]
            fields = {name for name in mine.identity if mine.identity[name] != theirs.identity.get(name)}
            above = {role for role in {*mine.upstream, *theirs.upstream} if mine.upstream.get(role) != theirs.upstream.get(role)}
            if unfair := (fields | above) - _MAY_DIFFER:
                raise TrainingError(
                    f"{theirs.name} differs from {mine.name} in {', '.join(sorted(unfair))}: it is no baseline; please report it"
                )
    training = recipe.training
    return (
        f"{', '.join(others)}: only the objective differs; all take {training.length} of {training.batch_rows} rows a step at "
        f"learning rate {training.learning_rate:g}, {len(recipe.seeds)} seeds each"
    )
