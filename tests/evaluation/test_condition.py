"""Which answers begin from drafts, and which ones the speed is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.answer_source import AnswersAlone

from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.evaluation import comparison, condition
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, resume_condition
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.records.conversation import Answer, Judgement, Prompt
from rs_gguf.records.rows import RowLog

ASKING = Asking(None, 8)
PROMPTS = [Prompt(f"prompt {k}", "benign") for k in range(5)]
REFUSAL = "I'm sorry, but I can't."


def answered(texts: Sequence[str]) -> list[Answer]:
    return [Answer([len(text)], text, True, False) for text in texts]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """Return a list that gets the prompts and drafts of each call that answers: two, or one while timed."""
    calls: list[tuple[list[str], list[str]]] = []

    def answer(
        model: Any, judge: Any, condition: Any, prompts: Sequence[Prompt], asking: Any, advance: Any,
        drafts: Sequence[Answer] = (),
    ) -> JudgedAnswers:  # fmt: skip
        calls.append(([p.prompt for p in prompts], [draft.text for draft in drafts]))
        judgements = [Judgement(-1.0, "invented")] * len(prompts)
        return JudgedAnswers(answered([p.prompt for p in prompts]), judgements, 10.0 * len(calls))

    monkeypatch.setattr(condition, "answer_condition", answer)
    monkeypatch.setattr(condition, "PART", 2)
    monkeypatch.setattr(condition, "TIMED", 1)
    return calls


@pytest.mark.parametrize("timed", [False, True])
def test_missing_answers_begin_from_their_own_drafts(
    tmp_path: Path, parts: list[tuple[list[str], list[str]]], timed: bool
) -> None:
    one, drafts = Condition("one", NO_STEERING), answered([f"draft {k}" for k in range(5)])
    log = RowLog(tmp_path / "log.jsonl", "key")
    known = answered(["known"])[0].to_row()
    log.append(
        {"id": f"one:{PROMPTS[1].id}", **known, "confidence": -1, "category": None, "tokens_per_second": 7.0}
    )
    found = resume_condition(
        None, None, one, PROMPTS, ASKING, log, lambda n: None, drafts=drafts, timed=timed  # type: ignore[arg-type]
    )  # fmt: skip
    if timed:
        assert parts == [
            (["prompt 0"], []),
            (["prompt 2", "prompt 3"], ["draft 2", "draft 3"]),
            (["prompt 4"], ["draft 4"]),
        ]
    else:
        assert parts == [
            (["prompt 0", "prompt 2"], ["draft 0", "draft 2"]),
            (["prompt 3", "prompt 4"], ["draft 3", "draft 4"]),
        ]
    assert [answer.text for answer in found.answers] == [
        "prompt 0", "known", "prompt 2", "prompt 3", "prompt 4"
    ]  # fmt: skip
    assert found.tokens_per_second == 10.0, "the first part is timed"


class Source(AnswersAlone):
    """A source that refuses every prompt under a steering. It records prompts, factors and drafts."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], float, list[str]]] = []

    def answers(
        self,
        prompts: Sequence[Prompt],
        factor: float,
        asking: Asking,
        _: object,
        drafts: Sequence[Answer] = (),
    ) -> tuple[list[Answer], int, float]:
        texts = [p.prompt for p in prompts]
        if asking.max_tokens > 1:  # else the first answer, which reads the weights
            self.calls.append((texts, factor, [draft.text for draft in drafts]))
        texts = [f"{REFUSAL} {text}" if factor else text for text in texts]
        return answered(texts), 10 * len(self.calls), 1.0


@pytest.mark.parametrize("draws", [1, 3])
def test_a_comparison_begins_from_unsteered_answers(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    monkeypatch.setattr(comparison, "TIMED", 2)
    source, texts = Source(), [p.prompt for p in PROMPTS]
    (result,) = comparison.compare(source, KeywordJudge(), {"set": PROMPTS}, ASKING, draws=draws)
    refusals = [f"{REFUSAL} {text}" for text in texts[::-1]]
    expected = [
        (texts[:2], 0.0, []),
        (texts[2:], 0.0, []),
        (texts[:2], 1.0, []),
        (texts[2:], 1.0, texts[2:]),
        (texts[::-1], 0.0, texts[::-1]),  # all changed, so all are answered again on both sides
        (texts[::-1], 1.0, refusals),
    ]
    if draws == 1:
        assert source.calls == expected
        assert result["tokens_per_second"] == {"unsteered": 10, "steered": 30, "change": pytest.approx(2.0)}
    else:  # of other seeds: such drafts would agree in few tokens
        assert source.calls == [(*call[:2], []) for call in expected for _ in range(draws)]
    assert result["sets"]["set"]["outcomes_steered"]["explicit"] == len(texts)
