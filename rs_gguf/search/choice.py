"""What a search leaves: the chosen trial, the front of what answered, and what its evaluator are worth.

Measured trials of one space go in; a trial, or the content of `tune.json`, comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from rs_gguf.evaluation.paired_statistics import standard_error
from rs_gguf.methods.method import Space
from rs_gguf.records.trials import Trial

_FEWEST_PAIRS = 3  # of which a rank correlation is told


def select_final(trials: Sequence[Trial]) -> Trial:
    """The trial to use, of a space's: the chosen one, at the strength that does best at full length.

    Of the chosen strength and the weaker ones that were tried in full, that is the weakest within the limits
    that changes as much as the best (see `select_candidate`), and the weakest where none is within them.
    """
    chosen = select_candidate([trial for trial in trials if trial.fidelity == "short"])
    tried = [
        trial
        for trial in trials
        if trial.fidelity == "full"
        and trial.candidate.without_strength() == chosen.candidate.without_strength()
        and trial.candidate.strength <= chosen.candidate.strength
    ]
    # Short answers favour too much strength, and long ones break down with it.
    good = _as_good_as_the_best([trial for trial in tried if trial.feasible]) or tried
    return min(good, key=lambda trial: trial.candidate.strength, default=chosen)


def select_candidate(answered: Sequence[Trial]) -> Trial:
    """The trial to use: of the feasible ones that change as much as the best, the one of least drift.

    "As much" is within one standard error of the best one's share of sensitive prompts, or one of them, since
    a single prompt that two trials answer differently tells nothing (McNemar's z is 1). If none is feasible
    it is the nearest, and says so.
    """
    good = _as_good_as_the_best([trial for trial in answered if trial.feasible])
    return (
        min(good, key=lambda t: (t.benign_drift, t.sensitive_remaining))
        if good
        else least_infeasible(answered)
    )


def _as_good_as_the_best(feasible: Sequence[Trial]) -> list[Trial]:
    if not feasible:
        return []
    best = min(feasible, key=lambda trial: trial.sensitive_remaining)
    n, fewest = max(1, best.n_sensitive), best.sensitive_remaining
    # A hair more: one prompt more, as a difference of two quotients, may come out above 1 / n.
    limit = fewest + max(standard_error(min(1.0, fewest), n), 1 / n) + 1e-9
    return [trial for trial in feasible if trial.sensitive_remaining <= limit]


def least_infeasible(answered: Sequence[Trial]) -> Trial:
    """Where no trial is feasible: that which keeps most harmful refusals, then adds fewest benign ones."""
    return max(
        answered,
        key=lambda t: (
            min(1.0, t.harmful_retention),
            -max(0.0, t.benign_closed or 0.0),
            -t.sensitive_remaining,
        ),
    )


def pareto_front(answered: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is as good in removal, retention and drift, and better in one; best first."""

    def costs(trial: Trial) -> tuple[float, float, float]:
        return trial.sensitive_remaining, -trial.harmful_retention, trial.benign_drift or 0.0

    def beaten(trial: Trial) -> bool:
        mine = costs(trial)
        return any(
            costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True))
            for other in answered
        )

    return sorted((trial for trial in answered if not beaten(trial)), key=costs)


def halving(best: Sequence[Trial]) -> Trial | None:
    """The gentlest on harm of those that at least halve the sensitive refusals."""
    halved = [trial for trial in best if trial.sensitive_remaining <= 0.5]
    return max(halved, key=lambda trial: trial.harmful_retention, default=None)


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation, ties by their mean rank; None of fewer than three pairs or of a constant."""
    ranks = np.stack([rankdata(x), rankdata(y)])
    if ranks.shape[1] < _FEWEST_PAIRS or not np.ptp(ranks, axis=1).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def summary(trials: Sequence[Trial], spaces: Mapping[str, Space]) -> dict[str, Any]:
    """The content of `tune.json`; trials are named by their numbers, `spaces` by the method that each is of.

    A space whose search was cut off before a trial had answered is left out.
    """
    chosen, fronts, halved, correlation = {}, {}, {}, {}
    for name, space in spaces.items():
        mine = [trial for trial in trials if space.holds(trial.candidate)]
        answered = [trial for trial in mine if trial.fidelity == "short"]
        if not answered:
            continue
        chosen[name] = select_final(mine).number
        best = pareto_front(answered)
        fronts[name] = [trial.number for trial in best]
        half = halving(best)
        halved[name] = half.number if half else None
        probes = {trial.candidate: trial for trial in mine if trial.fidelity == "logprob"}
        pairs = [(probes[t.candidate], t) for t in answered if t.candidate in probes]
        correlation[name] = {
            "n": len(pairs),
            "sensitive": spearman(*_columns(pairs, "sensitive_remaining")),
            "harmful": spearman(*_columns(pairs, "harmful_retention")),
        }
    return {
        "selected": chosen,
        "pareto_front": fronts,
        "half_removal": halved,
        "rank_correlation": correlation,
        "trials": [trial.to_row() for trial in trials],
    }


def _columns(pairs: Sequence[tuple[Trial, Trial]], name: str) -> tuple[list[float], list[float]]:
    return [getattr(probe, name) for probe, _ in pairs], [getattr(answers, name) for _, answers in pairs]
