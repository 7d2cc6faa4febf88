"""Who teaches and who learns, from one word each: a model of the hub or of a directory, a server, a share of the teacher's blocks."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from kd_core.errors import RecipeError, TeacherError
from kd_core.recipe import ModelRef
from kd_core.recipe.addresses import check_address
from kd_core.teacher.reference import locate
from kd_core.teacher.server import API_KEY_VARIABLE

__all__ = ["class_student_of", "class_teacher_of", "student_of", "teacher_of"]

_SHARE = re.compile(r"1/([1-9][0-9]?)")
_PINNED = re.compile(r"(.+)@([0-9a-f]{40})")


def teacher_of(word: str, *, folder: Path) -> dict[str, Any]:
    """Fields of the recipe's teacher; with ``url``, which belongs to run.teacher_url, where it is a server.

    Args:
        word: a model as for ``student_of``, or http(s)://host:port/v1 of a server with one model, or with #MODEL behind it.
        folder: where the recipe will be, from which its relative paths start.

    Raises:
        TeacherError, RecipeError: there is no such model, or the server does not say which it has.
    """
    if word.startswith(("http://", "https://")):
        url, _, model = word.partition("#")
        url = check_address(url, field="--teacher", instead=API_KEY_VARIABLE)
        return {"kind": "server", "model": model or _served(url), "revision": "unknown", "url": url}
    return {"kind": "pretrained", **_model(word, folder, flag="--teacher")}


def student_of(word: str, *, teacher: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of the recipe's student.

    Args:
        word: 1/2, 1/3 ...: every second, third ... block of the teacher; or a hub id, perhaps with @commit, a directory (from the
            working directory), or pkg://package/file.gguf.
        teacher: its fields.
        folder: where the recipe will be.

    Raises:
        TeacherError, RecipeError: there is no such model, or the teacher has no blocks to give.
    """
    if (share := _SHARE.fullmatch(word)) is None:
        return {"kind": "pretrained", **_model(word, folder, flag="--student")}
    if teacher["kind"] == "server":
        raise RecipeError("--student: a server's model has no blocks to give here; name a model, such as a hub id or a directory")
    return {"kind": "from_teacher", "every_nth_block": int(share[1])}


_TEXT_SIZES = {
    "teacher": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "student": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128},
}
_IMAGE_SIZES = {
    "teacher": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "student": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
}
_LARGEST_EDGE = 64
_NEW_TRAINING = {"steps": 600, "batch_rows": 32, "learning_rate": 0.001, "warmup_steps": 50}
_TUNING = {"steps": 300, "batch_rows": 32, "learning_rate": 0.00005, "warmup_steps": 30}


def class_teacher_of(word: str | None, *, image_edge: int | None, folder: Path) -> dict[str, Any]:
    """Fields of a teacher of classes: a small new one that is trained first, or a pre-trained model that is tuned.

    Args:
        word: None for a new one, or a model as for ``student_of``.
        image_edge: longer edge of the images, pixels; None where texts are classified.
        folder: where the recipe will be.

    Raises:
        TeacherError, RecipeError: there is no such model, or it is behind a server.
    """
    if word is None:
        return {"kind": "trained_classifier", **_new_classifier("teacher", image_edge), "training": _NEW_TRAINING}
    if word.startswith(("http://", "https://", "pkg://")):
        raise RecipeError(f"--teacher: {word} tells no classes; name a model of the hub or a directory, or leave it out for a new one")
    return {"kind": "trained_classifier", **_model(word, folder, flag="--teacher"), "training": _TUNING}


def class_student_of(word: str | None, *, image_edge: int | None, folder: Path) -> dict[str, Any]:
    """Fields of a student of classes; see ``class_teacher_of``.

    Raises:
        TeacherError, RecipeError: there is no such model, or a share of the teacher is asked for.
    """
    if word is None:
        return {"kind": "new_classifier", **_new_classifier("student", image_edge)}
    if _SHARE.fullmatch(word):
        raise RecipeError(
            f"--student: {word} of a teacher is for models that write; leave it out for a small new classifier, or name a model"
        )
    return {"kind": "pretrained", **_model(word, folder, flag="--student")}


def _new_classifier(role: str, image_edge: int | None) -> dict[str, Any]:
    if image_edge is None:
        return {"family": "bert", "config": {**_TEXT_SIZES[role], "max_position_embeddings": 128}}
    edge = min(_LARGEST_EDGE, -(-image_edge // 8) * 8)
    return {"family": "vit", "config": {"image_size": edge, "patch_size": edge // 4 if edge <= 16 else edge // 8, **_IMAGE_SIZES[role]}}


def _model(word: str, folder: Path, *, flag: str) -> dict[str, Any]:
    if pinned := _PINNED.fullmatch(word):
        return {"model": pinned[1], "revision": pinned[2]}
    if word.startswith("pkg://"):
        locate(ModelRef(model=word))
        return {"model": word}
    path = Path(word).expanduser()
    if path.is_dir():
        return {"model": word if path.is_absolute() or word.startswith("~") else os.path.relpath(word, folder)}
    return {"model": word, "revision": _newest(word, flag)}


def _newest(name: str, flag: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().model_info(name).sha)
    except Exception as error:  # the hub client raises a different one for each way of being offline, absent or gated
        reason = (str(error).splitlines() or [""])[0]
        raise TeacherError(
            f"{flag}: no directory {name!r} is here, and the hub's newest commit of it cannot be found: {type(error).__name__}: "
            f"{reason}; check the name and the network, or state the commit: NAME@40-hex-digits"
        ) from error


def _served(url: str) -> str:
    """The one model that a server has."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    try:
        reply = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10.0)
        reply.raise_for_status()
        names = [str(model["id"]) for model in reply.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise TeacherError(f"--teacher: {url}/models does not say which models there are ({error}); name one: {url}#MODEL") from error
    if len(names) != 1:
        raise TeacherError(f"--teacher: the server has {len(names)} models ({', '.join(names[:8])}); name one: {url}#MODEL")
    return names[0]
