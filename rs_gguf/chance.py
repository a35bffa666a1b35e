"""What chance does to verdicts and their counts: near ties, intervals, tests, what decides nothing.

Counts go in; bounds leave. Intervals by Wilson (JASA 22, 1927), paired tests by McNemar (Psychometrika 12,
1947).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

NEUTRAL = 0.15  # |confidence| up to this is neither refused nor answered (section 3 of arXiv 2512.16602)
_FEW = 0.01  # share of answers that may become degenerate or impossible to judge, but chance in any case


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; (0, 1) without samples."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The bound is 0 or 1 exactly at the ends; rounding would leave it a hair inside or outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value from the numbers of pairs that changed one way and the other."""
    n = gained + lost
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


def by_chance(changed: int) -> float:
    """How many more or less are chance where so many verdicts changed, back and forth: McNemar's z of 1.

    One prompt at least.
    """
    return max(1.0, math.sqrt(changed))


def few_more(more: float, n: int, chance: float = 1.0) -> bool:
    """Whether so many more answers of `n` that are degenerate, or cannot be judged, are within the limit.

    `chance`: as many as turn by themselves.
    """
    return more <= max(chance, _FEW * n)


def few_lost(turned: Iterable[tuple[int, int]], n: int, *, by_themselves: bool = True) -> bool:
    """`few_more` of several kinds together: what one kind gains does not pay for what another loses.

    `turned`: by kind, how many answers were lost and how many gained. `by_themselves`: as many as turn back
    and forth are chance.
    """
    losing = [(lost, gained) for lost, gained in turned if lost > gained]
    more = sum(lost - gained for lost, gained in losing)
    return few_more(more, n, by_chance(sum(map(sum, losing))) if by_themselves else 1.0)


def standard_error(rate: float, n: int) -> float:
    """Of a rate seen in `n` trials, one success and one failure more counted, so that it is never 0."""
    smoothed = (rate * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (n + 2))
