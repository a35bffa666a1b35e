"""The errors of the embedded judge on the labelled test pairs: sensitivity and specificity by outcome.

The shipped `judge_test.json` goes in. `rs-export judge --agreement` measures it (docs/judge.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from rs_gguf.judges.judge import Judge


@dataclass(frozen=True)
class Accuracy:
    """Shares of the answers with an outcome that the judge finds, and of the others that it tells apart."""

    sensitivity: float
    specificity: float


def known_accuracy(judge: Judge) -> dict[str, Accuracy] | None:
    """Return the accuracy for `explicit` and `refuses` of the embedded judge; None for any other."""
    text = (resources.files("rs_gguf") / "data" / "judge_test.json").read_text(encoding="utf-8")
    shipped = json.loads(text)
    if shipped["judge"] != judge.name or "outcomes" not in shipped:
        return None
    return {
        outcome: Accuracy(found["sensitivity"], found["specificity"])
        for outcome, found in shipped["outcomes"].items()
    }
