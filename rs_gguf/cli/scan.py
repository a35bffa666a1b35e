"""Define the `rs-export scan` command: does a model refuse, is there a file for it, how long is a run?

In: a model and a judge. Out: a table with examples, files, a planned time and a recommendation, or JSON.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.engines.generation import TRACE_TOKENS
from rs_gguf.errors import escape_control_chars, excerpt
from rs_gguf.judges import FORMS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rs_gguf.records.scan import ScanRecord

_SHOWN = 160  # characters of a prompt or an answer


@click.command("scan")
@click.option("--model", required=True, metavar="M",
              help="GGUF file, catalogue name, owner/name/file.gguf, or a Hugging Face folder.")  # fmt: skip
@click.option("--judge", metavar="J",
              help=f"{', '.join(FORMS[:-1])} or {FORMS[-1]}; by default the embedded judge.")  # fmt: skip
@click.option("--tokens", default=48, show_default=True, type=click.IntRange(8),
              help="Maximum tokens of the final answer; "
                   f"a thinking trace may have {TRACE_TOKENS}.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object in place of the tables.")
@engine_options
def scan(model: str, judge: str | None, tokens: int, as_json: bool, engine: EngineOptions) -> None:
    """Find out in minutes whether a model refuses.

    Asks 60 embedded prompts. Prints the outcomes with examples, published files for this very model file, the
    time of a default run and a recommendation. Stops if the model cannot answer at all.
    """
    from rich.console import Console

    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.pipeline.scan import scan as scan_model

    click.echo("Loading the model. It answers 60 prompts, then its speed is measured.", err=True)
    with contextlib.closing(TerminalProgress()) as progress:
        record = scan_model(model, judge, tokens=tokens, overrides=engine.overrides(), progress=progress)
    if as_json:
        click.echo(json.dumps(record.model_dump(mode="json"), indent=2))
    else:
        _print(Console(), record)


def _print(console: Console, record: ScanRecord) -> None:
    from rich.text import Text

    from rs_gguf.report.text import duration

    def say(text: str, style: str = "") -> None:
        # Commands must not be wrapped, and brackets in foreign text are not markup.
        console.print(Text(escape_control_chars(text), style=style), soft_wrap=True)

    console.print(_table(record))
    say(f"Judge: {record.judge}; up to {record.tokens} tokens an answer.")
    for example in record.examples:
        say(f"{example.outcome}, {example.kind}: {excerpt(example.prompt, _SHOWN)}")
        say(f"  {excerpt(example.answer, _SHOWN) or '(empty)'}", style="dim")
    for file in record.files:
        say(f"{file.word.capitalize()} to {file.effect} refusals, acceptance criteria: {file.verdict}")
        say(f"  {file.command}")
    if record.run is not None:
        say(f"A default run takes about {duration(record.run.seconds)} on this machine.")
    say(record.reason, style="bold")


def _table(record: ScanRecord) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{escape_control_chars(record.model.name)}: outcomes of unsteered answers")
    table = Table(title=title, title_justify="left")
    table.add_column("prompts")
    for column in ("n", "complies", "refuses: explicit", "evasion", "fails", "unjudged"):
        table.add_column(column, justify="right")
    for kind, one in record.sets.items():
        of = one.outcomes
        counts = (one.n, of.complies, of.explicit, of.refuses - of.explicit, of.fails, of.unjudged)
        table.add_row(kind, *map(str, counts))
    return table
