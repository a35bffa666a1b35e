"""The `rs-export` commands on control vector files: check, inspect, convert, combine."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from rs_gguf.errors import InputError

_FORMATS = (
    "cvector-generator",
    "jukofyork",
    "repeng",
    "easysteer",
    "saklas",
    "steering-vectors",
    "huggingface",
)
_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--model", metavar="M", help="Also run it on this model and prove its effect.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def check(file: Path, model: str | None, as_json: bool) -> None:
    """Say whether llama.cpp will use FILE as it was meant, with every reason why not. Exit code 0 or 1."""
    from rs_gguf import models
    from rs_gguf.control_vector import check as check_file

    report = check_file(file, models.resolve(model) if model else None)
    if as_json:
        proof = dataclasses.asdict(report.proof) if report.proof is not None else None
        value = {
            "file": report.path, "valid": report.valid, "errors": list(report.errors),
            "warnings": list(report.warnings), "loader_says": report.loader_says, "proof": proof,
        }  # fmt: skip
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        for reason in report.errors:
            click.echo(f"error: {reason}")
        for reason in report.warnings:
            click.echo(f"warning: {reason}")
        if report.loader_says:
            click.echo(f"llama.cpp would log: {report.loader_says}")
        if report.proof is not None and report.proof.effect_observed:
            click.echo(
                "effect observed on the model: every block moves by its direction (largest relative error "
                f"{report.proof.largest_relative_error:.1e}); next-token KL {report.proof.kl_mean:.4f} nats"
            )
        click.echo(f"{file}: {'valid' if report.valid else 'not valid'}")
    sys.exit(0 if report.valid else 1)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--against", type=_FILE, help="Also show the cosine to this file's directions.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(file: Path, against: Path | None, as_json: bool) -> None:
    """Show what is in FILE: layers, norms, provenance, calibration, metrics."""
    from rs_gguf.control_vector import read
    from rs_gguf.convert import cosines

    vector = read(file)
    value: dict[str, Any] = {
        "file": str(file), "architecture": vector.architecture, "width": vector.width,
        "layers": vector.layers,
        "norms": {str(layer): norm for layer, norm in vector.norms.items()},
        "provenance": dict(vector.provenance),
    }  # fmt: skip
    if against is not None:
        value["cosine"] = {str(layer): c for layer, c in cosines(vector, read(against)).items()}
    if as_json:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = Table("fact", "value", show_header=False, box=None)
    for name in ("file", "architecture", "width"):
        facts.add_row(name, Text(str(value[name])))
    for name, entry in vector.provenance.items():
        facts.add_row(Text(name), Text(str(entry)))
    console.print(facts)
    table = Table("block", "norm", *(["cosine"] if against else []))
    for layer, norm in value["norms"].items():
        cosine = value.get("cosine", {}).get(layer)
        extra = [] if against is None else ["" if cosine is None else f"{cosine:+.3f}"]
        table.add_row(layer, f"{norm:.3f}", *extra)
    console.print(table)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--from", "from_format", required=True, type=click.Choice(_FORMATS), help="Who wrote it.")
@click.option("--output", required=True, type=_FILE)
@click.option("--base", type=int, help="Number that FILE gives to block 0, where the format leaves it open.")
def convert(file: Path, from_format: str, output: Path, base: int | None) -> None:
    """Turn another tool's vector into one that llama.cpp loads at the right layer."""
    from rs_gguf.control_vector import write
    from rs_gguf.convert import convert as convert_file

    conversion = convert_file(file, from_format, base=base)
    write(conversion.vector, output)
    for note in conversion.notes:
        click.echo(note, err=True)
    click.echo(output)


@click.command()
@click.argument("parts", nargs=-1, required=True, metavar="A.gguf[:W]...")
@click.option("--output", required=True, type=_FILE)
def combine(parts: tuple[str, ...], output: Path) -> None:
    """Weighted sum of vectors."""
    from rs_gguf.control_vector import read, write
    from rs_gguf.convert import combine as combine_vectors

    weighted = [(read(path), weight) for path, weight in map(path_and_scale, parts)]
    write(combine_vectors(weighted), output)
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
