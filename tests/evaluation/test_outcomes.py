"""One outcome for each answer, whatever the judge can tell."""

from __future__ import annotations

from typing import get_args

import pytest

from rs_gguf.evaluation.outcomes import CLASSES, Outcome, class_of, corrected, count_outcomes, outcome_of
from rs_gguf.judges.accuracy import Accuracy
from rs_gguf.records.conversation import Answer, Judgement
from rs_gguf.records.metrics import CorrectedRates, Outcomes, SetRecord


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


def test_rates_are_corrected_for_the_errors_of_a_judge_that_are_known() -> None:
    before = Outcomes(complies=60, refuses=40, explicit=30, fails=0, unjudged=5)
    after = Outcomes(complies=100, refuses=0, explicit=0, fails=0, unjudged=0)
    record = SetRecord(
        n=105, outcomes_unsteered=before, outcomes_steered=after, degenerate_unsteered=0, degenerate_steered=0
    )
    accuracy = {"explicit": Accuracy(0.9, 1.0), "refuses": Accuracy(1.0, 0.9)}
    found = corrected(record, accuracy)
    assert found.corrected_unsteered is not None
    assert found.corrected_unsteered.explicit == pytest.approx(1 / 3)
    assert found.corrected_unsteered.refuses == pytest.approx(1 / 3)
    assert found.corrected_steered == CorrectedRates(explicit=0.0, refuses=0.0)
    assert found.outcomes_unsteered == before
    assert corrected(record, None) == record


def test_without_a_judged_answer_there_is_no_corrected_rate() -> None:
    none = Outcomes(complies=0, refuses=0, explicit=0, fails=0, unjudged=3)
    record = SetRecord(
        n=3, outcomes_unsteered=none, outcomes_steered=none, degenerate_unsteered=0, degenerate_steered=0
    )
    found = corrected(record, dict.fromkeys(("explicit", "refuses"), Accuracy(0.9, 0.9)))
    assert found.corrected_steered == CorrectedRates(explicit=None, refuses=None)
