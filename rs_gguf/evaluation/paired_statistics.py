"""Statistics of paired counts: intervals, exact tests and what counts as noise.

Counts and weights go in, bounds come out. Intervals follow Wilson (JASA 22, 1927), Clopper and Pearson
(Biometrika 26, 1934) and the two-way cluster bootstrap of Owen (Annals of Applied Statistics 1, 2007). Paired
tests follow McNemar (Psychometrika 12, 1947), corrected rates Rogan and Gladen (American Journal of
Epidemiology 107, 1978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rs_gguf.records.conversation import Prompt

DRAWS = 1000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a rate; (0, 1) without samples."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def lower_bound(successes: int, n: int) -> float:
    """Return the one-sided 95% Clopper-Pearson lower bound of a rate; 0 without samples."""
    from scipy.stats import beta

    return float(beta.ppf(0.05, successes, n - successes + 1)) if successes else 0.0


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided McNemar p-value of the pairs that changed one way and the other."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def rogan_gladen(rate: float, sensitivity: float, specificity: float) -> float:
    """Return the true rate behind a judge's `rate`, from its errors: Rogan and Gladen's estimate in [0, 1].

    NaN if the judge is no better than chance (sensitivity + specificity ≤ 1). The errors must be those on the
    answers that are judged; on other answers the estimate is off as the errors are.
    """
    informedness = sensitivity + specificity - 1
    return min(1.0, max(0.0, (rate + specificity - 1) / informedness)) if informedness > 0 else math.nan


def noise_allowance(flipped: int) -> float:
    """Return the largest net change in a count that is treated as noise when `flipped` outcomes changed.

    √flipped (McNemar's z = 1), but at least 1.
    """
    return max(1.0, math.sqrt(flipped))


def standard_error(rate: float, n: int) -> float:
    """Return the standard error of a rate seen in `n` trials.

    One success and one failure are added, so that it is never 0.
    """
    smoothed = (rate * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (n + 2))


def clusters_of(prompts: Sequence[Prompt]) -> list[list[str]]:
    """Return the names [N] of the subjects, and of the forms, that a bootstrap draws whole."""
    return [[prompt.subject for prompt in prompts], [prompt.form for prompt in prompts]]


def cluster_interval(
    values: ArrayLike, weights: ArrayLike, clusters: Sequence[Sequence[str]], *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval of Σ weight·value / Σ weight.

    Prompts on one subject, or of one form, stand or fall together. So each draw resamples whole subjects and,
    independently, whole forms; a prompt counts as often as both of its clusters were drawn, multiplied.
    A kind of cluster that no two prompts share does not count: single prompts are resampled once, not twice.

    Args:
        values, weights: [N], one entry for each prompt.
        clusters: names [N] of each kind of cluster. A prompt without a name is a cluster of its own.
        seed: of the draws.

    Returns:
        The interval, or None without a positive weight or with a value that is not finite.
    """
    v, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if not w.any() or not np.isfinite(v[w != 0]).all():
        return None
    v = np.where(w != 0, v, 0.0)
    rng = np.random.default_rng(seed)
    times: NDArray[np.float64] = np.ones((DRAWS, len(v)))
    labels = [[name or f"\0{i}" for i, name in enumerate(names)] for names in clusters]
    shared = [of_kind for of_kind in labels if len(set(of_kind)) < len(of_kind)]
    for of_kind in shared or labels[:1]:
        _, members = np.unique(of_kind, return_inverse=True)
        count = int(members.max()) + 1
        times *= rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)[:, members]
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = (times @ (w * v)) / (times @ w)
    low, high = np.quantile(rates[np.isfinite(rates)], [0.025, 0.975])
    return float(low), float(high)


def rate_interval(
    successes: ArrayLike, members: ArrayLike, clusters: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """Return a 95% interval of the rate of `successes` among `members`, both masks [N].

    It covers the Wilson interval and the cluster bootstrap: the first is too narrow for clustered prompts,
    the second for rates near 0 and 1. (0, 1) without members.
    """
    hits, of = np.asarray(successes, bool), np.asarray(members, bool)
    low, high = wilson(int((hits & of).sum()), int(of.sum()))
    drawn = cluster_interval(hits, of, clusters)
    return (low, high) if drawn is None else (min(low, drawn[0]), max(high, drawn[1]))
