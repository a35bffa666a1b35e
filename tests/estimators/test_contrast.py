"""Which samples a gate's contrast is made of: refusals that were meant, by what the judge told of them."""

from __future__ import annotations

import numpy as np
import pytest

from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.judges.rubric import rubric
from rs_gguf.records.conversation import FAILURES

COUNT = 12  # of each kind: the first half is refused


def labels() -> Labels:
    confidence = np.tile(np.repeat([0.9, -0.9], COUNT // 2), 3)
    return Labels.of(confidence, np.repeat(["sensitive", "harmful", "benign"], COUNT))


def refused(weights: np.ndarray, kind: int) -> np.ndarray:
    """Weights of the refused samples of a kind."""
    return weights[kind * COUNT : kind * COUNT + COUNT // 2]


def test_kinds_of_refusal_are_those_of_the_rubric() -> None:
    assert {"direct", *FAILURES} <= {category["id"] for category in rubric()["refusal"]}


def test_an_answer_that_fell_apart_is_no_refusal_to_take_away() -> None:
    kinds = ["nonsense", "direct", None, "official_line", "empty", "deflection"]
    weights = contrast_weights(labels(), kinds, induce=False)
    np.testing.assert_allclose(refused(weights, 0), [0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4], atol=1e-12)
    np.testing.assert_allclose(weights.sum(), 0, atol=1e-12)
    # Where nothing is known, all of them.
    np.testing.assert_allclose(refused(contrast_weights(labels(), induce=False), 0), 1 / 6)


@pytest.mark.parametrize("failures", [3, 6])
def test_where_hardly_any_other_refusal_is_left_failures_count(failures: int) -> None:
    """Of another kind of prompt there may be as many as you like: sensitive prompts are what is steered."""
    kinds = [*["empty"] * failures, *["direct"] * (COUNT - failures)]
    weights = contrast_weights(labels(), kinds, induce=False)
    np.testing.assert_allclose(refused(weights, 0), 1 / 6)


@pytest.mark.parametrize("direct", [MIN_SAMPLES, MIN_SAMPLES - 1])
def test_induced_refusals_are_direct_ones_where_there_are_enough(direct: int) -> None:
    """Of any kind of prompt; else all that did not fall apart."""
    categories: list[str | None] = [None] * (3 * COUNT)
    categories[:4] = ["direct", "direct", "nonsense", "deflection"]
    categories[COUNT : COUNT + 4] = [*["direct"] * (direct - 2), *["empty"] * (6 - direct)]
    weights = contrast_weights(labels(), categories, induce=True)
    used = {categories[i] for i in np.flatnonzero(weights < 0)}
    assert used == ({"direct"} if direct == MIN_SAMPLES else {"direct", "deflection", None})
    assert weights[weights < 0].sum() == pytest.approx(-1)
    assert weights[weights > 0].sum() == pytest.approx(1)


def test_a_side_without_samples_is_named() -> None:
    none = Labels.of(np.full(3, -0.9), ["sensitive", "harmful", "benign"])
    weightless = Labels.of([0.9, -0.9], ["sensitive"] * 2, sample_weight=[0, 1])
    for found in (none, weightless):
        with pytest.raises(InputError, match="no refused sensitive prompt"):
            contrast_weights(found, induce=False)
