"""KL divergence of rows of logits, against a naive softmax in F64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rs_gguf.engines.next_token import kl, log_probabilities


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64))
    return np.asarray(weights / weights.sum())


def test_rows_of_logits_and_of_log_probabilities_have_the_same_divergence() -> None:
    of, against = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    expected = [
        float(np.sum(p * np.log(p / q)))
        for p, q in ((probabilities(a), probabilities(b)) for a, b in zip(of, against, strict=True))
    ]
    assert kl(of, against) == pytest.approx(expected)
    assert kl(log_probabilities(of), log_probabilities(against)) == pytest.approx(expected)
    assert kl(of[0], against[0]) == pytest.approx(expected[0])


def test_logits_that_are_not_finite_have_no_divergence() -> None:
    row = np.zeros(4, np.float32)
    assert kl(row, row) == 0
    assert np.isnan(kl(np.array([np.inf, 0, 0, 0], np.float32), row))
    assert np.isnan(kl(row, np.array([np.nan, 0, 0, 0], np.float32)))
    found = kl(np.array([row, [-np.inf, 0, 0, 0]]), np.array([row, row]))
    assert found[0] == 0
    assert np.isnan(found[1])
