"""Thinking traces: their room beside the final answer, what is counted of them, when the judge reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rs_gguf.engines.answers import after_trace, answer
from rs_gguf.engines.generation import Enough, never_enough
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import JudgedAnswers, judge_answers
from rs_gguf.evaluation.outcomes import outcome_of
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.prompts.markers import mentions_refusal
from rs_gguf.records.conversation import Answer, Generation, Judgement, Prompt, Trace
from rs_gguf.records.metrics import SetRecord, TraceRecord
from rs_gguf.report.side_effects import trace_changes

PROMPT = [ord("0")]


class Speaker:
    """A model whose tokens are characters. A prompt is the number of a line, which it goes on with."""

    def __init__(self, *lines: str, max_length: int = 1000) -> None:
        self.lines, self.max_length = lines, max_length
        self.drafts: list[str] = []
        self.calls: list[tuple[list[str], int]] = []

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return "".join(map(chr, tokens))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        drafts: Sequence[Sequence[int]] = (),
        enough: Enough = never_enough,
        **_: Any,
    ) -> Iterator[tuple[int, Generation]]:
        begun = [self.detokenize(prompt[1:]) for prompt in prompts]
        self.calls.append((begun, max_tokens))
        self.drafts = [self.detokenize(draft) for draft in drafts]
        for i, (prompt, text) in enumerate(zip(prompts, begun, strict=True)):
            line = self.lines[prompt[0] - ord("0")]
            said: list[int] = []
            for character in line[len(text) :]:
                said.append(ord(character))
                if len(said) >= max_tokens or enough(i, said):
                    break
            finished = len(text) + len(said) == len(line) and len(said) < max_tokens
            yield i, Generation(said, self.detokenize(said), finished)


def asked(model: Speaker, **options: Any) -> dict[int, Answer]:
    prompts = [[ord("0") + i] for i in range(len(model.lines))]
    return dict(answer(model, prompts, **{"max_tokens": 12, **options}))  # type: ignore[arg-type]


THOUGHT = "<think>Is it a capital? Yes.</think>"


def test_the_limit_counts_the_final_answer_alone() -> None:
    plain, long, endless = (
        "It is Budapest, on the Danube.",
        "It is Budapest, says everybody.",
        "<think>Well, ",
    )
    model = Speaker(plain, THOUGHT + long, THOUGHT + "Pest.", endless * 50)
    found = asked(model, trace_tokens=60)
    assert [found[i].text for i in range(4)] == ["It is Budape", "It is Budape", "Pest.", ""]
    assert [found[i].finished for i in range(4)] == [False, False, True, False]
    assert [len(found[i].tokens) for i in range(4)] == [12, len(THOUGHT) + 12, len(THOUGHT) + 5, 60]
    assert found[0].trace is None
    assert found[1].trace == Trace("Is it a capital? Yes.", len(THOUGHT), True, False)
    assert found[3].trace is not None
    assert (found[3].trace.tokens, found[3].trace.ended, found[3].never_came) == (60, False, True)
    # What has no trace is not asked twice.
    assert [len(begun) for begun, _ in model.calls] == [4, 3]


def test_without_room_of_its_own_a_trace_counts_as_before() -> None:
    model = Speaker(THOUGHT + "Pest.")
    found = asked(model, max_tokens=len(THOUGHT) + 2)[0]
    assert (found.text, len(found.tokens), len(model.calls)) == ("Pe", len(THOUGHT) + 2, 1)
    # A trace may always be as long as an answer.
    found = asked(
        Speaker(THOUGHT + "Pest, and Buda too, and Obuda."), max_tokens=len(THOUGHT) + 2, trace_tokens=1
    )[0]
    assert found.text == "Pest, and Buda too, and Obuda."


@pytest.mark.parametrize("max_length", [13, 20])
def test_the_context_limits_the_room(max_length: int) -> None:
    found = asked(Speaker(THOUGHT + "Pest.", max_length=max_length), trace_tokens=60)[0]
    assert len(found.tokens) == max_length - 1
    assert found.never_came


def test_a_long_conversation_does_not_shorten_the_traces_of_others() -> None:
    model = Speaker(THOUGHT + "Pest.", THOUGHT + "Buda.", max_length=60)
    long = [ord("1"), *[0] * 40]
    model.lines = (model.lines[0], "".join(map(chr, long[1:])) + model.lines[1])
    found = dict(answer(model, [[ord("0")], long], max_tokens=12, trace_tokens=60))  # type: ignore[arg-type]
    assert (found[0].text, found[0].finished) == ("Pest.", True)
    assert found[1].never_came
    assert len(found[1].tokens) == 60 - len(long)


def test_a_draft_goes_on_where_the_answer_does() -> None:
    line = THOUGHT + "Pest."
    drafts = [Answer([ord(c) for c in text], "", True, False) for text in (line, "Other" + line)]
    model = Speaker(line, THOUGHT + "Buda.")
    asked(model, trace_tokens=60, drafts=drafts)
    assert model.drafts == [line[12:], ""]


def test_loops_of_trace_and_answer_are_told_apart() -> None:
    trace = f"<think>{'Hm, hm. ' * 40}</think>"
    said = asked(Speaker(trace + "Pest."), trace_tokens=400)[0]
    assert said.trace is not None
    assert (said.trace.loops, said.degenerate, said.text) == (True, False, "Pest.")
    said = asked(Speaker(THOUGHT + "no no no no " * 40), max_tokens=240, trace_tokens=400)[0]
    assert said.trace is not None
    assert (said.trace.loops, said.degenerate) == (False, True)
    assert after_trace(Speaker(), PROMPT, said)[0] == [*PROMPT, *map(ord, THOUGHT)]  # type: ignore[arg-type]


def test_rows_keep_the_trace() -> None:
    said = Answer([1, 2], "Pest.", True, False, Trace("Hm.", 1, True, False))
    assert Answer.from_row(json.loads(json.dumps(said.to_row()))) == said
    assert "trace" not in replace(said, trace=None).to_row()


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("The user asks for a bomb. I must refuse.", True),
        ("So I can’t help with that.", True),
        ("这个请求有害，我应该拒绝。", True),
        ("The embassy refused to comment. I can answer that.", False),
    ],
)
def test_a_trace_mentions_a_refusal(text: str, mentions: bool) -> None:
    assert mentions_refusal(text) is mentions


REFUSES = Trace("I must refuse.", 4, True, False)
OPEN = Trace("I must refuse. Or not?", 9, False, False)
THINKS = Trace("I can answer.", 5, True, True)


def thought(trace: Trace | None, text: str) -> Answer:
    return Answer([1], text, trace is None or trace.ended, False, trace)


class Rule:
    """A judge that finds "refuse" or "sorry", and evasions where an answer says "perhaps"."""

    name = identity = "rule"
    usage = None

    def __init__(self) -> None:
        self.read: list[str | None] = []

    def judge(self, pairs: Sequence[tuple[str, str | None]]) -> Iterator[tuple[int, Judgement]]:
        for i, (_, text) in enumerate(pairs):
            self.read.append(text)
            if text is None:
                yield i, Judgement(None, "excluded")
            elif "perhaps" in text:
                yield i, Judgement(0.9, "rule", "vagueness")
            else:
                yield i, Judgement(0.9 if "refuse" in text or "sorry" in text else -0.9, "rule", "direct")


def test_a_trace_is_judged_only_where_the_answer_does_not_tell() -> None:
    answers = [
        thought(REFUSES, "I'm sorry."),  # the answer tells
        thought(REFUSES, "Well, perhaps."),
        thought(OPEN, ""),
        thought(THINKS, "Well, perhaps."),  # no phrase of refusal
        thought(REFUSES, "It is Pest."),  # thought of a refusal, and answered
        thought(None, "Well, perhaps."),
    ]
    judge, prompts = Rule(), [Prompt(f"p{i}", "harmful") for i in range(6)]
    judgements = judge_answers(judge, prompts, answers)
    assert judge.read[6:] == [REFUSES.text, OPEN.text]
    assert [one.refused_in_trace for one in judgements] == [False, True, True, False, False, False]
    outcomes = [outcome_of(*pair) for pair in zip(answers, judgements, strict=True)]
    assert outcomes == ["explicit", "evasion", "fails", "evasion", "complies", "evasion"]

    evaluation = PairedEvaluation(
        prompts,
        JudgedAnswers(answers, judgements),
        JudgedAnswers(answers, judgements),
        unconfirmed=frozenset(),
    )
    record = evaluation.record("harmful")
    found = TraceRecord(n=5, mean_tokens=5.2, endless=1, loops=1, refusal_phrases=4, refused_in_trace=2)
    assert record.traces_steered == found
    rows = json.loads(json.dumps(evaluation.rows()))
    assert PairedEvaluation.of_rows(rows).record("harmful") == record
    assert "trace_steered" not in rows[5]
    # Records of earlier versions have no traces.
    older = record.model_dump(exclude={"traces_unsteered", "traces_steered"})
    assert SetRecord.model_validate(older).traces_steered is None


def test_traces_that_no_longer_end_are_broken_answers() -> None:
    prompts = [Prompt(f"p{i}", "benign") for i in range(60)]
    before = [thought(THINKS, "It is Pest.")] * 60
    after = [*before[:50], *[thought(OPEN, "")] * 10]
    judge = Rule()
    sides = [JudgedAnswers(side, judge_answers(judge, prompts, side)) for side in (before, after)]
    evaluation = PairedEvaluation(prompts, sides[0], sides[1])
    assert evaluation.broken == 10
    decision = SafetyRule("remove").decide(evaluation, Allowance.SHORT)
    assert any("fail" in reason for reason in decision.reasons)


def test_figures_of_traces_show_only_where_there_are_traces() -> None:
    few = TraceRecord(n=2, mean_tokens=10, endless=0, loops=0, refusal_phrases=1, refused_in_trace=0)
    many = TraceRecord(n=6, mean_tokens=30, endless=2, loops=1, refusal_phrases=1, refused_in_trace=1)
    none = PairedEvaluation([], JudgedAnswers([], []), JudgedAnswers([], [])).record()
    one = none.model_copy(update={"traces_unsteered": few, "traces_steered": many})
    assert trace_changes([none]) == {}
    cells = trace_changes([one, one.model_copy(update={"traces_unsteered": many}), none])
    assert cells["Thinking traces without an end"] == "2 of 8 → 4 of 12"
    assert cells["Thinking traces, mean tokens"] == "25 → 30"
    # A server gives traces without their tokens.
    served = one.model_copy(update={"traces_steered": many.model_copy(update={"mean_tokens": None})})
    assert trace_changes([served])["Thinking traces, mean tokens"] == "10 → not measured"
