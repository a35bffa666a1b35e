"""Test which samples form the refusal contrast, by the refusal categories of the judge."""

from __future__ import annotations

import numpy as np
import pytest

from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.judges.rubric import rubric
from rs_gguf.records.conversation import EXPLICIT

COUNT = 12  # samples of each kind; the first half is refused


def labels() -> Labels:
    confidence = np.tile(np.repeat([0.9, -0.9], COUNT // 2), 3)
    return Labels.of(confidence, np.repeat(["sensitive", "harmful", "benign"], COUNT))


def test_the_category_is_in_the_rubric() -> None:
    assert EXPLICIT in {category["id"] for category in rubric()["refusal"]}


def test_refused_and_answered_sensitive_prompts_form_the_contrast() -> None:
    weights = contrast_weights(labels(), induce=False)
    np.testing.assert_allclose(weights[:COUNT], np.repeat([1 / 6, -1 / 6], COUNT // 2))
    np.testing.assert_array_equal(weights[COUNT:], 0)


@pytest.mark.parametrize("direct", [MIN_SAMPLES, MIN_SAMPLES - 1])
def test_induced_refusals_are_explicit_ones_if_there_are_4(direct: int) -> None:
    """Refusals of all kinds of prompt count; with fewer explicit ones, all refusals."""
    categories: list[str | None] = [None] * (3 * COUNT)
    categories[:4] = ["direct", "direct", "moral_lecture", "deflection"]
    categories[COUNT : COUNT + 4] = [*["direct"] * (direct - 2), *["questioning"] * (6 - direct)]
    weights = contrast_weights(labels(), categories, induce=True)
    used = {categories[i] for i in np.flatnonzero(weights < 0)}
    others = {"moral_lecture", "deflection", "questioning", None}
    assert used == ({"direct"} if direct == MIN_SAMPLES else {"direct", *others})
    assert weights[weights < 0].sum() == pytest.approx(-1)
    assert weights[weights > 0].sum() == pytest.approx(1)


def test_a_class_without_samples_is_named() -> None:
    none = Labels.of(np.full(3, -0.9), ["sensitive", "harmful", "benign"])
    weightless = Labels.of([0.9, -0.9], ["sensitive"] * 2, sample_weight=[0, 1])
    for empty in (none, weightless):
        with pytest.raises(InputError, match="no refused sensitive prompt"):
            contrast_weights(empty, induce=False)
