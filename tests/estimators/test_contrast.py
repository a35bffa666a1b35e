"""Test which samples form the refusal contrast, by the refusal categories of the judge."""

from __future__ import annotations

import numpy as np
import pytest

from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.judges.rubric import rubric
from rs_gguf.records.conversation import FAILURES

COUNT = 12  # samples of each kind; the first half is refused


def labels() -> Labels:
    confidence = np.tile(np.repeat([0.9, -0.9], COUNT // 2), 3)
    return Labels.of(confidence, np.repeat(["sensitive", "harmful", "benign"], COUNT))


def refused(weights: np.ndarray, kind: int) -> np.ndarray:
    """Return the weights of the refused samples of a kind."""
    return weights[kind * COUNT : kind * COUNT + COUNT // 2]


def test_categories_are_in_the_rubric() -> None:
    assert {"direct", *FAILURES} <= {category["id"] for category in rubric()["refusal"]}


def test_a_failure_is_not_a_refusal_to_remove() -> None:
    categories = ["nonsense", "direct", None, "official_line", "empty", "deflection"]
    weights = contrast_weights(labels(), categories, induce=False)
    np.testing.assert_allclose(refused(weights, 0), [0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4], atol=1e-12)
    np.testing.assert_allclose(weights.sum(), 0, atol=1e-12)
    # If no category is known, all refusals count.
    np.testing.assert_allclose(refused(contrast_weights(labels(), induce=False), 0), 1 / 6)


@pytest.mark.parametrize("failures", [3, 6])
def test_if_fewer_than_4_other_refusals_are_left_failures_count(failures: int) -> None:
    """Refusals of harmful prompts do not matter here: the adapter acts on sensitive prompts."""
    categories = [*["empty"] * failures, *["direct"] * (COUNT - failures)]
    weights = contrast_weights(labels(), categories, induce=False)
    np.testing.assert_allclose(refused(weights, 0), 1 / 6)


@pytest.mark.parametrize("direct", [MIN_SAMPLES, MIN_SAMPLES - 1])
def test_induced_refusals_are_explicit_ones_if_there_are_4(direct: int) -> None:
    """Refusals of all kinds of prompt count; with fewer explicit ones, all refusals except failures."""
    categories: list[str | None] = [None] * (3 * COUNT)
    categories[:4] = ["direct", "direct", "nonsense", "deflection"]
    categories[COUNT : COUNT + 4] = [*["direct"] * (direct - 2), *["empty"] * (6 - direct)]
    weights = contrast_weights(labels(), categories, induce=True)
    used = {categories[i] for i in np.flatnonzero(weights < 0)}
    assert used == ({"direct"} if direct == MIN_SAMPLES else {"direct", "deflection", None})
    assert weights[weights < 0].sum() == pytest.approx(-1)
    assert weights[weights > 0].sum() == pytest.approx(1)


def test_a_class_without_samples_is_named() -> None:
    none = Labels.of(np.full(3, -0.9), ["sensitive", "harmful", "benign"])
    weightless = Labels.of([0.9, -0.9], ["sensitive"] * 2, sample_weight=[0, 1])
    for empty in (none, weightless):
        with pytest.raises(InputError, match="no refused sensitive prompt"):
            contrast_weights(empty, induce=False)
