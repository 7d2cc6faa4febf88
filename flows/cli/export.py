"""``kd export``: a finished student as a directory that leaves the factory. Shows what kd_core.export writes; owns no logic."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.console import display, human_bytes
from flows.cli.options import open_recipe
from flows.cli.terminal import say

if TYPE_CHECKING:
    from kd_core.export.student import Exported

__all__ = ["export"]

Quantize = Annotated[
    Literal["int8-dynamic", "int8-weight-only"] | None, typer.Option("--quantize", help="Weights in int8; needs torchao, here and to load.")
]


def export(
    recipe_file: Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of a recipe that has been run.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to write: a new or an empty one.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="PATH=VALUE", help="Change a field, as the run did. May be repeated.")
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The student of this seed; the gate's choice without it.")] = None,
    quantize: Quantize = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also an ONNX graph (minutes for 30 blocks); needs onnx, onnxscript, onnxruntime.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output and nothing else.")] = False,
) -> None:
    """Write the finished student for plain transformers: weights, tokenizer, model card, lineage."""
    with display(quiet=as_json) as shown:
        recipe, store = open_recipe(recipe_file, overrides, shown)
        shown.step(f"reading the sources and records of {recipe.name}")
        from kd_core.export.lineage import collect_lineage

        command = shlex.join(["kd", "run", recipe_file, *(word for o in overrides for word in ("--set", o))])
        lineage = collect_lineage(recipe, store, seed=seed, command=command)
        shown.step(f"writing {out}")
        from kd_core.export.student import export_student

        done = export_student(lineage, store, out, quantize=quantize, onnx=onnx)
    if as_json:
        return print(json.dumps(_plain(done), indent=1))
    say(_text(done))


def _plain(done: "Exported") -> dict[str, Any]:
    from dataclasses import asdict

    student, verdict = done.lineage.student, done.lineage.report["verdict"]
    return {
        "out": str(done.directory),
        "model": done.lineage.recipe.publish,
        "student": {"seed": done.lineage.trained.seed, "fingerprint": student.fingerprint, "digest": student.digest},
        "verdict": {name: verdict[name] for name in ("promote", "headline")},
        "licences": {"teacher": done.lineage.teacher_licence, "base": done.lineage.base_licence},
        "files": done.files,
        "parity": [asdict(found) for found in done.parity],
    }


def _text(done: "Exported") -> str:
    size = human_bytes(sum(about["size_bytes"] for about in done.files.values()))
    lines = [
        done.lineage.report["verdict"]["headline"],
        f"Written: {done.directory} ({done.lineage.recipe.publish}, seed {done.lineage.trained.seed}, {len(done.files)} files, {size})",
        *(
            f"  {found.form}: KL to the float model {found.mean_kl:.2g} on average, {found.max_kl:.2g} at worst; "
            f"same first choice at {found.agreement:.1%} of {found.positions} positions"
            for found in done.parity
        ),
        f"It loads with plain transformers; how, and what it may be used for, says {done.directory / 'README.md'}",
    ]
    return "\n".join(lines)
