"""Define the `rs-export plan` command: estimate the cost of a run.

In: a recipe. Out: a table or JSON with time, memory and disk of each stage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from rs_gguf.pipeline.plan import Plan


@click.command("plan")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a recipe value, for example prompts.fit=500. Repeatable.")  # fmt: skip
@click.option("--bits", type=click.FloatRange(1, 64), metavar="B",
              help="For a config.json: bits per weight of the planned GGUF file, such as 4.85 "
                   "for Q4_K_M.")  # fmt: skip
@click.option("--measure", is_flag=True,
              help="Load the model and measure its speed; by default, use the stored speed of a "
                   "server core.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: seconds, bytes, tokens.")
@engine_options
def plan(
    recipe: Path | None,
    overrides: tuple[str, ...],
    bits: float | None,
    measure: bool,
    as_json: bool,
    engine: EngineOptions,
) -> None:
    """Estimate time, memory and disk of a run.

    Nothing is downloaded. Without --measure, no weights are read, so the recipe's model may be a folder with
    only a config.json.
    """
    from rs_gguf.pipeline import plan as planning
    from rs_gguf.pipeline import recipe as recipes

    settings = recipes.load(recipe, (*overrides, *engine.overrides()))
    path = planning.model_file(settings)
    dimensions = planning.model_dimensions(path, bits)
    judge = planning.judge_of(settings)  # fails before the minutes of measuring
    if measure and (bits is not None or path.suffix == ".json"):
        raise InputError(
            "--measure needs the weights of the model and does not accept --bits. Give a GGUF file or a "
            "folder with weights."
        )
    if measure:
        click.echo("Measuring the speed of the model...", err=True)
    speed = (
        planning.measure(settings, path, judge) if measure else planning.stored(settings, dimensions, judge)
    )
    estimate = planning.plan(settings, dimensions, speed, judge)
    if as_json:
        click.echo(json.dumps(estimate.to_row(), indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(estimate))
    console.print(f"Speed: {speed.source}.", highlight=False)


def _table(estimate: Plan) -> Table:
    from rich.table import Table

    from rs_gguf.report.text import duration

    prompts = ", ".join(f"{n} {split}" for split, n in estimate.prompts.items())
    table = Table(
        title=f"{estimate.model.n_layer} layers of width {estimate.model.width}\nprompts: {prompts}",
        title_justify="left",
    )
    table.add_column("stage")
    for column in ("time", "tokens read", "tokens answered", "memory", "disk"):
        table.add_column(column, justify="right")
    for name, stage in estimate.stages.items():
        counts = (f"{round(n):,}" if n else "" for n in (stage.read, stage.answered))
        table.add_row(name, duration(stage.seconds), *counts, _bytes(stage.memory), _bytes(stage.disk))
    table.add_section()
    table.add_row("all", duration(estimate.seconds), "", "", _bytes(estimate.memory), _bytes(estimate.disk))
    return table


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
