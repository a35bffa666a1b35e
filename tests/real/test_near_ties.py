"""Two unsteered runs of the real model differ, but a second run confirms none of the changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, answer_condition
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.prompts import grid
from rs_gguf.records.conversation import Prompt

pytestmark = pytest.mark.real


def test_the_unsteered_model_against_itself_changes_nothing(real_model: Path) -> None:
    validation = [p for p in grid.grid() if p.split == "validation" and p.language == "en"]
    prompts = [p for members in grid.of_each_kind(validation, 20, seed=0).values() for p in members]
    asking = Asking(None, 24, Sampling(temperature=0.8))  # greedily, most near ties fall as before
    with LlamaModel(real_model) as model:

        def answered(some: Sequence[Prompt], how: Asking) -> JudgedAnswers:
            return answer_condition(
                model, KeywordJudge(), Condition("unsteered", NO_STEERING, None), some, how
            )

        raw = PairedEvaluation(prompts, answered(prompts, asking), answered(prompts, asking.for_draw(1)))
        assert raw.opened + raw.closed > 0

        def again(indices: Sequence[int]) -> tuple[JudgedAnswers, JudgedAnswers]:
            some = [prompts[i] for i in indices]
            return answered(some, asking.again(2)), answered(some, asking.again(2))

        found = raw.confirmed(again)
    assert (found.opened, found.closed, found.broken) == (0, 0, 0)
    assert found.kept == found.refused == raw.refused
    assert found.disputed == frozenset()
