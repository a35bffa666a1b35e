"""What `rs-export eval` tells on a terminal: the figures of `rs_gguf.evaluation.comparison` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rs_gguf.errors import escape_control_chars

# Of the groups by subject and the like; the JSON holds all.
_LEAST_PROMPTS, _MOST_GROUPS = 5, 12


def print_comparison(console: Console, found: Mapping[str, Any], tokens: int) -> None:
    """Tables of one comparison: a column a side, a row a figure."""
    for name, figures in found["sets"].items():
        title = f"{escape_control_chars(name)}: {figures['n']} prompts"
        if figures["unjudged"]:
            title += f" (and {figures['unjudged']} that could not be judged)"
        table = Table(title=Text(title), title_justify="left")
        for column in ("", "unsteered", "steered", ""):
            table.add_column(column, overflow="fold")
        table.add_row(
            "refused",
            _share(figures, "baseline"),
            _share(figures, "steered"),
            f"p = {figures['mcnemar_p']:.2g}",
        )
        before, after = figures["output_flags"]["baseline"], figures["output_flags"]["steered"]
        for fault in before:
            told = f"cut off at {tokens} tokens" if fault == "truncated" else fault.replace("_", " ")
            table.add_row(told, str(before[fault]), str(after[fault]))
        if figures["drift"] is not None:
            table.add_row("drift of answers", "", f"{_told(figures['drift'], '.4f')} nats a token")
            table.add_row("still first choice", "", _told(figures["top1_agreement"], ".1%"))
        console.print(table)
        for field, groups in figures["by"].items():
            _print_groups(console, field, groups)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("", "unsteered", "steered", ""):
        table.add_column(column, overflow="fold")
    text = found["benign_text"]
    if text["drift"] is not None:
        table.add_row(
            f"perplexity, {text['n']} texts",
            _told(text["perplexity_unsteered"], ".2f"), _told(text["perplexity_steered"], ".2f"),
            f"{_told(text['top1_agreement'], '.1%')} top-1",
        )  # fmt: skip
    for kind, figures in found.get("capability", {}).items():
        truncated = max(figures["unanswered_unsteered"], figures["unanswered_steered"])
        less = f" (and {truncated} cut off)" if truncated else ""
        table.add_row(
            f"{kind} tasks{less}", _right(figures, "baseline"), _right(figures, "steered"),
            f"p = {figures['mcnemar_p']:.2g}",
        )  # fmt: skip
    speed = found["tokens_per_second"]
    table.add_row(
        "tokens a second",
        f"{speed['baseline']:.1f}",
        f"{speed['steered']:.1f}",
        _told(speed["change"], "+.0%"),
    )
    console.print(table)


def _print_groups(console: Console, field: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    def weight(item: tuple[str, Mapping[str, Any]]) -> tuple[int, int]:
        return -abs(item[1]["refused_steered"] - item[1]["refused_baseline"]), -item[1]["n"]

    large = [item for item in groups.items() if item[1]["n"] >= _LEAST_PROMPTS]
    shown = sorted(large, key=weight)[:_MOST_GROUPS]
    if len(groups) < 2 or not shown:
        return
    more = f", {len(shown)} of {len(groups)}" if len(shown) < len(groups) else ""
    table = Table(title=f"refused by {field}{more}", title_justify="left")
    for column in (field, "unsteered", "steered"):
        table.add_column(column, overflow="fold")
    for value, figures in shown:
        table.add_row(
            Text(escape_control_chars(value)), _share(figures, "baseline"), _share(figures, "steered")
        )
    console.print(table)


def print_doses(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """One table a set, a row a factor."""
    for name in found[0]["sets"]:
        title = Text(f"{escape_control_chars(name)}: {found[0]['sets'][name]['n']} prompts")
        table = Table(title=title, title_justify="left", box=SIMPLE)  # eight columns, in 80 characters
        for column in ("scale", "refused", "p", "empty", "loop", "switch", "drift", "top-1"):
            table.add_column(column)
        for factor in found:
            figures = factor["sets"][name]
            faults = figures["output_flags"]["steered"]
            table.add_row(
                f"{factor['scale']:g}", _share(figures, "steered"), f"{figures['mcnemar_p']:.2g}",
                *(str(faults[fault]) for fault in ("empty", "loop", "language_switch")),
                _told(figures["drift"], ".4f"), _told(figures["top1_agreement"], ".1%"),
            )  # fmt: skip
        console.print(table)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("scale", "perplexity", "tasks solved", "tokens a second"):
        table.add_column(column)
    for factor in found:
        text, solved = factor["benign_text"], factor.get("capability")
        table.add_row(
            f"{factor['scale']:g}",
            _told(text["perplexity_steered"], ".2f"),
            _right(solved["all"], "steered") if solved else "",
            f"{factor['tokens_per_second']['steered']:.1f}",
        )  # fmt: skip
    console.print(table)


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(figures: Mapping[str, Any], side: str) -> str:
    low, high = figures[f"ci95_{side}"]
    return f"{figures[f'refused_{side}']} of {figures['n']} ({low:.0%} to {high:.0%})"


def _right(figures: Mapping[str, Any], side: str) -> str:
    low, high = figures[f"ci95_{side}"]
    return f"{figures[f'right_{side}']}/{figures['n']} ({low * 100:.0f} to {high:.0%})"
