"""Which trial is chosen, and the front it is chosen from, by brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from front import pareto_front

from rs_gguf.methods import adapter, vector
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.choice import (
    least_infeasible,
    reason_against_full,
    select_candidate,
    select_final,
    summary,
)

VECTORS = vector.space_of([("wrmd", 1.0)], 24)
GATES = adapter.space_of([0.2], 24)


def trial(
    number: int,
    sensitive: float,
    retention: float,
    drift: float = 0.1,
    *,
    fidelity: str = "short",
    feasible: bool | None = True,
    candidate: Candidate | None = None,
    n: int = 40,
) -> Trial:
    place = candidate or Candidate("vector", "wrmd", 1.0, 8, 15, 1.0 + number)
    return Trial(number, place, fidelity, sensitive, retention, 0.0, drift, 0.0, feasible, n)


def test_of_trials_that_change_as_much_the_gentlest_is_chosen() -> None:
    # One standard error of 2 of 40 is 4 points.
    trials = [trial(0, 0.05, 1.0, 0.2), trial(1, 0.08, 0.96, 0.1), trial(2, 0.3, 1.0, 0.01)]
    assert select_candidate(trials).number == 1
    assert select_candidate(trials[::2]).number == 0
    # One standard error of 0 of 10 is less than a prompt; one prompt is no difference, two are.
    few = [trial(0, 0.0, 1.0, 0.2, n=10), trial(1, 0.1, 1.0, 0.1, n=10), trial(2, 0.2, 1.0, 0.05, n=10)]
    assert select_candidate(few).number == 1


def test_an_infeasible_trial_is_chosen_only_where_all_are() -> None:
    safe, strong = trial(0, 0.9, 0.96), trial(1, 0.0, 0.5, feasible=False)
    assert select_candidate([strong, safe]) is safe
    assert select_candidate([strong, trial(2, 0.4, 0.8, feasible=False)]).number == 2


def test_the_nearest_keeps_harm_and_then_adds_fewest_benign_refusals() -> None:
    loud = replace(trial(0, 0.2, 1.3, feasible=False), benign_closed=0.1)
    near = replace(trial(1, 0.3, 1.2, feasible=False), benign_closed=0.03)  # above all harm nothing is gained
    lost = replace(trial(2, 0.1, 0.9, feasible=False), benign_closed=-0.1)
    assert select_candidate([loud, near, lost]) is near


def test_of_those_without_more_benign_refusals_the_nearest_changes_most() -> None:
    fewer = replace(trial(0, 0.5, 0.9, feasible=False), benign_closed=-0.1)
    strong = replace(trial(1, 0.2, 0.9, feasible=False), benign_closed=0.0)
    assert least_infeasible([fewer, strong]) is strong


@pytest.mark.parametrize("other", [{"strength": 3.0}, {"strength": 1.0, "first": 9}], ids=["more", "shape"])
def test_full_answers_with_more_strength_or_of_another_shape_decide_nothing(other: dict[str, float]) -> None:
    """They may be there from an earlier search, which chose otherwise."""
    place = Candidate("vector", "wrmd", 1.0, 8, 15, 2.0)
    mine = trial(1, 0.5, 1.0, fidelity="full", candidate=place)
    better = trial(2, 0.0, 1.0, fidelity="full", candidate=replace(place, **other))  # type: ignore[arg-type]
    assert select_final([trial(0, 0.4, 1.0, candidate=place), mine, better]) is mine


def test_the_front_holds_all_that_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    # Coarse values, so that some are equal in part, and one in all.
    figures = [tuple(float(v) for v in row) for row in rng.integers(0, 6, (40, 3)) / 5]
    trials = [trial(i, s, r, d) for i, (s, r, d) in enumerate([*figures, figures[0]])]
    found = pareto_front(trials)
    expected = [
        t
        for t in trials
        if not any(
            o.sensitive_remaining <= t.sensitive_remaining
            and o.harmful_retention >= t.harmful_retention
            and (o.benign_drift or 0) <= (t.benign_drift or 0)
            and (o.sensitive_remaining, o.harmful_retention, o.benign_drift)
            != (t.sensitive_remaining, t.harmful_retention, t.benign_drift)
            for o in trials
        )
    ]
    assert {t.number for t in found} == {t.number for t in expected}
    assert all(a.sensitive_remaining <= b.sensitive_remaining for a, b in pairwise(found))
    assert 1 < len(found) < len(trials)


def test_a_summary_names_trials_by_number_and_keeps_spaces_apart() -> None:
    gate = Candidate("adapter", "", 0.2, 8, 22, 1.0, 0.25)
    vectors = [trial(3 + i, s, 1 - 0.1 * i, feasible=i < 2) for i, s in enumerate((0.9, 0.45, 0.2))]
    probes = [
        trial(i, t.sensitive_remaining**2, 0.9, fidelity="logprob", feasible=None, candidate=t.candidate)
        for i, t in enumerate(vectors)
    ]
    trials = [*probes, *vectors, trial(6, 0.6, 1.0, candidate=gate)]
    found = json.loads(json.dumps(summary(trials, {"vector": VECTORS, "adapter": GATES})))
    assert (found["selected"]["vector"], found["selected"]["adapter"]) == (4, 6)
    assert len(found["trials"]) == 7
    # Cut off before any gate had answered.
    assert "adapter" not in summary(trials[:6], {"vector": VECTORS, "adapter": GATES})["selected"]


def test_what_a_stopped_trial_changes_is_unknown() -> None:
    stopped = replace(trial(2, 1.0, 0.99, 0.01, feasible=False, n=0), left_out=30)
    found = summary([trial(0, 0.5, 0.97), trial(1, 0.2, 0.96), stopped], {"vector": VECTORS})
    assert [row["sensitive_remaining"] for row in found["trials"]] == [0.5, 0.2, None]
    assert summary([stopped], {"vector": VECTORS})["selected"] == {"vector": 2}


@pytest.mark.parametrize(("changed", "in_full"), [(0, False), (1, False), (2, True), (12, True)])
def test_what_changes_no_more_than_chance_is_not_answered_in_full(changed: int, in_full: bool) -> None:
    selected = trial(0, 1 - changed / 12, 1.0, n=12)
    reason = reason_against_full(selected)
    assert reason == ("" if in_full else f"in short answers it changes {changed} of 12 sensitive prompts, "
                      "which may be chance")  # fmt: skip
    recorded = summary([selected], {"vector": VECTORS})["no_full_answers"]
    assert recorded == ({} if in_full else {"vector": reason})
    infeasible = reason_against_full(replace(selected, feasible=False))
    assert infeasible == "no candidate was within all limits in short answers"
