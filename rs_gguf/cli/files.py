"""The `rs-export` commands on files of control vectors and adapters: check, inspect, convert, combine."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.records.rows import finite
from rs_gguf.steering.formats.tools import FORMATS

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--model", metavar="M", help="Also run it on this model and prove its effect.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def check(file: Path, model: str | None, as_json: bool) -> None:
    """Say whether llama.cpp will use FILE as it was meant.

    Every reason why not is listed. Exit code 1 when it will not.
    """
    from rs_gguf.models import resolve as models
    from rs_gguf.steering import file as steering_file

    report = steering_file.check(file, models.resolve_gguf(model) if model else None)
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
        if report.found is not None and report.effect is not None and report.effect.effect_observed:
            seen = f"{report.found.moves} (largest relative error {report.effect.largest_relative_error:.1e})"
            if math.isnan(report.effect.largest_relative_error):
                seen = "next tokens change; the residual cannot be seen by itself in this model"
            click.echo(f"effect observed on the model: {seen}")
        if report.effect is not None and report.effect.kl_mean is not None:
            click.echo(f"next-token KL, steered against unsteered: {report.effect.kl_mean:.4f} nats")
        click.echo(f"{file}: {'valid' if report.valid else 'not valid'}")
    sys.exit(0 if report.valid else 1)


def _finite(proof: dict[str, Any]) -> dict[str, Any]:
    """A proof without the NaN and infinities that JSON does not have: null stands for them."""
    errors = proof["relative_error"]
    return {**proof, "relative_error": {k: finite(e) for k, e in errors.items()}}


@click.command()
@click.argument("file", type=_FILE)
@click.option("--against", type=_FILE, help="Also show the cosine to what this file adds.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(file: Path, against: Path | None, as_json: bool) -> None:
    """Show what is in FILE.

    Blocks, matrices, norms, provenance, calibration, metrics.
    """
    from rs_gguf.steering.file import read_alike

    found, *others = read_alike([file] if against is None else [file, against])
    value: dict[str, Any] = {
        "file": str(file), **found.contents, "norms": {str(part): norm for part, norm in found.norms.items()},
        "provenance": dict(found.provenance),
    }  # fmt: skip
    for other in others:
        value["cosine"] = {str(part): cosine for part, cosine in found.cosines(other).items()}
    if as_json:
        click.echo(json.dumps(value, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    # Hashes are for comparing: whole, however narrow the terminal.
    facts = Table("fact", Column("value", overflow="fold"), show_header=False, box=None)
    for name in ("file", "kind", "architecture", "width", "matrices", "rank"):
        if name in value:
            facts.add_row(name, Text(escape_control_chars(value[name])))
    for name, entry in value["provenance"].items():
        facts.add_row(Text(name), Text(escape_control_chars(entry)))
    console.print(facts)
    table = Table(found.part, "norm")
    if against is not None:
        table.add_column("cosine")
    for name, norm in value["norms"].items():
        cosine = value.get("cosine", {}).get(name)
        extra = [] if against is None else ["" if cosine is None else f"{cosine:+.3f}"]
        table.add_row(name, f"{norm:.4g}", *extra)
    console.print(table)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--from", "from_format", type=click.Choice(list(FORMATS)), help="Who wrote the vector.")
@click.option("--to", "to_format", type=click.Choice(("peft",)), help="For whom to write an adapter.")
@click.option("--output", required=True, type=_FILE, help="A file; with --to peft, a folder.")
@click.option("--base", type=int, help="Number that FILE gives to block 0, in place of its format's own.")
@click.option("--architecture", metavar="NAME", help="With --from: the model family, such as qwen2.")
@click.option("--model", metavar="M", help="With --to: the model, whose modules the adapter names.")
def convert(
    file: Path,
    from_format: str | None,
    to_format: str | None,
    output: Path,
    base: int | None,
    architecture: str | None,
    model: str | None,
) -> None:
    """Turn another tool's vector into ours, or our adapter for it.

    --from: a vector that llama.cpp loads at the right layer. --to: an adapter for another tool.
    """
    if (from_format is None) == (to_format is None):
        raise InputError("Give either --from (another tool's vector) or --to (our adapter for another tool).")
    if to_format is not None:
        if model is None or base is not None or architecture is not None:
            raise InputError(
                f"--to {to_format} needs --model, the model that FILE is for, and takes neither --base nor "
                "--architecture."
            )
        from rs_gguf.steering import lora_file
        from rs_gguf.steering.formats import peft as peft_export

        peft_export.export(lora_file.read(file), model, output)
    else:
        if model is not None:
            raise InputError(
                "--model goes with --to; another tool's vector is converted without a model. --architecture "
                "says which family it is for."
            )
        from rs_gguf.steering.formats.vectors import convert as convert_file
        from rs_gguf.steering.vector_file import write

        conversion = convert_file(file, str(from_format), base=base, architecture=architecture)
        write(conversion.vector, output)
        for note in conversion.notes:
            click.echo(note, err=True)
    click.echo(output)


@click.command()
@click.argument("parts", nargs=-1, required=True, metavar="A.gguf[:W]...")
@click.option("--output", required=True, type=_FILE, help="The file to write.")
def combine(parts: tuple[str, ...], output: Path) -> None:
    """Weighted sum of vectors, or of adapters."""
    from rs_gguf.steering.file import read_alike, write

    files, weights = zip(*map(path_and_scale, parts), strict=True)
    found = read_alike(files)
    write(found[0].combined(list(zip(found, weights, strict=True))), output)
    click.echo(output)


def path_and_scale(argument: str) -> tuple[Path, float]:
    """`PATH` or `PATH:SCALE`, as llama.cpp writes it. A file whose whole name has a colon wins."""
    path, colon, scale = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise InputError(f"{argument!r}: expected PATH or PATH:SCALE, with a number as SCALE.") from error
