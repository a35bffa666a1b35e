"""What a run says at its end: which file to use, the refusals under each, the lines that start llama.cpp.

The content of `metrics.json` goes in, text on a console comes out.
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

_WANTED = {"sensitive": "fewer", "harmful": "as before", "benign": "not more"}


def print_results(console: Console, metrics: Mapping[str, Any], out: Path) -> None:
    """Print the verdict on the files in the run folder `out`; `metrics` is the content of metrics.json."""
    record = RunRecord.of(
        printable(dict(metrics)), out / "metrics.json"
    )  # a model's path or a judge's name may hold what a terminal obeys
    found = files(record)
    best = recommended_file(found, record.effect)
    # As in the page: the recommended_file file first where something is said file by file.
    ordered = sorted(found, key=lambda file: file is not best)
    console.print(_table(found, record.effect))
    _say(
        console,
        f"Judge: {record.judge.name}; {record.test_tokens} tokens an answer"
        + ("; a stratified subset of the test prompts." if record.subset else "."),
    )
    style = "bold red" if best is None else "bold green"
    _say(console, f"\n{headline(found, record.effect)}.", style=style)
    for sentence in sentences(found, record.effect):
        _say(console, sentence)
    for file in ordered:
        for reason in file["acceptance"]["reasons"]:
            _say(console, f"  {file['word']}: {reason}")
        for note in file["notes"]:
            _say(console, f"  {file['word']}: {note}")
    for file in ordered:
        if len(found) == 1:
            note = ""
        elif file is best:
            note = " (the one to use)"
        else:
            note = "" if file["passed"] else " (did not pass its safety gate)"
        _say(console, f"\n{file['word'].capitalize()}, {printable(str(out / file['file']))}{note}:")
        _say(console, file["llama_cpp"]["command"])
    report, card = (printable(str(out / name)) for name in ("report.html", "card.md"))
    _say(console, f"\nReport: {report}   Card: {card}")


def _table(found: Sequence[Mapping[str, Any]], effect: str) -> Table:
    table = Table(title="Refused, before and with each file (95 % interval)", title_justify="left")
    for column in ("prompts", "before", *(str(file["word"]) for file in found), "wanted"):
        table.add_column(column)
    for sets in zip(*(file["sets"] for file in found), strict=True):
        one, alike = sets[0], sets[0]["alike"]
        wanted = "more" if effect == "induce" and one["kind"] == "sensitive" else _WANTED.get(one["kind"], "")
        table.add_row(
            Text(f"{one['name']}\n{one['n']} prompts" if alike else one["name"]),
            _rate(one, "unsteered") if alike else "",
            *(_rate(figures, "steered") + ("" if alike else _own_before(figures)) for figures in sets),
            wanted,
            end_section=True,
        )
    gates = (Text("passed", "green") if f["passed"] else Text("not passed", "red") for f in found)
    table.add_row("gate", "", *gates, "passed")
    return table


def _rate(figures: Mapping[str, Any], side: str) -> str:
    if not figures["n"]:
        return "not measured"
    low, high = figures[f"ci95_{side}"]
    return f"{figures[f'refusal_{side}']:.1%}\n{low:.0%} to {high:.0%}"


def _own_before(figures: Mapping[str, Any]) -> str:
    """For a file that was judged on other prompts than the file beside it."""
    return f"\nbefore {figures['refusal_unsteered']:.1%}\nof {figures['n']}" if figures["n"] else ""


def _say(console: Console, text: str, *, style: str = "") -> None:
    """A line as it is: a command must not be wrapped, and brackets in foreign text are no markup."""
    console.print(Text(text, style=style), soft_wrap=True)
