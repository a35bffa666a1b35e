"""Print the results of `rs-export eval`.

In: the figures of `rs_gguf.evaluation.comparison`. Out: tables on a console.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rs_gguf.errors import escape_control_chars

# Only large groups (by subject, topic …) are printed, and only some of them; the JSON file holds all.
_MIN_PROMPTS, _MAX_GROUPS = 5, 12


def print_comparison(console: Console, result: Mapping[str, Any], tokens: int) -> None:
    """Print one comparison: a row per figure, a column for unsteered and for steered.

    tokens: maximum tokens of an answer.
    """
    for name, figures in result["sets"].items():
        title = f"{escape_control_chars(name)}: {figures['n']} prompts"
        if figures["unjudged"]:
            title += f" (and {figures['unjudged']} unjudged)"
        table = Table(title=Text(title), title_justify="left")
        for column in ("", "unsteered", "steered", ""):
            table.add_column(column, overflow="fold")
        table.add_row(
            "refused",
            _share(figures, "unsteered"),
            _share(figures, "steered"),
            f"p = {figures['mcnemar_p']:.2g}",
        )
        unsteered, steered = figures["output_flags"]["unsteered"], figures["output_flags"]["steered"]
        for flag in unsteered:
            label = f"truncated at {tokens} tokens" if flag == "truncated" else flag.replace("_", " ")
            table.add_row(label, str(unsteered[flag]), str(steered[flag]))
        if figures["drift"] is not None:
            table.add_row("drift of answers", "", f"{_number(figures['drift'], '.4f')} nats/token")
            table.add_row("top-1 agreement", "", _number(figures["top1_agreement"], ".1%"))
        console.print(table)
        for field, groups in figures["by"].items():
            _print_groups(console, field, groups)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("", "unsteered", "steered", ""):
        table.add_column(column, overflow="fold")
    text = result["benign_text"]
    if text["drift"] is not None:
        table.add_row(
            f"perplexity, {text['n']} texts",
            _number(text["perplexity_unsteered"], ".2f"), _number(text["perplexity_steered"], ".2f"),
            f"{_number(text['top1_agreement'], '.1%')} top-1",
        )  # fmt: skip
    for kind, figures in result.get("capability", {}).items():
        truncated = max(figures["unanswered_unsteered"], figures["unanswered_steered"])
        note = f" (and {truncated} truncated)" if truncated else ""
        table.add_row(
            f"{kind} tasks{note}", _correct(figures, "unsteered"), _correct(figures, "steered"),
            f"p = {figures['mcnemar_p']:.2g}",
        )  # fmt: skip
    speed = result["tokens_per_second"]
    table.add_row(
        "tokens/s",
        f"{speed['unsteered']:.1f}",
        f"{speed['steered']:.1f}",
        _number(speed["change"], "+.0%"),
    )
    console.print(table)


def _print_groups(console: Console, field: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Print refusals by the values of `field`, the largest changes first."""

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[int, int]:
        return -abs(item[1]["refused_steered"] - item[1]["refused_unsteered"]), -item[1]["n"]

    large = [item for item in groups.items() if item[1]["n"] >= _MIN_PROMPTS]
    shown = sorted(large, key=order)[:_MAX_GROUPS]
    if len(groups) < 2 or not shown:
        return
    note = f", {len(shown)} of {len(groups)}" if len(shown) < len(groups) else ""
    table = Table(title=f"refused by {field}{note}", title_justify="left")
    for column in (field, "unsteered", "steered"):
        table.add_column(column, overflow="fold")
    for value, figures in shown:
        table.add_row(
            Text(escape_control_chars(value)), _share(figures, "unsteered"), _share(figures, "steered")
        )
    console.print(table)


def print_scale_sweep(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """Print a scale sweep: one table per prompt set, one row per scale factor."""
    for name in results[0]["sets"]:
        title = Text(f"{escape_control_chars(name)}: {results[0]['sets'][name]['n']} prompts")
        table = Table(title=title, title_justify="left", box=SIMPLE)  # eight columns must fit 80 characters
        for column in ("scale", "refused", "p", "empty", "loop", "switch", "drift", "top-1"):
            table.add_column(column)
        for result in results:
            figures = result["sets"][name]
            flags = figures["output_flags"]["steered"]
            table.add_row(
                f"{result['scale']:g}", _share(figures, "steered"), f"{figures['mcnemar_p']:.2g}",
                *(str(flags[flag]) for flag in ("empty", "loop", "language_switch")),
                _number(figures["drift"], ".4f"), _number(figures["top1_agreement"], ".1%"),
            )  # fmt: skip
        console.print(table)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("scale", "perplexity", "tasks solved", "tokens/s"):
        table.add_column(column)
    for result in results:
        text, solved = result["benign_text"], result.get("capability")
        table.add_row(
            f"{result['scale']:g}",
            _number(text["perplexity_steered"], ".2f"),
            _correct(solved["all"], "steered") if solved else "",
            f"{result['tokens_per_second']['steered']:.1f}",
        )  # fmt: skip
    console.print(table)


def _number(value: float | None, form: str) -> str:
    """Return a formatted figure, or "" for None, which stands for a figure that was not measured."""
    return "" if value is None else format(value, form)


def _share(figures: Mapping[str, Any], condition: str) -> str:
    """Return the refusals of a condition, `unsteered` or `steered`, with the 95% interval of their rate."""
    low, high = figures[f"ci95_{condition}"]
    return f"{figures[f'refused_{condition}']} of {figures['n']} ({low:.0%} to {high:.0%})"


def _correct(figures: Mapping[str, Any], condition: str) -> str:
    """Return the correct solutions of a condition with the 95% interval of their rate."""
    low, high = figures[f"ci95_{condition}"]
    return f"{figures[f'right_{condition}']}/{figures['n']} ({low * 100:.0f} to {high:.0%})"
