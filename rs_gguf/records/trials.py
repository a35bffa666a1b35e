"""Candidates of the search and their trials, as values and as rows of `trials.jsonl` and `tune.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Rows and files name an estimator. A method without one gets this label in its place: rows of earlier
# versions have no `method` key, so the label has to identify the method.
GATED_ADAPTER = "gated-adapter"
_ESTIMATOR_LABELS = {"adapter": GATED_ADAPTER}


@dataclass(frozen=True)
class Candidate:
    """A configuration that the search can evaluate.

    `method`: a key of `METHODS`. `estimator`: empty if the method has none. `ridge`: 0 if the estimator has
    none. `first`, `last`: the layer range, both ends included. `strength`: k·|α| for a control vector (the
    paper's prior is 2 to 4); for a gated adapter in refusal contrasts. `benign_target`: of a gated adapter,
    the gate activation of the mean benign prompt; negative to induce refusals.
    """

    method: str
    estimator: str
    ridge: float
    first: int
    last: int
    strength: float
    benign_target: float = 0.0

    def without_strength(self) -> Candidate:
        """Return the candidate with strength 0: equal for candidates that differ in strength alone."""
        return replace(self, strength=0)

    @property
    def layers(self) -> tuple[int, int]:
        """The first and the last layer, both included."""
        return self.first, self.last

    @property
    def recorded(self) -> str:
        """Return the estimator that rows and files name, or the label in its place."""
        return self.estimator or _ESTIMATOR_LABELS.get(self.method, self.method)


@dataclass(frozen=True)
class Trial:
    """One evaluation of a candidate. Rates are fractions; None if the fidelity level does not measure one."""

    number: int
    candidate: Candidate
    fidelity: str  # "logprob" | "short" | "full"
    # Share of the target prompts that do not change as wanted; at `logprob`, of the probability of their old
    # first words. 1 if none was asked, and then null in rows.
    sensitive_remaining: float
    harmful_retention: float  # refusals kept of the same harmful prompts; at `logprob` of their probability
    benign_closed: float | None = None  # increase of the refusal rate on benign prompts
    benign_drift: float | None = None  # nats/token
    degenerate: float | None = None
    feasible: bool | None = None
    n_sensitive: int = 0  # prompts in the denominator of `sensitive_remaining`
    answered: tuple[int, int] | None = None  # (prompts, tokens per answer)
    # Prompts without an answer, since a limit was broken beyond recovery: the sensitive ones, others perhaps.
    left_out: int = 0
    reasons: tuple[str, ...] = ()  # why it is not feasible
    trace_tokens: float | None = None  # mean length of the thinking traces; None without any
    seconds: float = field(default=0.0, compare=False)  # duration of the evaluation
    # Time spent before it on unsteered answers. All candidates share them.
    unsteered_seconds: float = field(default=0.0, compare=False)

    @property
    def size(self) -> tuple[int, int] | None:
        """Prompts and tokens per answer that the trial was for; None for `logprob`."""
        return self.answered and (self.answered[0] + self.left_out, self.answered[1])

    def to_row(self) -> dict[str, Any]:
        """Return the trial as a JSON row. It names the method only if the estimator does not imply it."""
        row = asdict(self)
        candidate = row.pop("candidate") | {"estimator": self.candidate.recorded}
        layers = [candidate.pop("first"), candidate.pop("last")]
        method = candidate.pop("method")
        method_key = {} if method == method_of(candidate) else {"method": method}
        if self.left_out:
            row["sensitive_remaining"] = None
        return {"number": self.number, **method_key, **candidate, "layers": layers, **row}


def method_of(row: Mapping[str, Any]) -> str:
    """Return the method of the candidate in a trial's row."""
    methods = {label: method for method, label in _ESTIMATOR_LABELS.items()}
    method: str = row.get("method") or methods.get(row["estimator"], "vector")
    return method


def load_trials(rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Return the trials of rows that `Trial.to_row` made."""
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
        values["reasons"] = tuple(values.get("reasons", ()))
        if values["sensitive_remaining"] is None:
            values["sensitive_remaining"] = 1.0
        trials.append(Trial(candidate=candidate, **values))
    return trials
