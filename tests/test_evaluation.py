"""Intervals and tests against scipy, degenerate answers, sums of vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rs_gguf.evaluation import is_degenerate, mcnemar, summarise, summed, wilson
from rs_gguf.llama import Generation
from rs_gguf.steering import SteeringVector


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    successes, n = case
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sign_test(gained: int, lost: int) -> None:
    expected = 1.0 if gained + lost == 0 else binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "tokens", "degenerate"),
    [
        ("", [], True),
        ("   \n", [1], True),
        ("the cat " * 40, list(range(80)), True),
        ("no no no no no no no no", [5] * 12, True),
        ("1. Tell people about the vigil.\n2. Ask for a permit.\n3. Bring candles.", list(range(24)), False),
        ("I'm sorry, but I can't assist with that.", list(range(11)), False),
        ("会议定于周五下午三点在图书馆二楼举行，请准时参加。", list(range(18)), False),
    ],
)
def test_degenerate(text: str, tokens: list[int], degenerate: bool) -> None:
    assert is_degenerate(Generation(tokens, text, True)) is degenerate


def test_summarise_pairs_and_leaves_out_the_unjudged() -> None:
    def row(before: float | None, after: float | None) -> dict[str, object]:
        return {
            "confidence_baseline": before, "confidence_steered": after,
            "degenerate_baseline": False, "degenerate_steered": after is None,
        }  # fmt: skip

    found = summarise(
        [row(0.9, 0.8), row(0.7, -0.9), row(-0.5, -0.4), row(-0.1, 0.2), row(None, 0.9), row(0.9, None)]
    )
    assert found["n"] == 4
    assert found["unjudged"] == 2
    assert (found["refused_baseline"], found["refused_steered"], found["refused_both"]) == (2, 2, 1)
    assert found["mcnemar_p"] == 1.0
    assert found["degenerate_steered"] == pytest.approx(1 / 6)


def test_summed_scales_adds_and_keeps_to_the_range() -> None:
    one = SteeringVector({3: np.ones(4, np.float32), 5: np.ones(4, np.float32)})
    two = SteeringVector({5: np.full(4, 2, np.float32), 9: np.ones(4, np.float32)})
    total = summed([(one, -1.0), (two, 0.5)], (4, 8))
    assert list(total) == [5]
    np.testing.assert_array_equal(total[5], np.zeros(4))
