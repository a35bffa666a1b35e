"""Define the command `rs-export merge`: write a model that holds the effect of adapters.

In: adapter files with scales, and a model. Out: one GGUF file, and what the comparison of both observed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options

_FILE = click.Path(path_type=Path)
_TYPES = ("q8_0", "f16", "f32")  # `steering.merge.TYPES`, without its imports


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[:SCALE]...")
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="Model: a GGUF file, any part of a split one, or a catalogue name.",
)
@click.option("--output", required=True, type=_FILE, help="File to write.")
@click.option(
    "--type",
    "type_",
    type=click.Choice(_TYPES),
    help="Type of the changed matrices. By default F32, F16 and BF16 stay, and quantised ones become q8_0.",
)
@click.option("--no-check", is_flag=True, help="Do not run the merged model and compare it.")
@engine_options
def merge(
    files: tuple[str, ...], model: str, output: Path, type_: str | None, no_check: bool,
    engine: EngineOptions,
) -> None:  # fmt: skip
    """Write a model that holds the effect of adapters.

    The file is for programs without --lora. SCALE is 1 by default. Runs the merged model and compares it with
    the model that has the adapters loaded. Exit code 1 if they differ; nothing is written then.
    """
    from rs_gguf.models.resolve import resolve_gguf
    from rs_gguf.steering.file import path_and_scale
    from rs_gguf.steering.merge import TYPES
    from rs_gguf.steering.merge import merge as merge_files

    merged = merge_files(
        [path_and_scale(file) for file in files],
        resolve_gguf(model, parts=True),
        output,
        type_=None if type_ is None else TYPES[type_],
        check=not no_check,
        engine=None if no_check else engine.settings(),
    )
    for warning in merged.warnings:
        click.echo(f"warning: {warning}", err=True)
    kinds = Counter(f"{old.name} as {new.name}" for old, new in merged.changed.values())
    click.echo("changed matrices: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    if merged.check is not None:
        check = merged.check
        click.echo(f"effect of the adapters: next-token KL divergence up to {check.effect:.3g} nats")
        click.echo(
            f"merged against loaded adapters, {check.positions} positions: KL divergence up to "
            f"{check.kl:.2g} nats (tolerance {check.tolerance:g}), log-probabilities differ by up to "
            f"{check.difference:.2g} nats"
        )
    click.echo(output)
