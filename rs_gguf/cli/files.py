"""The `rs-export` commands on files of control vectors and adapters: check, inspect, convert, combine."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.errors import InputError, harmless
from rs_gguf.records.rows import finite
from rs_gguf.steering.formats.tools import FORMATS

if TYPE_CHECKING:
    from rs_gguf.steering.lora_file import LoraAdapter
    from rs_gguf.steering.vector import SteeringVector

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
    from rs_gguf.steering import lora_file as lora
    from rs_gguf.steering import vector_file as control_vector
    from rs_gguf.steering.guard import StricterThanLlamaCpp

    try:
        adapter = lora.is_adapter(file)
    except StricterThanLlamaCpp:
        adapter = True  # the check of the larger files says which rule of ours it breaks
    except InputError:
        adapter = False  # either check says what is wrong with the container
    check_file = lora.check if adapter else control_vector.check
    report = check_file(file, models.resolve_gguf(model) if model else None)
    if as_json:
        value = {
            "file": report.path, "valid": report.valid, "errors": list(report.errors),
            "warnings": list(report.warnings), "loader_says": report.loader_says,
            "proof": None if report.proof is None else _finite(dataclasses.asdict(report.proof)),
        }  # fmt: skip
        click.echo(json.dumps(value, indent=2))
    else:
        for reason in report.errors:
            click.echo(f"error: {reason}")
        for reason in report.warnings:
            click.echo(f"warning: {reason}")
        if report.loader_says:
            click.echo(f"llama.cpp would log: {report.loader_says}")
        if report.proof is not None and report.proof.effect_observed:
            moves = "the residual moves by B A x" if adapter else "every block moves by its direction"
            seen = f"{moves} (largest relative error {report.proof.largest_relative_error:.1e})"
            if math.isnan(report.proof.largest_relative_error):
                seen = "next tokens change; the residual cannot be seen by itself in this model"
            click.echo(f"effect observed on the model: {seen}")
        if report.proof is not None and report.proof.kl_mean is not None:
            click.echo(f"next-token KL, steered against unsteered: {report.proof.kl_mean:.4f} nats")
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
    value = _facts(file, against)
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
            facts.add_row(name, Text(harmless(value[name])))
    for name, entry in value["provenance"].items():
        facts.add_row(Text(name), Text(harmless(entry)))
    console.print(facts)
    table = Table("block" if value["kind"] == "control vector" else "matrix", "norm")
    if against is not None:
        table.add_column("cosine")
    for name, norm in value["norms"].items():
        cosine = value.get("cosine", {}).get(name)
        extra = [] if against is None else ["" if cosine is None else f"{cosine:+.3f}"]
        table.add_row(name, f"{norm:.4g}", *extra)
    console.print(table)


def _facts(file: Path, against: Path | None) -> dict[str, Any]:
    """What `inspect` shows, as it stands in its JSON."""
    from rs_gguf.steering import lora_file as lora
    from rs_gguf.steering.formats import vectors as convert

    files = [file] if against is None else [file, against]
    if adapters := _adapters(files):
        adapter = adapters[0]
        value: dict[str, Any] = {
            "file": str(file), "kind": "adapter", "architecture": adapter.architecture,
            "layers": adapter.layers, "matrices": adapter.matrices, "rank": adapter.rank,
            "norms": adapter.norms, "provenance": dict(adapter.provenance),
        }  # fmt: skip
        return value if against is None else {**value, "cosine": lora.cosines(*adapters)}
    vectors = _vectors(files)
    vector = vectors[0]
    value = {
        "file": str(file), "kind": "control vector", "architecture": vector.architecture,
        "width": vector.width, "layers": vector.layers,
        "norms": {str(layer): norm for layer, norm in vector.norms.items()},
        "provenance": dict(vector.provenance),
    }  # fmt: skip
    if against is not None:
        value["cosine"] = {str(layer): c for layer, c in convert.cosines(*vectors).items()}
    return value


def _adapters(files: Sequence[Path]) -> list[LoraAdapter]:
    """The adapters in `files`, none when all are vectors. `InputError` when they are of both kinds."""
    from rs_gguf.steering import lora_file as lora

    kinds = {path: lora.is_adapter(path) for path in files}
    if len(set(kinds.values())) > 1:
        vector, adapter = (next(p for p in files if kinds[p] is kind) for kind in (False, True))
        raise InputError(
            f"{vector} is a control vector and {adapter} a LoRA adapter: one adds to a block's output, the "
            "other to a matrix, so they have no common sum or cosine. llama.cpp loads both side by side: "
            f"--control-vector {shlex.quote(str(vector))} --lora {shlex.quote(str(adapter))}."
        )
    return [lora.read(path) for path in files if kinds[path]]


def _vectors(files: Sequence[Path]) -> list[SteeringVector]:
    from rs_gguf.steering.vector_file import read

    return [read(path) for path in files]


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
        from rs_gguf.steering import lora_file as lora
        from rs_gguf.steering.formats import peft as peft_export

        peft_export.export(lora.read(file), model, output)
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
    from rs_gguf.steering import lora_file as lora
    from rs_gguf.steering import vector_file as control_vector
    from rs_gguf.steering.formats import vectors as convert

    files, weights = zip(*map(path_and_scale, parts), strict=True)
    if adapters := _adapters(files):
        lora.write(lora.combine(list(zip(adapters, weights, strict=True))), output)
    else:
        control_vector.write(convert.combine(list(zip(_vectors(files), weights, strict=True))), output)
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
