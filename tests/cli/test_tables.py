"""The tables of `rs-export eval`, of invented figures."""

from __future__ import annotations

import io
from typing import Any

import pytest
from fixtures.invented_run import invented_set
from rich.console import Console

from rs_gguf.cli import tables

FLAGS = {"empty": 1, "loop": 0, "language_switch": 2, "truncated": 3}


def figures(opened: int = 0, closed: int = 0, broken: int = 0) -> dict[str, Any]:
    """What `eval` has of a set."""
    return {
        **invented_set(opened=opened, closed=closed, broken=broken).model_dump(mode="json"),
        "output_flags": {"unsteered": FLAGS, "steered": FLAGS},
        "drift": 0.0123, "top1_agreement": 0.97, "perplexity_unsteered": 2.0, "perplexity_steered": 2.5,
        "by": {
            "topic": {
                "maps": invented_set(n=20, refused=20, opened=15).model_dump(mode="json"),
                "songs": invented_set(n=20, refused=0).model_dump(mode="json"),
            }
        },
    }  # fmt: skip


def compared(**changes: Any) -> dict[str, Any]:
    return {
        "scale": 1.0,
        "sets": {"mine": figures(**changes)},
        "benign_text": {
            "n": 64, "drift": 0.01, "top1_agreement": 0.99,
            "perplexity_unsteered": 9.0, "perplexity_steered": 9.5,
        },
        "kl_first_token": 0.0123, "kl_mean": 0.0456,
        "tokens_per_second": {"unsteered": 80.0, "steered": 76.0, "change": -0.05},
    }  # fmt: skip


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_comparison_goes_from_explicit_refusals_to_outcomes_and_transitions(console: Console) -> None:
    tables.print_comparison(console, compared(opened=15, closed=2, broken=1), 128)
    text = printed(console)
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    names = [
        "explicit refusals",
        "complies",
        "refuses",
        "fails",
        "unjudged",
        "opened",
        "kept",
        "closed",
        "broken",
    ]
    names += ["not confirmed", "empty", "loop", "language switch", "truncated"]
    first = [row[0] for row in rows]
    assert [first.index(name) for name in names] == sorted(first.index(name) for name in names)
    of = {row[0]: row[1:] for row in rows}
    assert of["explicit refusals"][0].startswith("20 of 40 (")
    assert of["explicit refusals"][1].startswith("6 of 40 (")
    assert of["explicit refusals"][2].startswith("p = ")
    assert of["complies"][:2] == ["20", "33"]
    assert "0.0123 nats " in text
    assert "0.0456 nats/token" in text
    assert of["refuses"][:2] == ["20", "6"]
    assert of["fails"][:2] == ["0", "1"]
    for name, share in (
        ("opened", "15 of 20 ("), ("kept", "4 of 20 ("),
        ("closed", "2 of 20 ("), ("broken", "1 of 40 ("),
    ):  # fmt: skip
        assert of[name][1].startswith(share)
    for words in (
        "mine: 40 prompts, answers of up to 128 tokens",
        "0.0123 nats/token",
        "tokens/s",
        "perplexity, 64 texts",
    ):
        assert words in text


def test_groups_that_change_most_come_first(console: Console) -> None:
    tables.print_comparison(console, compared(), 128)
    groups = printed(console).split("explicit refusals by topic")[1]
    assert groups.index("maps") < groups.index("songs")
    assert "5 of 20" in groups


def test_a_sweep_has_a_row_for_each_scale_in_80_columns(console: Console) -> None:
    steps = [{**compared(opened=opened), "scale": scale} for scale, opened in ((0.0, 0), (0.5, 4), (1.5, 20))]
    tables.print_sweep(console, steps)
    lines = printed(console).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.strip().startswith(("0 ", "0.5 ", "1.5 "))]
    assert [row[0] for row in rows] == ["0", "0.5", "1.5"] * 2
    assert [" ".join(row[1:4]) for row in rows[:3]] == ["20 of 40", "16 of 40", "0 of 40"]
    assert [" ".join(row[4:7]) for row in rows[:3]] == ["0 of 20", "4 of 20", "20 of 20"]


def test_names_of_sets_cannot_command_the_terminal(console: Console) -> None:
    hostile = {**compared(), "sets": {"\x1b[31mred[/]": figures()}}
    tables.print_comparison(console, hostile, 8)
    assert "\x1b" not in printed(console)
    assert "red[/]" in printed(console)


@pytest.mark.parametrize("reasons", [[], ["kept 3 of 9 \x1b[31mharmful refusals"]])
def test_the_verdict_is_printed_where_the_kinds_are_known(console: Console, reasons: list[str]) -> None:
    acceptance = {"verdict": "failed" if reasons else "passed", "reasons": reasons}
    tables.print_comparison(console, {**compared(), "acceptance": acceptance}, 128)
    tables.print_sweep(console, [{**compared(), "acceptance": acceptance}])
    text = printed(console)
    assert text.count(f"Acceptance at scale 1: {acceptance['verdict']}.") == 2
    assert text.count("  kept 3 of 9 ") == 2 * len(reasons)
    assert "\x1b" not in text
    tables.print_comparison(console, compared(), 128)
    assert printed(console).count("Acceptance") == 2


def test_an_inspected_suite_is_called_so(console: Console) -> None:
    suite = {"name": "one", "dataset": "owner/one", "licence": "MIT", "inspected": True}
    tables.print_suites(console, [suite, {**suite, "name": "two", "inspected": False}])
    one, two = printed(console).replace("\n", " ").split("Suite ")[1:]
    assert "owner/one, licence MIT. Inspected: it has guided the design" in one
    assert "Inspected" not in two
