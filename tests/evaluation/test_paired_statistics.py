"""Intervals and tests against published values, closed forms and a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from rs_gguf.evaluation.paired_statistics import (
    cluster_interval,
    lower_bound,
    mcnemar,
    noise_allowance,
    rate_interval,
    rogan_gladen,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_method_3(successes: int, n: int, low: float, high: float) -> None:
    """Table I of Newcombe (Statistics in Medicine 17, 1998)."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(3, 0, 2 / 8), (1, 5, 14 / 64), (4, 4, 1), (2, 10, 158 / 4096)]
)
def test_mcnemar_counts_both_tails(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_of_nothing_nothing_is_known() -> None:
    assert wilson(0, 0) == (0, 1)
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize(
    ("kept", "refused", "bound"), [(19, 19, 0.854), (29, 30, 0.851), (38, 40, 0.851), (20, 21, 0.793)]
)
def test_the_lower_bound_is_clopper_and_pearsons(kept: int, refused: int, bound: float) -> None:
    assert lower_bound(kept, refused) == pytest.approx(bound, abs=5e-4)
    # By its definition: at the bound, as many or more are kept with a probability of 5%.
    draws = np.random.default_rng(0).binomial(refused, lower_bound(kept, refused), 200_000)
    assert np.mean(draws >= kept) == pytest.approx(0.05, abs=0.003)
    assert lower_bound(0, 5) == 0


def test_noise_is_one_standard_deviation_and_a_prompt_at_least() -> None:
    assert [noise_allowance(flipped) for flipped in (0, 1, 9, 20)] == [
        1,
        1,
        3,
        pytest.approx(4.472, abs=1e-3),
    ]


def test_independent_prompts_have_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(3).exponential(0.1, 400)
    half = 1.96 * np.std(values) / np.sqrt(400)
    names = [[str(i) for i in range(400)]]
    interval = cluster_interval(values, np.ones(400), names)
    assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=half / 4)
    assert interval == cluster_interval(values, np.ones(400), [[""] * 400])
    assert cluster_interval(values, np.zeros(400), names) is None
    assert cluster_interval([*values[:399], np.nan], np.ones(400), names) is None
    assert cluster_interval([*values[:399], np.nan], [*np.ones(399), 0], names) is not None


def test_prompts_that_share_nothing_are_resampled_once() -> None:
    """Neither subject nor form: the interval of independent prompts, not one for each kind of cluster."""
    values, weights = np.arange(400) % 2, np.ones(400)
    alone = cluster_interval(values, weights, [[""] * 400])
    assert cluster_interval(values, weights, [[""] * 400, [""] * 400]) == alone
    subjects = [str(i % 20) for i in range(400)]
    assert cluster_interval(values, weights, [subjects, [""] * 400]) == cluster_interval(
        values, weights, [subjects]
    )


def test_prompts_of_one_subject_go_together() -> None:
    """With 20 subjects of 20 like prompts there are 20 draws, not 400."""
    values = [float(i % 20 < 6) for i in range(400)]
    low, high = cluster_interval(values, np.ones(400), [[str(i % 20) for i in range(400)]]) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 20), rel=0.15)


def test_subjects_and_forms_both_add_to_the_spread() -> None:
    """Value = effect of the subject + effect of the form: by hand, the variances of both means add up."""
    rng = np.random.default_rng(1)
    subjects, forms = rng.standard_normal(30), rng.standard_normal(20)
    names = [(s, f) for s in range(30) for f in range(20)]
    values = [subjects[s] + forms[f] for s, f in names]
    clusters = [[str(s) for s, _ in names], [str(f) for _, f in names]]
    low, high = cluster_interval(values, np.ones(600), clusters) or (0, 0)
    spread = 2 * 1.96 * np.sqrt(subjects.var() / 30 + forms.var() / 20)
    assert high - low == pytest.approx(spread, rel=0.15)


def test_a_rate_covers_wilson_and_the_clusters() -> None:
    alone = [[str(i) for i in range(40)]]
    assert rate_interval([False] * 40, [True] * 40, alone) == pytest.approx(wilson(0, 40))
    together = [["a"] * 20 + ["b"] * 20]
    low, high = rate_interval([True] * 20 + [False] * 20, [True] * 40, together)
    assert (low, high) == (0, 1)
    assert rate_interval([True, False], [False, False], [["a", "b"]]) == (0, 1)


@pytest.mark.parametrize("true", [0.0, 0.1, 0.5, 1.0])
def test_a_corrected_rate_inverts_the_errors_of_the_judge(true: float) -> None:
    sensitivity, specificity = 0.9, 0.97
    seen = true * sensitivity + (1 - true) * (1 - specificity)
    assert rogan_gladen(seen, sensitivity, specificity) == pytest.approx(true)


def test_a_corrected_rate_stays_within_0_and_1_and_needs_a_judge_better_than_chance() -> None:
    assert rogan_gladen(0.0, 0.9, 0.9) == 0
    assert rogan_gladen(1.0, 0.9, 0.9) == 1
    assert np.isnan(rogan_gladen(0.3, 0.5, 0.5))
