"""``kd chat``: the teacher, the student, or both side by side, asked by a person or by a script. Shows what kd_core.chat says."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.console import Display, display
from flows.cli.options import AsJson, Overrides, open_recipe, print_json
from flows.cli.terminal import say

if TYPE_CHECKING:
    from rich.table import Table

    from kd_core.chat.speakers import Said, Speaker

__all__ = ["chat"]

_MAX_BYTES = 1 << 20


def chat(
    subject: Annotated[str, typer.Argument(metavar="RECIPE|DIR", help="A recipe that has been run, or a model's directory.")],
    overrides: Overrides = [],  # noqa: B006
    model: Annotated[
        Literal["teacher", "student", "both"] | None,
        typer.Option("--model", help="Who of a recipe answers; both where a student is finished, else the teacher."),
    ] = None,
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", metavar="TEXT", help="Ask this and end. May be repeated. Without it a pipe is read as one prompt."),
    ] = [],  # noqa: B006
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=10.0, help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer; the recipe's without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a recipe's teacher and student, in the recipe's template. Each prompt is asked alone: nothing is remembered."""
    asked = prompts or ([] if sys.stdin.isatty() else [_piped()])
    if any(not prompt.strip() for prompt in asked):
        raise typer.BadParameter("there is no text in it", param_hint="--prompt")
    if as_json and not asked:
        raise typer.BadParameter("a conversation is for people; give --prompt, or a prompt in a pipe", param_hint="--json")
    with display(quiet=as_json) as shown:
        found, longest = _load(subject, overrides, model, shown)
    ask = partial(_ask, found, temperature=temperature, max_tokens=max_tokens or longest, quiet=as_json)
    if asked:
        answers = [(prompt, name, said) for prompt in asked for name, said in ask(prompt, turn=0)]
        return _print_answers(answers, as_json=as_json)
    names = " and ".join(speaker.name for speaker in found)
    say(f"{names} of {subject}; each line is asked alone. An empty line or Ctrl-D ends.")
    for turn, prompt in enumerate(_typed()):
        _answer_a_line(ask, prompt, turn)


def _load(subject: str, overrides: list[str], model: Any, shown: Display) -> "tuple[Sequence[Speaker], int]":
    """Those who answer, and how long their answers may be."""
    if Path(subject).is_dir():
        if model is not None or overrides:
            raise typer.BadParameter(f"{subject} is a directory with one model in it; --model and --set are for recipes")
        shown.step(f"loading the model in {subject}")
        from kd_core.chat.speakers import DEFAULT_TOKENS, speaker_in

        return [speaker_in(Path(subject))], DEFAULT_TOKENS
    recipe, store = open_recipe(subject, overrides, shown)
    shown.step(f"reading the sources of {recipe.name}, and loading its models")
    from kd_core.chat.speakers import longest_answer, speakers

    return speakers(recipe, store, model), longest_answer(recipe)


def _piped() -> str:
    """Standard input as one prompt, without the line break at its end.

    Raises:
        RecipeError: it is no text, or too long for a prompt.
    """
    from kd_core.errors import RecipeError

    data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"standard input: more than {_MAX_BYTES:,} bytes, which is no prompt")
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(f"standard input: not UTF-8 text ({error.reason})") from error


def _typed() -> Iterator[str]:
    """Lines of a person, until an empty one or the end."""
    with suppress(ImportError):  # input() then has a history and can be edited
        import readline  # noqa: F401

    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        yield line


def _ask(
    found: "Sequence[Speaker]", prompt: str, *, turn: int, temperature: float, max_tokens: int, quiet: bool
) -> "list[tuple[str, Said]]":
    """Everybody's answer to one prompt, with the tokens counted while they come."""
    from kd_core.progress import Tick

    answers = []
    with display(quiet=quiet) as shown:
        for speaker in found:
            tick, made = shown.work(speaker.name), list[int]()

            def hear(number: int, tick: Any = tick, made: list[int] = made) -> None:
                made.append(number)
                tick(Tick(len(made), max_tokens, "tokens"))

            said = speaker.answer(prompt, turn=turn, temperature=temperature, max_tokens=max_tokens, on_tokens=hear)
            answers.append((speaker.name, said))
    return answers


def _answer_a_line(ask: Any, prompt: str, turn: int) -> None:
    """Show the answers to a typed line; what is wrong with it is said, and the conversation goes on."""
    from flows.cli.tables import show
    from kd_core.errors import SourceError, TeacherError

    try:
        show(_side_by_side(ask(prompt, turn=turn)))
    except (SourceError, TeacherError) as error:
        say(f"kd: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        say("(stopped)")


def _side_by_side(answers: "list[tuple[str, Said]]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0))
    for name, said in answers:
        tokens = "" if said.tokens is None else f", {said.tokens} tokens{' (cut)' if said.finish_reason == 'length' else ''}"
        made.add_column(Text(f"{name}{tokens}, {said.seconds:.1f} s"), ratio=1, overflow="fold")
    made.add_row(*(Text(said.text) for _, said in answers))
    return made


def _print_answers(answers: "list[tuple[str, str, Said]]", *, as_json: bool) -> None:
    """One-shot answers: JSON; the bare text of a single one; else each under its prompt and name."""
    if as_json:
        return print_json({"answers": [{"prompt": prompt, "model": name, **asdict(said)} for prompt, name, said in answers]})
    if len(answers) == 1:
        return say(answers[0][2].text)
    for prompt, name, said in answers:
        say(f"[{name}] {prompt}\n{said.text}\n")
