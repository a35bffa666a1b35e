"""What chance does to verdicts and their counts: near ties, intervals, tests, what decides nothing.

Counts go in; bounds leave. Intervals by Wilson (JASA 22, 1927), paired tests by McNemar (Psychometrika 12,
1947).
"""

from __future__ import annotations

import math


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; (0, 1) without samples."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value from the numbers of pairs that changed one way and the other."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def noise_allowance(changed: int) -> float:
    """How many more or less are chance where so many verdicts changed, back and forth: McNemar's z of 1.

    One prompt at least.
    """
    return max(1.0, math.sqrt(changed))


def standard_error(rate: float, n: int) -> float:
    """Of a rate seen in `n` trials, one success and one failure more counted, so that it is never 0."""
    smoothed = (rate * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (n + 2))
