"""A finished teacher or student, asked a prompt: in the recipe's template, from the verified files of its finished nodes.

Each prompt is asked alone, as the recipe asks its own: there is no memory of earlier ones. A model that writes no text is refused.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from kd_core.artifacts import Record, workspace
from kd_core.errors import ArtifactError, RecipeError, SourceError, TeacherError
from kd_core.fingerprint import fingerprint
from kd_core.progress import silent
from kd_core.recipe import Answers, Recipe, ServerTeacher, Task
from kd_core.stages.graph import Graph, build_graph, find_node, selected_student
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.summaries import TrainSummary, of

if TYPE_CHECKING:
    from kd_core.teacher.models import LoadedModel

__all__ = ["DEFAULT_TOKENS", "Said", "Speaker", "Wanted", "longest_answer", "speaker_in", "speakers"]

Wanted = Literal["teacher", "student", "both"]

_WRITES = "ForCausalLM"
DEFAULT_TOKENS = 256
"""Longest answer where no recipe says how long they are."""


@dataclass(frozen=True)
class Said:
    """One answer.

    Attributes:
        text: without special tokens.
        finish_reason: 'stop', or 'length' where it was cut.
        tokens: that were generated; None of a server, which tells none.
        seconds: that it took.
    """

    text: str
    finish_reason: str
    tokens: int | None
    seconds: float


class Speaker(Protocol):
    """Somebody who answers."""

    @property
    def name(self) -> str:
        """How it is called on the screen: 'teacher', 'student (seed 2)' ..."""
        ...

    def answer(self, prompt: str, *, turn: int, temperature: float, max_tokens: int, on_tokens: Callable[[int], None]) -> Said:
        """Answer a prompt.

        Args:
            prompt: its text, not empty.
            turn: with a temperature, the same prompt in another turn is answered anew.
            temperature: 0 takes the likeliest token.
            max_tokens: of the answer; less where the model has no positions for so many.
            on_tokens: hears how many tokens each step made.

        Raises:
            SourceError: the prompt cannot be written in the model's tokens, or is too long for it.
            TeacherError: a server fails.
        """
        ...


def speakers(recipe: Recipe, store: Store, wanted: Wanted | None) -> list[Speaker]:
    """Load who is asked for.

    Args:
        recipe: whose models.
        store: where its artifacts are.
        wanted: None: both where a student is finished, else the teacher.

    Raises:
        ArtifactError: who is asked for is not finished in this store.
        IntegrityError: stored files are damaged.
        TeacherError: a model cannot be loaded.
    """
    nodes = build_graph(recipe, store)
    teacher, student = find_node(store, nodes["teacher"]), _student(recipe, store, nodes)
    if teacher is None or (student is None and wanted in ("student", "both")):
        who = "teacher" if wanted != "student" and teacher is None else "student"
        raise ArtifactError(f"{recipe.name} has no finished {who} in {store.uri} yet; run the recipe first (kd run), or ask the other one")
    found: list[Speaker] = []
    if wanted != "student":
        found.append(_Server(recipe) if isinstance(recipe.teacher, ServerTeacher) else _loaded(recipe, store, nodes, teacher, None))
    if student is not None and wanted != "teacher":
        found.append(_loaded(recipe, store, nodes, teacher, student))
    return found


def longest_answer(recipe: Recipe) -> int:
    """Tokens that the recipe lets an answer have where it evaluates, else where its teacher answers."""
    stated = recipe.evaluation.generate or recipe.answers
    return DEFAULT_TOKENS if stated is None else stated.max_tokens


def speaker_in(directory: Path) -> Speaker:
    """Load a model from a directory in the Hugging Face layout; asked by its chat template, or plainly where it has none.

    Raises:
        RecipeError: there is no model in it, or none that writes text.
        TeacherError: it cannot be loaded.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kinds = [str(kind) for kind in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{directory}: no model is there (config.json cannot be read); name a recipe, or a directory in the Hugging Face layout, as "
            "kd export writes it"
        ) from error
    if kinds and not any(kind.endswith(_WRITES) for kind in kinds):
        raise RecipeError(f"{directory}: holds a {kinds[0]}, which writes no text; kd chat is for causal language models")
    from kd_core.teacher.models import load_directory, load_tokenizer, pick_device

    tokenizer = load_tokenizer(directory)
    loaded = load_directory(directory, device=pick_device("auto"), tokenizer=tokenizer)
    return _Local(directory.name, loaded, Task(template="chat" if tokenizer.chat_template else "plain", verifier="exact"))


def _student(recipe: Recipe, store: Store, nodes: Graph) -> Record | None:
    """The student that would be published; while not all are trained, the first that is."""
    if (chosen := selected_student(recipe, store, nodes)) is not None:
        return chosen
    return next((found for seed in recipe.seeds if (found := find_node(store, nodes[f"student.{seed}"])) is not None), None)


def _loaded(recipe: Recipe, store: Store, nodes: Graph, teacher: Record, student: Record | None) -> "_Local":
    """Load a model from the files of finished nodes, verified; the teacher where there is no student."""
    from kd_core.stages.teacher import load_teacher
    from kd_core.teacher.models import load_directory, load_tokenizer, pick_device

    with workspace() as directory:
        job = Job(recipe, nodes["teacher"], store, {"teacher": teacher}, directory, silent)
        if student is None:
            return _Local("teacher", load_teacher(job), recipe.task)
        with job.files(student) as files:
            tokenizer = load_tokenizer(files / "model", trust_remote_code=recipe.trusts_code)
            loaded = load_directory(files / "model", device=pick_device(recipe.run.device), tokenizer=tokenizer)
        return _Local(f"student (seed {of(student, TrainSummary).seed})", loaded, recipe.task)


def _sampling(temperature: float, max_tokens: int) -> Answers:
    return Answers(num_samples=1, temperature=temperature, max_tokens=max_tokens)


@dataclass(frozen=True)
class _Local:
    """A model that runs here."""

    name: str
    loaded: "LoadedModel"
    task: Task

    def answer(self, prompt: str, *, turn: int, temperature: float, max_tokens: int, on_tokens: Callable[[int], None]) -> Said:
        """Answer a prompt; see ``Speaker.answer``."""
        from kd_core.teacher.generate import generate
        from kd_core.tokens.encoding import decode_answer, encode_prompt

        ids = encode_prompt(self.loaded.tokenizer, prompt, self.task)
        room = max_tokens if self.loaded.max_positions is None else min(max_tokens, self.loaded.max_positions - len(ids))
        if room < 1:
            raise SourceError(f"the prompt has {len(ids)} tokens, and {self.name} was made for {self.loaded.max_positions}; shorten it")
        began = time.perf_counter()
        key, answers = fingerprint(["chat", prompt, turn]), _sampling(temperature, room)
        [found] = generate(self.loaded, [ids], keys=[key], answers=answers, on_tokens=on_tokens)
        text = decode_answer(self.loaded.tokenizer, found.ids, prompt_ids=ids)
        return Said(text, found.finish_reason, len(found.ids), time.perf_counter() - began)


@dataclass(frozen=True)
class _Server:
    """A teacher behind a server."""

    recipe: Recipe
    name: str = "teacher"

    def answer(self, prompt: str, *, turn: int, temperature: float, max_tokens: int, on_tokens: Callable[[int], None]) -> Said:
        """Answer a prompt; see ``Speaker.answer``."""
        from kd_core.teacher.server import answer_prompts

        recipe, began = self.recipe, time.perf_counter()
        assert isinstance(recipe.teacher, ServerTeacher), "only such a teacher stands behind a server"
        if recipe.run.teacher_url is None:
            raise RecipeError("run.teacher_url: a server teacher needs its address; add --set run.teacher_url=http://host:port/v1")
        [found] = answer_prompts(
            recipe.teacher,
            url=recipe.run.teacher_url,
            prompts=[(prompt, turn)],
            answers=_sampling(temperature, max_tokens),
            task=recipe.task,
            seed=recipe.seeds[0],
            concurrency=1,
            on_done=lambda _: None,
        )
        if found.error is not None:
            raise TeacherError(found.error)
        return Said(found.text, found.finish_reason, None, time.perf_counter() - began)
