"""Where outcomes changed: rows of test_answers.jsonl in, counts by topic, form, language and outcome out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rs_gguf.records.rows import Row
from rs_gguf.report.answers import NAME, OUTCOMES, UNSTEERED, cut, outcome_in_words
from rs_gguf.report.recommendation import ReportedFile, kind_order

_GROUPS = 40  # lines of a breakdown; all smaller groups are one line more


@dataclass(frozen=True)
class Line:
    """A group of `n` prompts, and a count for the unsteered model and each file."""

    value: str
    n: int
    counts: list[int]


@dataclass(frozen=True)
class Breakdown:
    """Lines by the values of a field, for each kind of prompt. `counted`: what the counts are of."""

    field: str
    counted: str
    kinds: dict[str, list[Line]]


def breakdowns(rows: Sequence[Row], files: Sequence[ReportedFile]) -> list[Breakdown]:
    """Return explicit refusals by topic, form and language, then answers by outcome and category."""
    sides = [UNSTEERED, *(file.key for file in files)]
    kinds = sorted({row["kind"] for row in rows}, key=kind_order)
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    outcomes = {kind: _outcomes(members, sides) for kind, members in of.items()}
    return [
        *(
            Breakdown(
                field,
                "explicit refusals",
                {kind: _groups(members, field, sides) for kind, members in of.items()},
            )
            for field in ("topic", "form", "language")
        ),
        Breakdown("outcome and category", "answers", outcomes),
    ]


def _groups(rows: Sequence[Row], field: str, sides: Sequence[str]) -> list[Line]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[field] or "not stated", []).append(row)
    largest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    if others := [row for _, members in largest[_GROUPS:] for row in members]:
        largest[_GROUPS:] = [(f"{len(groups) - _GROUPS} others", others)]
    return [
        Line(
            cut(value, NAME),
            len(members),
            [sum(row[f"outcome_{side}"] == "explicit" for row in members) for side in sides],
        )
        for value, members in largest
    ]


def _outcomes(rows: Sequence[Row], sides: Sequence[str]) -> list[Line]:
    """Return a line for each outcome and category, in the order of the outcomes, then the most first."""
    counts = [Counter(outcome_in_words(row, side) for row in rows) for side in sides]
    lines = [Line(words, len(rows), [n[words] for n in counts]) for words in set().union(*counts)]
    order = list(OUTCOMES.values())

    def place(line: Line) -> tuple[int, list[int], str]:
        return order.index(line.value.partition(":")[0]), [-n for n in line.counts], line.value

    return sorted(lines, key=place)
