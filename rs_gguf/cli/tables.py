"""What `rs-export eval` prints: the figures of `rs_gguf.evaluation.comparison` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rs_gguf.errors import escape_control_chars
from rs_gguf.records.metrics import JudgeRecord, SetRecord, Share
from rs_gguf.report.side_effects import TRACE_FIGURES, agreement_line
from rs_gguf.report.text import count, interval

# Of the groups by subject and so on; the JSON holds all.
_MIN_PROMPTS, _MAX_GROUPS = 5, 12


def print_comparison(console: Console, measured: Mapping[str, Any], tokens: int) -> None:
    """Print one comparison: a table for each set, a row for each figure.

    tokens: the limit of an answer.
    """
    for name, figures in measured["sets"].items():
        _print_set(console, name, figures, tokens)
        for field, groups in figures["by"].items():
            _print_groups(console, field, groups)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("", "unsteered", "steered", ""):
        table.add_column(column, overflow="fold")
    text = measured["benign_text"]
    if text["drift"] is not None:
        table.add_row(
            f"perplexity, {text['n']} texts",
            _number(text["perplexity_unsteered"], ".2f"), _number(text["perplexity_steered"], ".2f"),
            f"{_number(text['top1_agreement'], '.1%')} top-1",
        )  # fmt: skip
    if measured["kl_mean"] is not None:
        table.add_row("KL divergence, first token", "", f"{_number(measured['kl_first_token'], '.4f')} nats")
        table.add_row("KL divergence, answers", "", f"{measured['kl_mean']:.4f} nats/token")
    speed = measured["tokens_per_second"]
    table.add_row(
        "tokens/s",
        f"{speed['unsteered']:.1f}",
        f"{speed['steered']:.1f}",
        _number(speed["change"], "+.0%"),
    )
    console.print(table)
    if second := measured.get("second_judge"):
        console.print(Text(agreement_line(JudgeRecord.model_validate(second))))
        console.print(f"Opened answers on the subject: {_share(Share(**second['opened_on_subject']))}.")
    _print_acceptance(console, measured)


def print_suites(console: Console, suites: Sequence[Mapping[str, Any]]) -> None:
    """Print where public suites come from, and which of them have guided the design."""
    for suite in suites:
        note = " Inspected: it has guided the design of this project." if suite["inspected"] else ""
        line = f"Suite {suite['name']}: {suite['dataset']}, licence {suite['licence']}.{note}"
        console.print(line, markup=False, highlight=False)


def _print_acceptance(console: Console, step: Mapping[str, Any]) -> None:
    """Print the verdict, where the kinds of the prompts are known, and its reasons."""
    if (acceptance := step.get("acceptance")) is None:
        return
    lines = [f"Acceptance at scale {step['scale']:g}: {acceptance['verdict']}."]
    lines += [f"  {escape_control_chars(reason)}" for reason in acceptance["reasons"]]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _print_set(console: Console, name: str, figures: Mapping[str, Any], tokens: int) -> None:
    """Print explicit refusals, outcomes, transitions, and then what else is known of a set."""
    one = SetRecord.model_validate(figures)
    title = Text(f"{escape_control_chars(name)}: {one.n} prompts, answers of up to {tokens} tokens")
    table = Table(title=title, title_justify="left")
    for column in ("", "unsteered", "steered", ""):
        table.add_column(column, overflow="fold")
    p = "" if one.explicit_p is None else f"p = {one.explicit_p:.2g}"
    table.add_row("explicit refusals", _share(one.explicit_unsteered), _share(one.explicit_steered), p)
    for outcome in ("complies", "refuses", "fails", "unjudged"):
        before, after = getattr(one.outcomes_unsteered, outcome), getattr(one.outcomes_steered, outcome)
        table.add_row(outcome, str(before), str(after), end_section=outcome == "unjudged")
    for transition in ("opened", "kept", "closed", "broken"):
        table.add_row(transition, "", _share(getattr(one, transition)))
    table.add_row("not confirmed", "", str(one.unconfirmed or 0), end_section=True)
    flags = figures["output_flags"]
    for flag in flags["unsteered"]:
        table.add_row(flag.replace("_", " "), str(flags["unsteered"][flag]), str(flags["steered"][flag]))
    for field, figure in TRACE_FIGURES.items():
        sides = [
            getattr(side, field) if side else None for side in (one.traces_unsteered, one.traces_steered)
        ]
        if sides != [None, None]:
            table.add_row(figure.lower(), *("" if side is None else f"{side:.4g}" for side in sides))
    if figures["drift"] is not None:
        table.add_row("drift of answers", "", f"{_number(figures['drift'], '.4f')} nats/token")
        table.add_row("top-1 agreement", "", _number(figures["top1_agreement"], ".1%"))
    console.print(table)
    if figures.get("refusals_asked"):
        console.print("The system prompt of this context asks for refusals. They should be kept.")


def _print_groups(console: Console, field: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Print explicit refusals of the largest groups; those that change most come first."""
    sets = {value: SetRecord.model_validate(figures) for value, figures in groups.items()}

    def weight(item: tuple[str, SetRecord]) -> tuple[int, int]:
        one = item[1]
        return -abs(one.outcomes_steered.explicit - one.outcomes_unsteered.explicit), -one.n

    large = [item for item in sets.items() if item[1].n >= _MIN_PROMPTS]
    shown = sorted(large, key=weight)[:_MAX_GROUPS]
    if len(sets) < 2 or not shown:
        return
    more = f", {len(shown)} of {len(sets)}" if len(shown) < len(sets) else ""
    table = Table(title=f"explicit refusals by {field}{more}", title_justify="left")
    for column in (field, "unsteered", "steered"):
        table.add_column(column, overflow="fold")
    for value, one in shown:
        name = Text(escape_control_chars(value))
        table.add_row(name, _share(one.explicit_unsteered), _share(one.explicit_steered))
    console.print(table)


def print_sweep(console: Console, steps: Sequence[Mapping[str, Any]]) -> None:
    """Print a scale sweep: a table for each set, a row for each scale factor. The JSON has all intervals."""
    for name, first in steps[0]["sets"].items():
        title = Text(f"{escape_control_chars(name)}: {first['n']} prompts")
        table = Table(title=title, title_justify="left", box=SIMPLE)  # eight columns, in 80 characters
        for column in ("scale", "explicit", "opened", "kept", "closed", "broken", "drift", "top-1"):
            table.add_column(column)
        for step in steps:
            figures = step["sets"][name]
            one = SetRecord.model_validate(figures)
            table.add_row(
                f"{step['scale']:g}",
                *(
                    count(share)
                    for share in (one.explicit_steered, one.opened, one.kept, one.closed, one.broken)
                ),
                _number(figures["drift"], ".4f"),
                _number(figures["top1_agreement"], ".1%"),
            )
        console.print(table)
    table = Table(title="What else changed", title_justify="left", box=SIMPLE)
    for column in ("scale", "perplexity", "KL", "tokens/s"):
        table.add_column(column)
    for step in steps:
        table.add_row(
            f"{step['scale']:g}",
            _number(step["benign_text"]["perplexity_steered"], ".2f"),
            _number(step["kl_mean"], ".4f"),
            f"{step['tokens_per_second']['steered']:.1f}",
        )
    console.print(table)
    for step in steps:
        _print_acceptance(console, step)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(share: Share | None) -> str:
    return count(share) if share is None or not share.of else f"{count(share)} ({interval(share.ci95)})"
