"""What is known of the accuracy of a shipped judge, as `rs-export judge --agreement` measured it.

The name of a judge goes in. Its figures come out: `rs_gguf/data/judges/MODEL.json`, beside the judge's probe
(docs/judge.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rs_gguf.judges.judge import Judge


@dataclass(frozen=True)
class Accuracy:
    """How often a judge recognises an outcome, and how often it recognises that an answer lacks it."""

    sensitivity: float
    specificity: float


def shipped_figures(judge: str) -> dict[str, Any] | None:
    """Return the shipped figures of the judge with this name; None if none ship."""
    for file in (resources.files("rs_gguf") / "data" / "judges").iterdir():
        if file.name.endswith(".json"):
            figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if figures["judge"] == judge:
                return figures
    return None


def known_accuracy(judge: Judge) -> dict[str, Accuracy] | None:
    """Return a shipped judge's accuracy for `explicit` and `refuses` on validation answers; else None."""
    figures = shipped_figures(judge.name)
    if figures is None:
        return None
    return {
        outcome: Accuracy(*(rates[name]["n"] / rates[name]["of"] for name in ("sensitivity", "specificity")))
        for outcome, rates in figures["outcomes"]["rates"].items()
    }
