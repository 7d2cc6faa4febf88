"""Where the data is, and its first rows: a file, a glob or an address in S3, or a data set of the hub."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from kd_core.errors import SourceError
from kd_core.prompts.files import file_rows, find_source_files
from kd_core.prompts.images import ENDINGS
from kd_core.prompts.readers import READERS, format_of
from kd_core.prompts.values import batch_rows
from kd_core.recipe import S3Options

__all__ = ["NUM_ROWS", "Sample", "look_at", "slug"]

NUM_ROWS = 200
"""Rows that are looked at."""
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[0-9a-f]{40}))?")
_GENERAL = ("train", "training", "data", "test", "dataset", "default", "main")


@dataclass(frozen=True)
class Sample:
    """The first rows of a source.

    Attributes:
        source: fields of the recipe's source that say where it is.
        rows: at most NUM_ROWS, column name -> text, None, list or mapping.
        name: what a recipe of it may be called.
        image_edge: longer edge of the first image, pixels, of a folder of images; None of all else.
    """

    source: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    name: str
    image_edge: int | None = None


def look_at(data: str, *, folder: Path) -> Sample:
    """The first rows of what a user names.

    Args:
        data: a path or a glob from the working directory, a folder with a folder of images a class, s3://bucket/key, or a hub id with or
            without @revision.
        folder: where the recipe will be, from which its relative paths start.

    Raises:
        SourceError: there is no such thing, or it has no rows.
    """
    hub = _HUB_ID.fullmatch(data)
    if hub is not None and not Path(data).exists() and format_of(data) not in READERS:
        return _of_hub(hub["id"], hub["revision"])
    path = Path(data).expanduser()
    if path.is_dir():
        return _of_folder(data, path, folder)
    if "://" not in data and not path.exists() and not set("*?[") & set(data):
        raise SourceError(f"--data: there is no file {data!r} here; name a file, or a data set of the hub such as openai/gsm8k")
    rows: list[Mapping[str, Any]] = []
    for file in find_source_files(data, where="--data", s3=S3Options()):
        rows.extend(row for _, row in islice(file_rows(file, None), NUM_ROWS - len(rows)))
    parts = [part for part in (PurePosixPath(data).stem.partition(".")[0], path.absolute().parent.name) if slug(part)]
    name = next((part for part in parts if part.lower() not in _GENERAL), "first")
    return Sample({"kind": "file", "path": _from(data, folder)}, _some(rows, data), slug(name))


def _from(data: str, folder: Path) -> str:
    """A path as a recipe in a folder names it."""
    return data if "://" in data or Path(data).is_absolute() or data.startswith("~") else os.path.relpath(data, folder)


def _of_folder(data: str, path: Path, folder: Path) -> Sample:
    """A folder with one folder of images a class."""
    from PIL import Image

    classes = [one for one in sorted(path.iterdir()) if one.is_dir() and not one.name.startswith(".")]
    images = [next((file for file in sorted(one.iterdir()) if file.suffix.lower() in ENDINGS), None) for one in classes]
    found = [file for file in images if file is not None]
    if len(found) < 2:
        raise SourceError(
            f"--data: {data} is a folder without folders of images, one a class; name a file, or a glob such as '{data}/*.jsonl'"
        )
    try:
        with Image.open(found[0]) as image:
            edge = max(image.size)
    except OSError as error:
        raise SourceError(f"--data: {found[0]} is no image that can be read: {error}") from error
    return Sample({"kind": "folder", "path": _from(data, folder)}, (), slug(path.absolute().name) or "first", edge)


def _of_hub(name: str, revision: str | None) -> Sample:
    """A data set of the hub at a commit: the newest if none is named."""
    import datasets
    import huggingface_hub

    try:
        commit = revision or huggingface_hub.HfApi().dataset_info(name).sha
        config = _preferred(datasets.get_dataset_config_names(name, revision=commit), ("main", "default"))
        split = _preferred(datasets.get_dataset_split_names(name, config, revision=commit), ("train",))
        stream = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
        table = next(iter(stream.with_format("arrow").iter(batch_size=NUM_ROWS)))
    except Exception as error:  # the hub client raises a different one for each way of being offline, absent or gated
        reason = (str(error).splitlines() or [""])[0]
        raise SourceError(
            f"--data: no file {name!r} is here, and the hub's data set of that name cannot be read: {type(error).__name__}: {reason}; "
            "check the name and the network, or download it and name the file"
        ) from error
    rows = [row for batch in table.to_batches() for row in batch_rows(batch)]
    source = {"kind": "dataset", "id": name, "revision": commit, "config": config, "split": split}
    return Sample(source, _some(rows, name), slug(name.partition("/")[2]))


def _preferred(found: Sequence[str], wanted: Sequence[str]) -> str:
    return next((name for name in wanted if name in found), found[0])


def _some(rows: Sequence[Mapping[str, Any]], data: str) -> Sequence[Mapping[str, Any]]:
    if not rows:
        raise SourceError(f"--data: {data} has no rows")
    return rows


def slug(text: str) -> str:
    """A text as a recipe's name: small letters, digits and dashes.

    >>> slug("My Data_1")
    'my-data-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-")
