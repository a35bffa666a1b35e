"""Define the `rs-export models` commands: the catalogue of known small models."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click


@click.group()
def models() -> None:
    """Known small models, pinned by SHA-256."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def models_list(as_json: bool) -> None:
    """List the catalogue."""
    from rs_gguf.models.resolve import CATALOGUE

    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "size": m.size,
            "licence": m.licence,
            "downloaded": m.path.is_file(),
            "summary": m.summary,
        }
        for m in CATALOGUE.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "downloaded" if row["downloaded"] else "not downloaded"
        size = f"{row['size'] / 1e6:>6.0f} MB"
        click.echo(f"{row['name']:<20} {size}  {row['licence']:<11} {state:<14} {row['summary']}")


@models.command("pull")
@click.argument("name")
def models_pull(name: str) -> None:
    """Download a model, verify it and print its path."""
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.models.resolve import pull

    with contextlib.closing(TerminalProgress()) as progress:
        click.echo(pull(name, progress=progress.download))


@models.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print the path of a model; exit with 2 if it is not downloaded."""
    from rs_gguf.models.resolve import path_of

    click.echo(path_of(name))
