"""What a run prints at its end: explicit refusals, outcomes, transitions, acceptance and the commands.

The content of `metrics.json` goes in. Text on a console comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rs_gguf.records.metrics import Outcomes, RunRecord, Share
from rs_gguf.report.recommendation import (
    ReportedFile,
    by_merit,
    files_in,
    headline,
    overall_verdict,
    reported_files,
    sentences,
)
from rs_gguf.report.results import printable
from rs_gguf.report.side_effects import agreement_line, side_effects
from rs_gguf.report.text import count, interval

_WANTED = {"sensitive": "fewer", "harmful": "as before", "benign": "not more"}
_STYLES = {"passed": "green", "failed": "red", "undecided": "yellow"}


def print_results(console: Console, metrics: Mapping[str, Any], out: Path, *, pages: bool = True) -> None:
    """Print what was measured of the files in the run folder `out`; `metrics` is metrics.json.

    pages: name the report and the card too, which show these figures.
    """
    # A model's path or a judge's name may hold characters that a terminal obeys.
    record = RunRecord.of(printable(dict(metrics)), out / "metrics.json")
    files = files_in(out, record) if pages else reported_files(record)
    ordered = by_merit(files, record.effect)  # as in the page
    console.print(_explicit(files, induce=record.effect == "induce"))
    console.print(_outcomes(files))
    if files[0].is_paired:
        console.print(_transitions(files))
    subset = "; a stratified subset of the validation split" if record.subset else ""
    _say(console, f"Judge: {record.judge.name}; up to {record.test_tokens} tokens an answer{subset}.")
    if agreement := agreement_line(record.judge):
        _say(console, agreement)
    if cells := side_effects([file.record for file in files]):
        console.print(_also_measured(files, cells))
    style = f"bold {_STYLES[overall_verdict(files)]}"
    _say(console, f"\n{headline(files, record.effect)}.", style=style)
    for sentence in sentences(files, record.effect):
        _say(console, sentence)
    for file in ordered:
        for line in (*file.reasons, *file.record.notes):
            _say(console, f"  {file.word}: {line}")
    for file in ordered:
        path = printable(str(out / file.record.file))
        _say(console, f"\n{file.word.capitalize()}, {path} ({file.verdict}):")
        _say(console, file.record.llama_cpp.command)
    if pages:
        report, card = (printable(str(out / name)) for name in ("report.html", "card.md"))
        _say(console, f"\nReport: {report}   Card: {card}")


def print_counts(out: Path) -> None:
    """Print the outcomes by kind of prompt, so that too few of a class show before hours of fitting."""
    from rs_gguf.pipeline.folder import RunFolder
    from rs_gguf.pipeline.stages.answers import counts

    names = ("complies", "refuses", "fails", "unjudged")
    table = Table("prompts", *names, title="Prompts for fit and search", title_justify="left")
    for kind, outcomes in counts(RunFolder(out)).items():
        table.add_row(kind, *(str(getattr(outcomes, name)) for name in names))
    Console().print(table)


def share_lines(share: Share | None) -> str:
    """Return `n of m` and the 95% interval below it, as the cell of a table."""
    if share is None or not share.of:
        return count(share)
    return f"{count(share)}\n{interval(share.ci95)}"


def _explicit(files: Sequence[ReportedFile], *, induce: bool) -> Table:
    table = Table(title="Explicit refusals (95% interval)", title_justify="left")
    for column in ("prompts", "unsteered", *(file.word for file in files), "wanted"):
        table.add_column(column)
    for name, one in files[0].sets.items():
        wanted = "more" if induce and one.kind == "sensitive" else _WANTED.get(one.kind or "", "")
        sets = [file.sets[name] for file in files]
        table.add_row(
            Text(name),
            _explicit_cell(one.outcomes_unsteered, one.explicit_unsteered, one.n),
            *(_explicit_cell(s.outcomes_steered, s.explicit_steered, s.n) for s in sets),
            wanted,
            end_section=True,
        )
    return table


def _explicit_cell(outcomes: Outcomes, share: Share | None, n: int) -> str:
    # Schema 1 has the count alone.
    return share_lines(share) if share else f"{outcomes.explicit} of {n}"


def _outcomes(files: Sequence[ReportedFile]) -> Table:
    table = Table(title="Outcomes", title_justify="left")
    for column in ("prompts", "with", "n", "complies", "refuses", "fails", "unjudged"):
        table.add_column(column)
    for name, one in files[0].sets.items():
        rows = [("unsteered", one.n, one.outcomes_unsteered)]
        rows += [(file.word, file.sets[name].n, file.sets[name].outcomes_steered) for file in files]
        for k, (word, n, of) in enumerate(rows):
            table.add_row(
                Text("" if k else name), Text(word),
                *map(str, (n, of.complies, of.refuses, of.fails, of.unjudged)),
                end_section=k == len(files),
            )  # fmt: skip
    return table


def _transitions(files: Sequence[ReportedFile]) -> Table:
    table = Table(title="Transitions of the same prompts (95% interval)", title_justify="left")
    for column in ("prompts", "with", "opened", "kept", "closed", "broken"):
        table.add_column(column)
    for name in files[0].sets:
        for k, file in enumerate(files):
            one = file.sets[name]
            table.add_row(
                Text("" if k else name), Text(file.word),
                *map(share_lines, (one.opened, one.kept, one.closed, one.broken)),
                end_section=k == len(files) - 1,
            )  # fmt: skip
    return table


def _also_measured(files: Sequence[ReportedFile], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    table = Table(title="Also measured", title_justify="left")
    for column in ("", *(file.word for file in files)):
        table.add_column(column)
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _say(console: Console, text: str, *, style: str = "") -> None:
    """Print a line as it is: a command must not be wrapped, and brackets in foreign text are not markup."""
    console.print(Text(text, style=style), soft_wrap=True)
