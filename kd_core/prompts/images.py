"""Images as rows: a folder with one folder a class, images that a table names, and those that scikit-learn brings along.

Owns finding and checking them. An image is what its file holds: two files of the same bytes are one image, and a picture that was
encoded again is another. Every image is opened once when it is collected, so a broken one is named before anything is paid for.
"""

import io
from collections.abc import Iterator
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kd_core.errors import SourceError
from kd_core.fingerprint import fingerprint
from kd_core.prompts.files import file_sha256, local_file
from kd_core.prompts.rows import RawRow
from kd_core.recipe import FolderSource, ScikitLearnSource

__all__ = ["SCIKIT_LEARN_ROWS", "folder_identity", "folder_rows", "named_image", "scikit_learn_identity", "scikit_learn_rows"]

SCIKIT_LEARN_ROWS = {"digits": 1797}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


def folder_rows(source: FolderSource, *, where: str) -> Iterator[RawRow]:
    """The images of a folder, each with its class.

    Raises:
        SourceError: there is no such folder or no image in it, a file is no image, or it is broken.
    """
    for path, name in _folder_files(source, where):
        yield RawRow(str(path), None, name, name, media=_checked(path.read_bytes(), str(path)))


def folder_identity(source: FolderSource, *, where: str) -> dict[str, Any]:
    """Plain data that decides a folder's rows: every image's class and content, whatever the folder is called."""
    content = [(path.name, name, file_sha256(local_file(path))) for path, name in _folder_files(source, where)]
    return {"kind": source.kind, "images": fingerprint(content), "limit": source.limit}


def _folder_files(source: FolderSource, where: str) -> list[tuple[Path, str | None]]:
    """(image, class), cut to the limit: each class in turn, so that a part of them holds every class."""
    root = Path(source.path).expanduser()
    if not root.is_dir():
        raise SourceError(f"{where}.path: no folder at {source.path!r}; put one there, or name another with --set {where}.path=...")
    groups: list[list[tuple[Path, str | None]]] = [[(path, None) for path in _images(root)]]
    for folder in (path for path in sorted(root.iterdir()) if _is_seen(path) and path.is_dir()):
        groups.append([(path, folder.name) for path in _images(folder)])
    found = [file for files in zip_longest(*groups) for file in files if file is not None]
    if not found:
        raise SourceError(f"{where}.path: no image in {source.path!r}; expected {source.path}/<class>/<image> with {', '.join(ENDINGS)}")
    return found[: source.limit]


def _images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if _is_seen(path) and path.is_file())
    if other := [path for path in files if path.suffix.lower() not in ENDINGS]:
        raise SourceError(f"{other[0]}: ends in none of {', '.join(ENDINGS)}; a folder of images holds nothing else: move it away")
    return files


def _is_seen(path: Path) -> bool:
    return not path.name.startswith(".")


def named_image(name: str, *, beside: str, at: str) -> bytes:
    """The image that a row of a table names.

    Args:
        name: its path, seen from the table's folder.
        beside: the table's own address.
        at: file and line of the row, for messages.

    Raises:
        SourceError: it cannot be read, or is no image.
    """
    path = Path(beside).parent / name
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(f"{at}: image {name!r} cannot be read: {error}; paths are seen from the folder of {beside}") from error
    return _checked(data, f"{at}: image {name!r}")


def _checked(data: bytes, at: str) -> bytes:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{at}: no image that can be read: {error}; repair or remove it") from error
    return data


def scikit_learn_rows(source: ScikitLearnSource) -> Iterator[RawRow]:
    """The images of a data set that scikit-learn holds, as PGM: bytes that no encoder's version changes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        if source.limit is not None and number >= source.limit:
            return
        grey = (pixels * 255.0 / 16.0).round().astype("uint8")  # 0 to 16 there
        data = b"P5 %d %d 255\n" % grey.shape[::-1] + grey.tobytes()
        name = str(int(target))
        yield RawRow(f"scikit-learn {source.dataset} row {number}", None, name, name, media=data)


def scikit_learn_identity(source: ScikitLearnSource) -> dict[str, Any]:
    """Plain data that decides these rows."""
    return {"version": metadata.version("scikit-learn"), **source.model_dump(mode="json")}
