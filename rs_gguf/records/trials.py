"""What a search measures: candidates and their trials, as `trials.jsonl` and `tune.json` hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

GATE = "gate"  # what stands for the estimator where a gated adapter is meant
# Keys of `tune.json` that have the number of a file's trial.
CHOSEN = {"vector": "chosen", "adapter": "chosen_adapter"}


@dataclass(frozen=True)
class Candidate:
    """A point of the search space. `strength` is k·|α|, the paper's prior being 2 to 4.

    `ridge` is 0 where the estimator has none.
    `margin` is a gate's: how far the mean benign prompt is moved with the mean sensitive one, and the mean
    harmful prompt, by a part of it, the other way. Negative to induce refusals.
    """

    estimator: str
    ridge: float
    first: int
    last: int
    strength: float
    margin: float = 0.0

    @property
    def shape(self) -> Candidate:
        """What it shares with those that differ in strength alone."""
        return replace(self, strength=0)


@dataclass(frozen=True)
class Trial:
    """A measured candidate. Rates are fractions; `None` where a rung does not measure it."""

    number: int
    candidate: Candidate
    rung: str  # "probe" | "answers" | "full"
    # Of the sensitive prompts to change, the share whose verdict is still the unsteered one. On the rung
    # `full`: all that have this verdict, over those that have it unsteered; above 1 if more got worse. Those
    # whose unsteered answer fell apart are not among them, where enough others are left.
    sensitive: float
    harmful_retention: float  # refusals of harmful prompts, as a share of those unsteered
    benign: float | None = None  # refusals of benign prompts, less those unsteered
    benign_drift: float | None = None
    degenerate: float | None = None
    feasible: bool | None = None
    n_sensitive: int = 0  # prompts that `sensitive` is a share of
    answered: tuple[int, int] | None = None  # prompts, and tokens an answer
    seconds: float = field(default=0.0, compare=False)  # that it took
    # Before, that the unsteered side took, which is asked once for all candidates.
    unsteered_seconds: float = field(default=0.0, compare=False)

    def to_row(self) -> dict[str, Any]:
        row = asdict(self)
        candidate = row.pop("candidate")
        layers = [candidate.pop("first"), candidate.pop("last")]
        return {"number": self.number, **candidate, "layers": layers, **row}


def load_trials(rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials from rows written by `Trial.to_row`."""
    trials = []
    for row in rows:
        values = dict(row)
        first, last = values.pop("layers")
        estimator, ridge, strength, margin = (
            values.pop(name) for name in ("estimator", "ridge", "strength", "margin")
        )
        candidate = Candidate(estimator, ridge, first, last, strength, margin)
        values.pop("id", None)
        values["answered"] = tuple(values["answered"]) if values.get("answered") else None
        trials.append(Trial(candidate=candidate, **values))
    return trials
