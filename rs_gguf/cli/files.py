"""Define the `rs-export` commands for files of vectors and adapters: check, inspect, convert, combine.

In: paths of files and options. Out: text or JSON on stdout, or a new file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.records.rows import finite
from rs_gguf.steering.formats.tools import FORMATS, PROJECTIONS, TARGETS

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--model",
    metavar="M",
    help="Model (GGUF file or catalogue name): also run FILE on it and check its effect.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@engine_options
def check(file: Path, model: str | None, as_json: bool, engine: EngineOptions) -> None:
    """Check whether llama.cpp will use FILE as intended.

    Lists every reason why not. Exit code 1 if it will not.
    """
    from rs_gguf.models import resolve as models
    from rs_gguf.steering import file as steering_file

    if model:
        report = steering_file.check(file, models.resolve_gguf(model), engine.settings())
    else:  # needs no package of the extra `run`
        report = steering_file.check(file)
    if as_json:
        value = {
            "file": report.path, "valid": report.valid, "errors": list(report.errors),
            "warnings": list(report.warnings), "loader_says": report.loader_says,
            "effect_check": None if report.effect is None else _finite(dataclasses.asdict(report.effect)),
        }  # fmt: skip
        click.echo(json.dumps(value, indent=2))
    else:
        for reason in report.errors:
            click.echo(f"error: {reason}")
        for reason in report.warnings:
            click.echo(f"warning: {reason}")
        if report.loader_says:
            click.echo(f"llama.cpp would log: {report.loader_says}")
        if report.content is not None and report.effect is not None and report.effect.effect_observed:
            error = report.effect.largest_relative_error
            observation = f"{report.content.intended_effect} (largest relative error {error:.1e})"
            if math.isnan(error):  # no layer or matrix could be checked
                observation = (
                    "next tokens change; the residual stream of this model cannot be read separately"
                )
            click.echo(f"effect observed on the model: {observation}")
        if report.effect is not None and report.effect.kl_mean is not None:
            click.echo(f"next-token KL divergence, steered from unsteered: {report.effect.kl_mean:.4f} nats")
        click.echo(f"{file}: {'valid' if report.valid else 'not valid'}")
    sys.exit(0 if report.valid else 1)


def _finite(effect: dict[str, Any]) -> dict[str, Any]:
    """Return an effect check with null in place of NaN and infinite errors, which JSON does not have."""
    errors = effect["relative_error"]
    return {**effect, "relative_error": {part: finite(error) for part, error in errors.items()}}


@click.command()
@click.argument("file", type=_FILE)
@click.option("--against", type=_FILE, help="Second file: also show the cosine between the changes of both.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(file: Path, against: Path | None, as_json: bool) -> None:
    """Show the content of FILE.

    Layers, matrices, norms, provenance, calibration, metrics.
    """
    from rs_gguf.steering.file import read_for_display

    content, *others = read_for_display([file] if against is None else [file, against])
    value: dict[str, Any] = {
        "file": str(file), **content.contents,
        "norms": {str(part): norm for part, norm in content.norms.items()},
        "provenance": dict(content.provenance),
    }  # fmt: skip
    for other in others:
        value["cosine"] = {str(part): cosine for part, cosine in content.cosines(other).items()}
    if as_json:
        click.echo(json.dumps(value, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    # Fold long values: people compare hashes, so a narrow terminal must not cut them.
    facts = Table("fact", Column("value", overflow="fold"), show_header=False, box=None)
    for name in ("file", "kind", "architecture", "width", "matrices", "rank", "alpha", "hook_point"):
        if name in value:
            facts.add_row(name, Text(escape_control_chars(value[name])))
    for name, entry in value["provenance"].items():
        facts.add_row(Text(name), Text(escape_control_chars(entry)))
    console.print(facts)
    table = Table(content.part, "norm")
    if against is not None:
        table.add_column("cosine")
    for name, norm in value["norms"].items():
        cosine = value.get("cosine", {}).get(name)
        # Without a cosine, only one of the two files changes this part.
        cosines = [] if against is None else ["" if cosine is None else f"{cosine:+.3f}"]
        table.add_row(name, f"{norm:.4g}", *cosines)
    console.print(table)


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--from", "from_format", type=click.Choice([*FORMATS, *PROJECTIONS]), help="Tool or format of FILE."
)
@click.option(
    "--to", "to_format", type=click.Choice(TARGETS), help="Tool or format to write the adapter for."
)
@click.option("--output", required=True, type=_FILE, help="File to write; with --to peft, a folder.")
@click.option("--base", type=int, help="Number that FILE gives to layer 0; by default, the format's number.")
@click.option("--architecture", metavar="NAME", help="With --from: model family, such as qwen2.")
@click.option("--model", metavar="M", help="With --to and --from glp: model of FILE.")
def convert(
    file: Path,
    from_format: str | None,
    to_format: str | None,
    output: Path,
    base: int | None,
    architecture: str | None,
    model: str | None,
) -> None:
    """Convert a vector from another tool, or an adapter for one.

    --from writes a vector that llama.cpp adds at the right layer. A GLP file, which projects directions out,
    becomes an adapter. --to writes an adapter for another tool.
    """
    if (from_format is None) == (to_format is None):
        raise InputError("give either --from (another tool's vector) or --to (our adapter for another tool).")
    needs_model = to_format is not None or from_format in PROJECTIONS
    if needs_model and (model is None or base is not None or architecture is not None):
        option = f"--from {from_format}" if to_format is None else f"--to {to_format}"
        raise InputError(
            f"{option} needs --model, the model of FILE, and accepts neither --base nor --architecture."
        )
    if model is not None and not needs_model:
        raise InputError(
            "--model is accepted only with --to and with --from glp. With --from, name the model family with "
            "--architecture."
        )
    notes: tuple[str, ...] = ()
    if to_format == "peft":
        from rs_gguf.steering import lora_file
        from rs_gguf.steering.formats import peft as peft_export

        peft_export.export(lora_file.read(file), str(model), output)
    elif needs_model:
        notes = _convert_projection(file, str(model), output, write_glp=to_format == "glp")
    else:
        from rs_gguf.steering.formats.vectors import convert as convert_file
        from rs_gguf.steering.vector_file import write

        conversion = convert_file(file, str(from_format), base=base, architecture=architecture)
        write(conversion.vector, output)
        notes = conversion.notes
    for note in notes:
        click.echo(note, err=True)
    click.echo(output)


def _convert_projection(file: Path, model: str, output: Path, *, write_glp: bool) -> tuple[str, ...]:
    """Write an adapter as a GLP file, or a GLP file as an adapter. Return a sentence for each difference."""
    from rs_gguf.models.resolve import resolve_gguf
    from rs_gguf.steering import lora_file
    from rs_gguf.steering.formats import glp

    if write_glp:
        projection, notes = glp.of_adapter(lora_file.read(file), resolve_gguf(model))
        glp.write(projection, output)
    else:
        adapter, notes = glp.to_adapter(file, resolve_gguf(model))
        lora_file.write(adapter, output)
    return notes


@click.command()
@click.argument("parts", nargs=-1, required=True, metavar="A.gguf[:W]...")
@click.option("--output", required=True, type=_FILE, help="File to write.")
def combine(parts: tuple[str, ...], output: Path) -> None:
    """Write the weighted sum of vectors, or of adapters.

    W is the weight of a file, 1 by default.
    """
    from rs_gguf.steering.file import path_and_scale, read_alike, write

    files, weights = zip(*map(path_and_scale, parts), strict=True)
    contents = read_alike(files)
    write(contents[0].combined(list(zip(contents, weights, strict=True))), output)
    click.echo(output)
