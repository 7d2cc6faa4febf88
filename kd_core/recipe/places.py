"""Places that a recipe file names: files and models beside it are found from its own folder, wherever it is read.

Only a file's own text is taken so; overrides are typed in a working directory and mean that one. A place is no part of identity,
which is content, so nothing is computed again when a folder moves.
"""

from pathlib import Path
from typing import Any

__all__ = ["from_folder"]

_FILES = ("file", "folder")
_MODELS = ("pretrained", "trained_classifier")


def from_folder(data: Any, folder: Path) -> None:
    """Turn relative paths of sources and local models in a recipe's data, in place, into paths from a folder.

    A model is local if it names no package and no pinned revision, and such a directory is there; an absolute path, one that
    begins with ~ and an s3:// address stay what they are.

    >>> data = {"sources": [{"kind": "file", "path": "a.jsonl"}, {"kind": "file", "path": "s3://b/a.jsonl"}]}
    >>> from_folder(data, Path("recipes"))
    >>> [source["path"] for source in data["sources"]]
    ['recipes/a.jsonl', 's3://b/a.jsonl']
    """
    _walk(data, folder, set())


def _walk(data: Any, folder: Path, seen: set[int]) -> None:
    if id(data) in seen or not isinstance(data, dict | list):  # an alias of YAML is the same object in two places
        return
    seen.add(id(data))
    if isinstance(data, dict):
        kind, path, model = data.get("kind"), data.get("path"), data.get("model")
        if kind in _FILES and isinstance(path, str):
            data["path"] = _beside(path, folder)
        if kind in _MODELS and isinstance(model, str) and data.get("revision") is None and _is_directory(model, folder):
            data["model"] = _beside(model, folder)
    for value in data.values() if isinstance(data, dict) else data:
        _walk(value, folder, seen)


def _beside(path: str, folder: Path) -> str:
    return path if "://" in path or path.startswith("~") else str(folder / path)


def _is_directory(model: str, folder: Path) -> bool:
    """Whether it is meant as one: here too, so that a directory of the working directory is not taken for one beside the recipe."""
    return "://" not in model and ((folder / model).is_dir() or Path(model).is_dir())
