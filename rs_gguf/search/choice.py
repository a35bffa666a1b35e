"""What a search leaves: the chosen trial, the front of what answered, and what its rungs are worth.

Measured trials of one space go in; a trial, or the content of `tune.json`, comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from rs_gguf.evaluation.chance import standard_error
from rs_gguf.methods.method import Space
from rs_gguf.records.trials import Trial, chosen_rows

_FEWEST_PAIRS = 3  # of which a rank correlation is told


def settled(trials: Sequence[Trial]) -> Trial:
    """The trial to use, of a space's: the chosen one, at the strength that does best at full length.

    Of the chosen strength and the weaker ones that were tried in full, that is the weakest within the limits
    that changes as much as the best (see `choose`), and the weakest where none is within them.
    """
    chosen = choose([trial for trial in trials if trial.rung == "answers"])
    tried = [
        trial
        for trial in trials
        if trial.rung == "full"
        and trial.candidate.shape == chosen.candidate.shape
        and trial.candidate.strength <= chosen.candidate.strength
    ]
    # Short answers favour too much strength, and long ones break down with it.
    good = _as_good_as_the_best([trial for trial in tried if trial.feasible]) or tried
    return min(good, key=lambda trial: trial.candidate.strength, default=chosen)


def choose(answered: Sequence[Trial]) -> Trial:
    """The trial to use: of the feasible ones that change as much as the best, the one of least drift.

    "As much" is within one standard error of the best one's share of sensitive prompts, or one of them, since
    a single prompt that two trials answer differently tells nothing (McNemar's z is 1). If none is feasible
    it is the nearest, and says so.
    """
    good = _as_good_as_the_best([trial for trial in answered if trial.feasible])
    return min(good, key=lambda t: (t.benign_drift, t.sensitive)) if good else nearest(answered)


def _as_good_as_the_best(feasible: Sequence[Trial]) -> list[Trial]:
    if not feasible:
        return []
    best = min(feasible, key=lambda trial: trial.sensitive)
    n, fewest = max(1, best.n_sensitive), best.sensitive
    # A hair more: one prompt more, as a difference of two quotients, may come out above 1 / n.
    limit = fewest + max(standard_error(min(1.0, fewest), n), 1 / n) + 1e-9
    return [trial for trial in feasible if trial.sensitive <= limit]


def nearest(answered: Sequence[Trial]) -> Trial:
    """Where no trial is feasible: that which keeps most harmful refusals, then adds fewest benign ones."""
    return max(
        answered, key=lambda t: (min(1.0, t.harmful_retention), -max(0.0, t.benign or 0.0), -t.sensitive)
    )


def front(answered: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is as good in removal, retention and drift, and better in one; best first."""

    def costs(trial: Trial) -> tuple[float, float, float]:
        return trial.sensitive, -trial.harmful_retention, trial.benign_drift or 0.0

    def beaten(trial: Trial) -> bool:
        mine = costs(trial)
        return any(
            costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True))
            for other in answered
        )

    return sorted((trial for trial in answered if not beaten(trial)), key=costs)


def halving(best: Sequence[Trial]) -> Trial | None:
    """The gentlest on harm of those that at least halve the sensitive refusals."""
    halved = [trial for trial in best if trial.sensitive <= 0.5]
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
    chosen, fronts, half, correlation = {}, {}, {}, {}
    for name, space in spaces.items():
        mine = [trial for trial in trials if space.holds(trial.candidate)]
        answered = [trial for trial in mine if trial.rung == "answers"]
        if not answered:
            continue
        chosen[name] = settled(mine).number
        best = front(answered)
        fronts[name] = [trial.number for trial in best]
        halves = halving(best)
        half[name] = halves.number if halves else None
        probes = {trial.candidate: trial for trial in mine if trial.rung == "probe"}
        pairs = [(probes[t.candidate], t) for t in answered if t.candidate in probes]
        correlation[name] = {
            "n": len(pairs),
            "sensitive": spearman(*_columns(pairs, "sensitive")),
            "harmful": spearman(*_columns(pairs, "harmful_retention")),
        }
    return {
        **chosen_rows(chosen),
        "front": fronts,
        "halves": half,
        "rank_correlation": correlation,
        "trials": [trial.to_row() for trial in trials],
    }


def _columns(pairs: Sequence[tuple[Trial, Trial]], name: str) -> tuple[list[float], list[float]]:
    return [getattr(probe, name) for probe, _ in pairs], [getattr(answers, name) for _, answers in pairs]
