"""Select a trial from a search, and summarise the search.

The trials of one space go in; a trial, or the content of `tune.json`, comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rs_gguf.evaluation.paired_statistics import noise_allowance, standard_error
from rs_gguf.methods.method import Space
from rs_gguf.records.trials import Trial


def select_final(trials: Sequence[Trial]) -> Trial:
    """Return the trial to use: the selected candidate at the strength that does best at full length.

    Among its strength and the lower ones that answered in full, that is the lowest feasible one that changes
    as much as the best (see `select_candidate`), or the lowest of all if none is feasible.
    """
    selected = select_candidate([trial for trial in trials if trial.fidelity == "short"])
    tried = [
        trial
        for trial in trials
        if trial.fidelity == "full"
        and trial.candidate.without_strength() == selected.candidate.without_strength()
        and trial.candidate.strength <= selected.candidate.strength
    ]
    # Short answers favour too much strength, under which long ones fail.
    good = _as_good_as_the_best([trial for trial in tried if trial.feasible]) or tried
    return min(good, key=lambda trial: trial.candidate.strength, default=selected)


def select_candidate(answered: Sequence[Trial]) -> Trial:
    """Return the feasible trial of least drift among those that change as much as the best.

    "As much" means within one standard error of the best trial's share of sensitive prompts, or one prompt,
    since one prompt that differs between two trials is noise (McNemar's z = 1). If no trial is feasible, the
    result is `least_infeasible`, whose `feasible` is False.
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
    # The epsilon covers rounding: one prompt, as a difference of two quotients, may come out above 1 / n.
    limit = fewest + max(standard_error(min(1.0, fewest), n), 1 / n) + 1e-9
    return [trial for trial in feasible if trial.sensitive_remaining <= limit]


def least_infeasible(answered: Sequence[Trial]) -> Trial:
    """Return the trial that keeps most harmful refusals, then closes fewest benign prompts.

    Of trials that stopped only the first is known, so the earlier of two equal ones is returned.
    """
    return max(
        answered,
        key=lambda t: (
            min(1.0, t.harmful_retention),
            -max(0.0, t.benign_closed or 0.0),
            -t.sensitive_remaining,
        ),
    )


def reason_against_full(selected: Trial) -> str:
    """Return why a method whose search selected this trial answers nothing in full; empty if it should.

    selected: a short trial. Full answers are worth their time if they may win something within the limits.
    """
    if not selected.feasible:
        return "no candidate was within all limits in short answers"
    n = selected.n_sensitive
    changed = round((1 - selected.sensitive_remaining) * n)
    if changed <= noise_allowance(changed):
        return f"in short answers it changes {changed} of {n} sensitive prompts, which may be chance"
    return ""


def summary(trials: Sequence[Trial], spaces: Mapping[str, Space]) -> dict[str, Any]:
    """Return the content of `tune.json`, with trials by their numbers and `spaces` by their methods.

    A space is left out if its search was interrupted before a candidate answered.
    """
    selected, without_full = {}, {}
    for name, space in spaces.items():
        own = [trial for trial in trials if space.holds(trial.candidate)]
        answered = [trial for trial in own if trial.fidelity == "short"]
        if not answered:
            continue
        selected[name] = select_final(own).number
        if reason := reason_against_full(select_candidate(answered)):
            without_full[name] = reason
    return {
        "selected": selected,
        "no_full_answers": without_full,
        "trials": [trial.to_row() for trial in trials],
    }
