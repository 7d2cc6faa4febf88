"""The kinds of source behind three questions: which rows, which identity, about how many.

Owns the dispatch and the Hugging Face data sets; files, images and generated families have modules of their own. Identity is
content: a moved file is the same file, and a data set is its pinned revision.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from kd_core.errors import SourceError
from kd_core.fingerprint import fingerprint
from kd_core.prompts.files import file_rows, file_sha256, find_source_files, local_file
from kd_core.prompts.generated import generate_rows
from kd_core.prompts.images import SCIKIT_LEARN_ROWS, folder_identity, folder_rows, named_image, scikit_learn_identity, scikit_learn_rows
from kd_core.prompts.messages import read_chat
from kd_core.prompts.rows import RawRow
from kd_core.prompts.templates import Template, compile_template, expect_column, fill
from kd_core.prompts.values import batch_rows
from kd_core.recipe import DatasetSource, FileSource, FolderSource, ReasoningGymSource, S3Options, ScikitLearnSource, Source

__all__ = ["estimate_rows", "read_source", "source_identity"]


def read_source(source: Source, *, where: str, s3: S3Options, images: bool = False) -> Iterator[tuple[str, RawRow]]:
    """Every row of a source with its label ('file:train.jsonl', 'dataset:openai/gsm8k', 'reasoning_gym:chain_sum').

    Args:
        source: the source as the recipe states it.
        where: the recipe's path to it, such as 'prompts.sources.0', for messages.
        s3: how to reach s3:// files.
        images: whether the prompts of a table are paths of images, seen from it.

    Raises:
        SourceError: it cannot be read, or has another form than stated.
    """
    match source:
        case FileSource():
            rows = islice(_file_source_rows(source, where, s3), source.limit)
            yield from (_with_images(rows, source, where, s3) if images else rows)
        case DatasetSource():
            yield from ((f"dataset:{source.id}", row) for row in _dataset_rows(source, where))
        case ReasoningGymSource():
            yield from ((f"reasoning_gym:{source.task}", row) for row in generate_rows(source, where=where))
        case FolderSource():
            yield from ((f"folder:{Path(source.path).name}", row) for row in folder_rows(source, where=where))
        case ScikitLearnSource():
            yield from ((f"scikit_learn:{source.dataset}", row) for row in scikit_learn_rows(source))


def source_identity(source: Source, *, s3: S3Options, where: str = "source", images: bool = False) -> dict[str, Any]:
    """Plain data that decides a source's rows, for the fingerprint; reads files, never the network of a data set.

    Args:
        source: the source as the recipe states it.
        s3: how to reach s3:// files.
        where: the recipe's path to it, for messages.
        images: whether the prompts of a table are paths of images, whose content then counts too.

    Returns:
        Its kind and own fields; for files the sha256 and base name of each, instead of the path.

    Raises:
        SourceError: a file is missing, or a template is not one.
    """
    match source:
        case FileSource():
            _form(source, where)
            files = find_source_files(source.path, where=where, s3=s3)
            content = [{"name": file.name, "sha256": file_sha256(file)} for file in files]
            pictures = _image_hashes(source, where, s3) if images and source.messages is None else None
            return {"files": content, **source.model_dump(mode="json", exclude={"path"}), "images": pictures}
        case DatasetSource():
            _form(source, where)
            return source.model_dump(mode="json")
        case ReasoningGymSource():
            return {"version": metadata.version("reasoning-gym"), **source.model_dump(mode="json")}
        case FolderSource():
            return folder_identity(source, where=where)
        case ScikitLearnSource():
            return scikit_learn_identity(source)


def estimate_rows(source: Source) -> int | None:
    """How many rows at most, without reading anything; None where only reading would tell."""
    if isinstance(source, ScikitLearnSource):
        return min(num for num in (SCIKIT_LEARN_ROWS[source.dataset], source.limit) if num is not None)
    return source.num if isinstance(source, ReasoningGymSource) else source.limit


@dataclass(frozen=True)
class _Form:
    """How a row of columns becomes a prompt with its gold answer and reference."""

    where: str
    prompt: Template | None
    gold: Template | None
    messages: str | None
    reference: Template | None

    @property
    def columns(self) -> list[str]:
        """The columns it needs, each once."""
        used = [column for template in (self.prompt, self.gold, self.reference) if template for column in template.columns]
        return list(dict.fromkeys([*used, *([self.messages] if self.messages else [])]))

    def read(self, row: Mapping[str, Any], at: str) -> RawRow:
        if self.messages is None:
            return RawRow(at, fill(self.prompt, row, at=at), fill(self.gold, row, at=at), fill(self.reference, row, at=at))
        expect_column(self.messages, row, at=at, needed_by=f"{self.where}.messages")
        turns, gold = read_chat(row[self.messages], column=self.messages, at=at)
        return RawRow(at, turns, gold, fill(self.reference, row, at=at))


def _form(source: FileSource | DatasetSource, where: str) -> _Form:
    def template(field: str, text: str | None) -> Template | None:
        return None if text is None else compile_template(text, where=f"{where}.{field}")

    prompt, gold = template("prompt", source.prompt), template("gold", source.gold)
    return _Form(where, prompt, gold, source.messages, template("reference", source.reference))


def _file_source_rows(source: FileSource, where: str, s3: S3Options) -> Iterator[tuple[str, RawRow]]:
    form = _form(source, where)
    for file in find_source_files(source.path, where=where, s3=s3):
        for at, row in file_rows(file, form.columns):
            yield f"file:{file.name}", form.read(row, at)


def _with_images(rows: Iterator[tuple[str, RawRow]], source: FileSource, where: str, s3: S3Options) -> Iterator[tuple[str, RawRow]]:
    """Rows whose prompt is a path, with the image that lies there."""
    if source.path.startswith("s3://"):
        raise SourceError(f"{where}.path: images that a table on s3:// names are not read; copy table and images here, or use a folder")
    for label, row in rows:
        media = None if not row.prompt else named_image(_only_text(row), beside=_file_of(row.at), at=row.at)
        yield label, RawRow(row.at, None, row.gold, row.reference, media)


def _only_text(row: RawRow) -> str:
    if not isinstance(row.prompt, str):
        raise SourceError(f"{row.at}: a chat names no image; give the source a prompt, the column of paths")
    return row.prompt


def _file_of(at: str) -> str:
    """The file of a row's place: 'a/rows.csv:3' or 'a/rows.json row 3 (line 4)'."""
    return at.rpartition(" row ")[0] if " row " in at else at.rpartition(":")[0]


def _image_hashes(source: FileSource, where: str, s3: S3Options) -> str:
    """Fingerprint of the images that a table names, in its order."""
    rows = (row for _, row in islice(_file_source_rows(source, where, s3), source.limit))
    paths = (Path(_file_of(row.at)).parent / _only_text(row) for row in rows if row.prompt)
    return fingerprint([file_sha256(local_file(path)) if path.is_file() else None for path in paths])


def _dataset_rows(source: DatasetSource, where: str) -> Iterator[RawRow]:
    form = _form(source, where)
    rows = _load_dataset(source, where)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if set(form.columns) <= set(rows.column_names):
        rows = rows.select_columns(sorted(form.columns))  # images and audio of other columns are not decoded
    tables = rows.with_format("arrow").iter(batch_size=1000)
    for number, row in enumerate(row for table in tables for batch in table.to_batches() for row in batch_rows(batch)):
        yield form.read(row, f"{source.id} {source.split} row {number}")


def _load_dataset(source: DatasetSource, where: str) -> Any:
    import datasets

    if Path(source.id).exists():  # load_dataset would prefer it to the hub, and no revision pins it
        raise SourceError(
            f"{where}.id: {source.id!r} is also a local path, which would be read instead of the hub; use kind: file for local data"
        )
    try:
        return datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises a different one for each way of being offline, absent or gated
        raise SourceError(
            f"{where}: data set {source.id} (config {source.config}, split {source.split}, revision {source.revision[:12]}) "
            f"cannot be loaded: {type(error).__name__}: {error}; check the id, config, split and network, or download it and use kind: file"
        ) from error
