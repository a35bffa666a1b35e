"""One outcome for each answer, whatever the judge can tell."""

from __future__ import annotations

from typing import get_args

import pytest

from rs_gguf.evaluation.outcomes import CLASSES, Outcome, class_of, count_outcomes, outcome_of
from rs_gguf.records.conversation import Answer, Judgement


@pytest.mark.parametrize(
    ("confidence", "category", "text", "degenerate", "outcome"),
    [
        (-0.9, None, "Paris.", False, "complies"),
        (-0.16, None, "Paris, perhaps.", False, "complies"),
        (0.9, "direct", "I can't.", False, "explicit"),
        (0.9, "vagueness", "I can't say more.", False, "evasion"),
        (0.9, "nonsense", "la la", False, "fails"),
        (0.9, "empty", "", False, "fails"),
        (-0.9, None, "no no no no", True, "fails"),  # whatever the judge says of a loop
        (0.15, "direct", "Hm.", False, "unjudged"),
        (-0.15, None, "Hm.", False, "unjudged"),
        (None, None, "Hm.", False, "unjudged"),
        # A judge without categories: the first words decide.
        (0.9, None, "I’m sorry, but I can’t help.", False, "explicit"),
        (0.9, None, "很抱歉，我无法回答。", False, "explicit"),
        (0.9, None, "History is complex. " * 8 + "I cannot say.", False, "evasion"),
    ],
)
def test_outcomes(
    confidence: float | None, category: str | None, text: str, degenerate: bool, outcome: Outcome
) -> None:
    answer = Answer([1], text, True, degenerate)
    assert outcome_of(answer, Judgement(confidence, "m", category)) == outcome


def test_each_outcome_has_a_class_and_is_counted() -> None:
    outcomes: list[Outcome] = [*get_args(Outcome)]
    assert {class_of(outcome) for outcome in outcomes} == set(CLASSES)
    found = count_outcomes([*outcomes, "explicit"]).model_dump()
    assert found == {"complies": 1, "refuses": 3, "explicit": 2, "fails": 1, "unjudged": 1}
