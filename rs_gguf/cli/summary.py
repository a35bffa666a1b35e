"""Print the result of a run: the recommended file, the refusals with each file, llama.cpp's commands.

In: the content of `metrics.json`. Out: text on a console.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rs_gguf.records.metrics import RunRecord
from rs_gguf.report.recommendation import files, headline, recommended_file, sentences
from rs_gguf.report.results import printable

_GOAL = {"sensitive": "fewer", "harmful": "as before", "benign": "not more"}


def print_results(console: Console, metrics: Mapping[str, Any], out: Path) -> None:
    """Print the recommendation for the files in the run folder `out`, from the content of metrics.json."""
    # A model's path or a judge's name may hold control characters of the terminal.
    record = RunRecord.of(printable(dict(metrics)), out / "metrics.json")
    rows = files(record)
    best = recommended_file(rows, record.effect)
    # As on the page, the recommended file comes first.
    ordered = sorted(rows, key=lambda file: file is not best)
    console.print(_table(rows, record.effect))
    _print_line(
        console,
        f"Judge: {record.judge.name}; {record.test_tokens} tokens per answer"
        + ("; a stratified subset of the test prompts." if record.subset else "."),
    )
    style = "bold red" if best is None else "bold green"
    _print_line(console, f"\n{headline(rows, record.effect)}.", style=style)
    for sentence in sentences(rows, record.effect):
        _print_line(console, sentence)
    for file in ordered:
        for reason in file["acceptance"]["reasons"]:
            _print_line(console, f"  {file['word']}: {reason}")
        for note in file["notes"]:
            _print_line(console, f"  {file['word']}: {note}")
    for file in ordered:
        if len(rows) == 1:
            note = ""
        elif file is best:
            note = " (recommended)"
        else:
            note = "" if file["passed"] else " (did not meet the acceptance criteria)"
        _print_line(console, f"\n{file['word'].capitalize()}, {printable(str(out / file['file']))}{note}:")
        _print_line(console, file["llama_cpp"]["command"])
    report, card = (printable(str(out / name)) for name in ("report.html", "card.md"))
    _print_line(console, f"\nReport: {report}   Card: {card}")


def _table(rows: Sequence[Mapping[str, Any]], effect: str) -> Table:
    """Return the refusal rates of each prompt set, unsteered and with each file."""
    table = Table(title="Refusals unsteered and with each file (95% interval)", title_justify="left")
    for column in ("prompts", "unsteered", *(str(file["word"]) for file in rows), "goal"):
        table.add_column(column)
    for sets in zip(*(file["sets"] for file in rows), strict=True):
        # All files share one unsteered rate only if they were judged on the same prompts.
        first, alike = sets[0], sets[0]["alike"]
        goal = "more" if effect == "induce" and first["kind"] == "sensitive" else _GOAL.get(first["kind"], "")
        table.add_row(
            Text(f"{first['name']}\n{first['n']} prompts" if alike else first["name"]),
            _rate(first, "unsteered") if alike else "",
            *(_rate(figures, "steered") + ("" if alike else _own_unsteered(figures)) for figures in sets),
            goal,
            end_section=True,
        )
    verdicts = (Text("passed", "green") if f["passed"] else Text("not passed", "red") for f in rows)
    table.add_row("acceptance", "", *verdicts, "passed")
    return table


def _rate(figures: Mapping[str, Any], condition: str) -> str:
    """Return the refusal rate of a condition, `unsteered` or `steered`, with its 95% interval."""
    if not figures["n"]:
        return "not measured"
    low, high = figures[f"ci95_{condition}"]
    return f"{figures[f'refusal_{condition}']:.1%}\n{low:.0%} to {high:.0%}"


def _own_unsteered(figures: Mapping[str, Any]) -> str:
    """Return the unsteered rate on a file's own prompts, for files that were judged on different prompts."""
    return f"\nunsteered {figures['refusal_unsteered']:.1%}\nof {figures['n']}" if figures["n"] else ""


def _print_line(console: Console, text: str, *, style: str = "") -> None:
    """Print a line without wrapping, which would break a command, and without markup for brackets."""
    console.print(Text(text, style=style), soft_wrap=True)
