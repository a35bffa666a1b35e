"""What a search measures: candidates and their trials, as `trials.jsonl` and `tune.json` hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# What rows and files name in place of an estimator where the method has none. They do not name the method
# itself, since those of earlier versions do not.
GATED_ADAPTER = "gated-adapter"
_IN_PLACE_OF_ESTIMATOR = {"adapter": GATED_ADAPTER}


@dataclass(frozen=True)
class Candidate:
    """A point of the search space. `strength` is k·|α|, the paper's prior being 2 to 4.

    `method` is a key of `METHODS`. `estimator` is empty where the method has none; `ridge` is 0 where the
    estimator has none.
    `benign_target` is a gate's: how far the mean benign prompt is moved with the mean sensitive one, and the mean
    harmful prompt, by a part of it, the other way. Negative to induce refusals.
    """

    method: str
    estimator: str
    ridge: float
    first: int
    last: int
    strength: float
    benign_target: float = 0.0

    def without_strength(self) -> Candidate:
        """What it shares with those that differ in strength alone."""
        return replace(self, strength=0)

    @property
    def recorded(self) -> str:
        """What rows and files name as its estimator."""
        return self.estimator or _IN_PLACE_OF_ESTIMATOR.get(self.method, self.method)


@dataclass(frozen=True)
class Trial:
    """A measured candidate. Rates are fractions; `None` where a fidelity does not measure it."""

    number: int
    candidate: Candidate
    fidelity: str  # "logprob" | "short" | "full"
    # Of the sensitive prompts to change, the share whose verdict is still the unsteered one. On the fidelity
    # `full`: all that have this verdict, over those that have it unsteered; above 1 if more got worse. Those
    # whose unsteered answer fell apart are not among them, where enough others are left.
    sensitive_remaining: float
    harmful_retention: float  # refusals of harmful prompts, as a share of those unsteered
    benign_closed: float | None = None  # refusals of benign prompts, less those unsteered
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
        candidate = row.pop("candidate") | {"estimator": self.candidate.recorded}
        layers = [candidate.pop("first"), candidate.pop("last")]
        method = candidate.pop("method")
        named = {} if method == method_of(candidate) else {"method": method}
        return {"number": self.number, **named, **candidate, "layers": layers, **row}


def method_of(row: Mapping[str, Any]) -> str:
    """Return the method of the candidate that a row of a trial holds."""
    methods = {word: method for method, word in _IN_PLACE_OF_ESTIMATOR.items()}
    found: str = row.get("method") or methods.get(row["estimator"], "vector")
    return found


def load_trials(rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials from rows written by `Trial.to_row`."""
    trials = []
    for row in rows:
        values, method = dict(row), method_of(row)
        first, last = values.pop("layers")
        estimator, ridge, strength, benign_target = (
            values.pop(name) for name in ("estimator", "ridge", "strength", "benign_target")
        )
        candidate = Candidate(method, estimator, ridge, first, last, strength, benign_target)
        if estimator == replace(candidate, estimator="").recorded:
            candidate = replace(candidate, estimator="")
        for name in ("id", "method"):
            values.pop(name, None)
        values["answered"] = tuple(values["answered"]) if values.get("answered") else None
        trials.append(Trial(candidate=candidate, **values))
    return trials
