"""A finished student written as a directory, all of it or nothing.

Weights, config and tokenizer are the recorded bytes; only the generation config is written anew. Everything is made in a
hidden directory beside the target, on the CPU, and renamed at the end.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kd_core.artifacts import Record, materialize, read_bytes
from kd_core.errors import RecipeError
from kd_core.export.card import Card, recipe_text, render_card
from kd_core.export.lineage import Lineage, lineage_json
from kd_core.export.onnx_graph import ONNX_BOUND, ONNX_PACKAGES, onnx_forward, write_onnx
from kd_core.export.packages import require_packages
from kd_core.export.parity import Bound, Forward, Parity, compare_forms
from kd_core.export.quantized import QUANTIZED_BOUNDS, QUANTIZED_PACKAGES, Quantization, load_quantized, quantize_directory
from kd_core.fingerprint import sha256_file
from kd_core.recipe import Recipe
from kd_core.store import Store
from kd_core.store.scratch import scratch
from kd_core.teacher.models import LoadedModel, load_directory, load_tokenizer

__all__ = ["Exported", "export_student", "generation_config"]

_PARITY_ROWS, _PARITY_TOKENS = 8, 128
_PACKAGES = ("knowledge-distillery", "torch", "transformers", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: where.
        lineage: of the student.
        files: file name -> size_bytes and sha256; without the card and lineage.json, which name them.
        parity: a comparison with the float model for each further form.
    """

    directory: Path
    lineage: Lineage
    files: Mapping[str, Mapping[str, Any]]
    parity: tuple[Parity, ...]


def export_student(lineage: Lineage, store: Store, out: Path, *, quantize: Quantization | None, onnx: bool) -> Exported:
    """Write a finished student as a directory in the Hugging Face layout.

    Args:
        lineage: of the student, as ``collect_lineage`` found it.
        store: where its artifacts are; only read.
        out: the directory; it must be empty or not there.
        quantize: int8 weights instead of float ones; None keeps the recorded bytes.
        onnx: also an ONNX graph of the float model.

    Raises:
        RecipeError: the directory is in use, or cannot be made; or the student writes no text.
        IntegrityError: the student's bytes in the store are damaged.
        KDError: a package is missing, or a form is not the same model.
    """
    _ = lineage.recipe.text_task  # raises for a recipe whose student writes no text
    _refuse_occupied(out)
    packages: tuple[str, ...] = ()
    for flag, asked, needed in (("--quantize", quantize is not None, QUANTIZED_PACKAGES), ("--onnx", onnx, ONNX_PACKAGES)):
        if asked:
            require_packages(needed, wanted_by=flag)
            packages += needed
    if lineage.recipe.run.threads is not None:
        torch.set_num_threads(lineage.recipe.run.threads)
    with _renamed_to(out) as directory:
        _copy_model(store, lineage.student, directory)
        tokenizer = load_tokenizer(directory, trust_remote_code=lineage.recipe.trusts_code)
        float_model = load_directory(directory, device=torch.device("cpu"), tokenizer=tokenizer)
        generation = generation_config(lineage.recipe, float_model)
        generation.save_pretrained(directory)
        rows = _parity_rows(store, lineage, float_model)
        parity = (_onnx_form(directory, float_model, rows),) if onnx else ()
        if quantize is not None:
            parity = (*parity, _quantized_form(directory, float_model, rows, quantize))
            generation.save_pretrained(directory)
        (directory / "recipe.yaml").write_text(recipe_text(lineage.recipe), encoding="utf-8")
        files = _files(directory)
        made_by = {name: metadata.version(name) for name in (*_PACKAGES, *packages)}
        about = lineage_json(lineage, files=files, made_by=made_by) | {"parity": [asdict(found) for found in parity]}
        (directory / "lineage.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        card = Card(lineage, generation.to_diff_dict(), bool(float_model.tokenizer.chat_template), parity, made_by, quantize)
        (directory / "README.md").write_text(render_card(card), encoding="utf-8")
    return Exported(out, lineage, files, parity)


def _refuse_occupied(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RecipeError(f"--out {out}: it is there and is no directory; name a new one")
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"--out {out}: the directory is not empty, and nothing is overwritten; name a new one")


@contextmanager
def _renamed_to(out: Path) -> Iterator[Path]:
    """An empty directory that becomes ``out`` when all went well, and is gone when it did not."""
    target = out.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise RecipeError(f"--out {out}: nothing can be written there ({error.strerror}); name another directory") from error
    with made as name:
        directory = Path(name) / "export"
        directory.mkdir()
        yield directory
        try:
            os.replace(directory, target)  # fails where somebody has put files there in the meantime
        except OSError as error:
            raise RecipeError(f"--out {out}: the finished directory cannot take its place ({error.strerror}); name another one") from error


def _copy_model(store: Store, student: Record, directory: Path) -> None:
    """The student's model files, verified, as they were recorded."""
    with scratch() as path:
        shutil.copytree(materialize(store, student, path) / "model", directory, dirs_exist_ok=True)


def generation_config(recipe: Recipe, loaded: LoadedModel) -> GenerationConfig:
    """Greedy decoding as the evaluation does it: the same stop tokens, and no columns that no token has."""
    asked = recipe.evaluation.generate or recipe.answers
    pad, stops = loaded.tokenizer.pad_token_id, loaded.stop_ids
    unused = list(range(loaded.num_columns, loaded.model.config.get_text_config().vocab_size))
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=None if asked is None else asked.max_tokens,
        eos_token_id=list(stops),
        pad_token_id=stops[0] if pad is None else int(pad),
        bos_token_id=loaded.tokenizer.bos_token_id,
        suppress_tokens=unused or None,
    )


def _parity_rows(store: Store, lineage: Lineage, loaded: LoadedModel) -> list[list[int]]:
    """The model's token ids of a few texts: held-out gold answers where the recipe has them, else what was trained on."""
    for name in ("validation.parquet", "rows.parquet"):
        table = pq.read_table(BytesIO(read_bytes(store, lineage.records["curate"], name)), columns=["ids"])
        if table.num_rows:
            break
    rows: list[list[int]] = [ids[:_PARITY_TOKENS] for ids in table["ids"].slice(0, _PARITY_ROWS).to_pylist()]
    return rows if loaded.token_map is None else [loaded.token_map.trim(np.array(ids)).tolist() for ids in rows]


def _onnx_form(directory: Path, loaded: LoadedModel, rows: list[list[int]]) -> Parity:
    write_onnx(loaded.model, directory)
    return _same_model("onnx", loaded, onnx_forward(directory), rows, ONNX_BOUND)


def _quantized_form(directory: Path, loaded: LoadedModel, rows: list[list[int]], scheme: Quantization) -> Parity:
    quantize_directory(directory, scheme)
    return _same_model(scheme, loaded, _forward(load_quantized(directory)), rows, QUANTIZED_BOUNDS[scheme])


def _same_model(form: str, loaded: LoadedModel, other: Forward, rows: list[list[int]], bound: Bound) -> Parity:
    """Compare a form, read back as it was written, with the float model.

    Raises:
        KDError: it is not the same model.
    """
    return compare_forms(form, _forward(loaded.model), other, rows, num_columns=loaded.num_columns, bound=bound).require()


def _forward(model: PreTrainedModel) -> Forward:
    def forward(ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
        return logits_BTV

    return forward


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.relative_to(directory).as_posix(): {"size_bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}
