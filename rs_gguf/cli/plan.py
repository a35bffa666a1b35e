"""The `rs-export plan` command: what a run will cost, before it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rs_gguf.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from rs_gguf.pipeline.plan import Plan


@click.command("plan")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a recipe value, for example prompts.fit=500. Repeatable.")  # fmt: skip
@click.option("--bits", type=click.FloatRange(1, 64), metavar="B",
              help="Plan for a GGUF file of B bits a weight, 4.85 in Q4_K_M; for a config.json.")  # fmt: skip
@click.option("--measure", is_flag=True,
              help="Load the model and time it; else the speed is a server core's.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: seconds, bytes, tokens.")
def plan(
    recipe: Path | None, overrides: tuple[str, ...], bits: float | None, measure: bool, as_json: bool
) -> None:
    """Say how long a run will take.

    Prints the time of each stage, and the memory and disk that the run needs.

    Nothing is downloaded and, without --measure, no weight is read: the recipe's model may be a GGUF file, or
    a folder with a config.json alone.
    """
    from rs_gguf.pipeline import plan as planning
    from rs_gguf.pipeline import recipe as recipes

    chosen = recipes.load(recipe, overrides)
    path = planning.model_file(chosen)
    shape = planning.model_dimensions(path, bits)
    judge = planning.judge_of(chosen)  # before minutes of measuring
    if measure and (bits is not None or path.suffix == ".json"):
        raise InputError("--measure times the model itself: give its weights, and leave --bits away.")
    if measure:
        click.echo("Timing the model...", err=True)
    speed = planning.measure(chosen, path, judge) if measure else planning.stored(chosen, shape, judge)
    found = planning.plan(chosen, shape, speed, judge)
    if as_json:
        click.echo(json.dumps(found.to_row(), indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(found))
    console.print(f"Speed: {speed.source}.", highlight=False)


def _table(found: Plan) -> Table:
    from rich.table import Table

    from rs_gguf.report.text import duration

    asked = ", ".join(f"{n} {split}" for split, n in found.prompts.items())
    table = Table(
        title=f"{found.model.n_layer} blocks of width {found.model.width}\nprompts: {asked}",
        title_justify="left",
    )
    table.add_column("stage")
    for column in ("time", "tokens read", "tokens answered", "memory", "disk"):
        table.add_column(column, justify="right")
    for name, stage in found.stages.items():
        counts = (f"{round(n):,}" if n else "" for n in (stage.read, stage.answered))
        table.add_row(name, duration(stage.seconds), *counts, _bytes(stage.memory), _bytes(stage.disk))
    table.add_section()
    table.add_row("all", duration(found.seconds), "", "", _bytes(found.memory), _bytes(found.disk))
    return table


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
