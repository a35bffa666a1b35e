"""Define the `rs-export remeasure` command: measure the files of a folder again, or on a sealed set.

In: a published folder or a run folder, and perhaps a sealed set. Out: tables on stdout, and the files that
`rs_gguf.pipeline.remeasure` writes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options

_FILE = click.Path(path_type=Path)


@click.command("remeasure")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sealed", type=_FILE, metavar="SET.jsonl",
              help="Open this sealed set, and measure on it in place of the validation split. The ledger "
                   "opened.jsonl beside it records that; a set is opened for one release only.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON in place of the tables.")
@engine_options
def remeasure(folder: Path, sealed: Path | None, as_json: bool, engine: EngineOptions) -> None:
    """Measure the files in FOLDER again.

    FOLDER holds recipe.toml, metrics.json and the GGUF files that it names. Writes new metrics.json,
    test_answers.jsonl, report.html and card.md there, or with --sealed sealed.json, sealed_answers.jsonl
    and sealed_outcomes.jsonl. A killed command goes on when it is given again. Exit code 1 if no file meets
    the acceptance criteria.
    """
    from rich.console import Console

    from rs_gguf.cli.summary import print_results
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.pipeline.remeasure import remeasure as measure_again
    from rs_gguf.report.recommendation import files_in, reported_files

    with contextlib.closing(TerminalProgress()) as progress:
        record, path = measure_again(folder, sealed=sealed, overrides=engine.overrides(), progress=progress)
    if as_json:
        click.echo(json.dumps(record.mapping(), indent=2))
    else:
        print_results(Console(), record.mapping(), folder, pages=sealed is None)
        click.echo(f"Figures: {path}")
    files = files_in(folder, record) if sealed is None else reported_files(record)
    if not any(file.passed for file in files):
        sys.exit(1)
