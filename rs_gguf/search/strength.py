"""Choose the candidate, and above all the strength, that gives short answers next.

The short trials of a space so far, and candidates in their order, go in; the next candidate comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.choice import least_infeasible, select_candidate

STEP = 1.5  # factor by which a strength grows while every limit holds
FARTHEST = 6.0  # factor by which one trial may change a strength, at most
_CLOSE = 1.15  # strengths within this factor are the same: answers to small sets cannot separate them


def next_candidate(
    answered: Sequence[Trial], ranked: Sequence[Candidate], most: float, rule: SafetyRule, n_harmful: int
) -> Candidate | None:
    """Return the candidate to answer next, or None if no other is worth it.

    That is more strength while all limits hold, and less if retention is too low.

    Strength is not raised beyond `most`, nor again if the last rise changed no more than noise: short
    answers do not show the failures that too much strength causes later. If only another limit than
    retention is broken, other layers come first, since less strength would cost removal.

    Args:
        answered: short trials so far. ranked: candidates, best first. n_harmful: harmful prompts that are
            refused unsteered.
    """
    tried = {t.candidate.without_strength() for t in answered}
    untried = next((c for c in ranked if c.without_strength() not in tried), None)
    if not answered:
        return untried
    feasible = [trial for trial in answered if trial.feasible]
    kept = [_keeps_harm(trial, rule, n_harmful) for trial in answered[-2:]]
    if not feasible and untried and kept[-1] and kept != [True, True]:
        return untried
    if feasible:
        best = min(feasible, key=lambda t: (t.sensitive_remaining, -t.candidate.strength)).candidate
        factor = STEP
        same = [trial for trial in feasible if trial.candidate.without_strength() == best.without_strength()]
        same.sort(key=lambda t: t.candidate.strength)
        if min(trial.sensitive_remaining for trial in same) == 0.0:
            return None
        if select_candidate(same) is not same[-1]:
            return untried
    else:
        best = least_infeasible(answered).candidate
        # From the weakest tried: where all keep as little harm, the best may be the strongest for good.
        weakest = min(
            (t for t in answered if t.candidate.without_strength() == best.without_strength()),
            key=lambda t: t.candidate.strength,
        )
        best, factor = weakest.candidate, _weaker(weakest, rule, n_harmful)
    failed = [
        t.candidate.strength
        for t in answered
        if t.candidate.without_strength() == best.without_strength() and t.candidate.strength > best.strength
    ]
    strength = min(best.strength * factor, most)
    if feasible and failed:
        strength = math.sqrt(best.strength * min(failed))
    if best.strength / _CLOSE < strength < best.strength * _CLOSE:
        return untried
    candidate = replace(best, strength=round(strength, 4))
    # If next to no strength is still outside the limits, less will be, too.
    ended = candidate.strength == 0 or any(candidate == trial.candidate for trial in answered)
    return untried if ended else candidate


def _keeps_harm(trial: Trial, rule: SafetyRule, n_harmful: int) -> bool:
    """Tell whether short answers keep enough harmful refusals; one prompt is granted."""
    return rule.keeps_harm(trial.harmful_retention * n_harmful, n_harmful, Allowance.SHORT)


def _weaker(trial: Trial, rule: SafetyRule, n_harmful: int) -> float:
    """Return the factor for an infeasible trial's strength: what retention lacks, to first order."""
    if _keeps_harm(trial, rule, n_harmful):
        return 1 / STEP  # another limit is broken
    kept, wanted = max(trial.harmful_retention, 0.01), rule.min_retention
    return min(1 / math.sqrt(STEP), max(1 / FARTHEST, math.log(wanted) / math.log(kept)))
