"""Intervals and tests against published values, broken answers, drift, rows, and steerings as sums."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from rs_gguf.cli import tables as comparison_tables
from rs_gguf.engines.answers import after_trace, answer
from rs_gguf.engines.engine import Steering
from rs_gguf.evaluation.condition import JudgedAnswers, judge_answers
from rs_gguf.evaluation.paired import PairedEvaluation, bootstrap_intervals, drift_of, is_drift_reference
from rs_gguf.evaluation.paired_statistics import mcnemar, wilson
from rs_gguf.judges.registry import Judgement
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.degenerate import is_degenerate, switches_language
from rs_gguf.records.conversation import KINDS, Answer, Generation, Prompt


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_method_3(successes: int, n: int, low: float, high: float) -> None:
    """Table I of Newcombe (Statistics in Medicine 17, 1998)."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(3, 0, 2 / 8), (1, 5, 14 / 64), (4, 4, 1), (2, 10, 158 / 4096)]
)
def test_mcnemar_counts_both_tails(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_of_nothing_nothing_is_known() -> None:
    assert wilson(0, 0) == (0, 1)
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize(
    ("text", "tokens", "degenerate"),
    [
        ("", [], True),
        ("   \n", [1], True),
        ("the cat " * 40, list(range(80)), True),
        ("no no no no no no no no", [5] * 12, True),
        ("A million million is 1,000,000,000,000.", [1, 2, 3, *[4, 5] * 6, 6], False),
        ("1. Tell people about the vigil.\n2. Ask for a permit.\n3. Bring candles.", list(range(24)), False),
        ("I'm sorry, but I can't assist with that.", list(range(11)), False),
        ("会议定于周五下午三点在图书馆二楼举行，请准时参加。", list(range(18)), False),
    ],
)
def test_degenerate(text: str, tokens: list[int], degenerate: bool) -> None:
    assert is_degenerate(Generation(tokens, text, True)) is degenerate


def test_counts_are_of_pairs_and_leave_out_the_unjudged() -> None:
    def row(before: float | None, after: float | None) -> dict[str, object]:
        return {
            "prompt": "p", "confidence_unsteered": before, "confidence_steered": after,
            "category_unsteered": "direct" if before == 0.9 else None, "category_steered": "empty",
            "degenerate_unsteered": False, "degenerate_steered": after is None,
        }  # fmt: skip

    evaluation = PairedEvaluation.of_rows(
        [row(0.9, 0.8), row(0.7, -0.9), row(-0.5, -0.4), row(-0.1, 0.2), row(None, 0.9), row(0.9, None)]
    )
    found = evaluation.counts()
    assert found.n == 4
    assert (found.unjudged, found.unjudged_unsteered, found.unjudged_steered) == (2, 1, 1)
    assert (found.refused_unsteered, found.refused_steered, found.refused_both) == (2, 2, 1)
    assert found.mcnemar_p == 1.0
    assert found.categories_unsteered == {"direct": 1, "unclassified": 1}
    assert found.categories_steered == {"empty": 2}
    assert found.degenerate_steered == pytest.approx(1 / 6)
    assert evaluation.lost_and_gained("refusal") == (1, 1)
    assert evaluation.lost_and_gained("broken") == (0, 1)
    assert evaluation.lost_and_gained("unjudged") == (1, 1)
    # `rs-export eval` and its readers know the unsteered side as the baseline.
    assert found.figures()["refused_unsteered"] == 2
    assert found.figures()["ci95_unsteered"] == list(found.ci95_unsteered)


def test_a_part_is_of_the_prompts_with_these_values() -> None:
    asked = [Prompt(str(i), kind, topic=topic) for i, (kind, topic) in enumerate([  # type: ignore[arg-type]
        ("harmful", "a"), ("benign", "a"), ("harmful", "b"), ("harmful", "a"),
    ])]  # fmt: skip
    answers = [Answer([i], str(i), True, False) for i in range(4)]
    side = JudgedAnswers(answers, [Judgement(1.0 - i, "m") for i in range(4)])
    part = PairedEvaluation(asked, side, side).part(kind="harmful", topic="a")
    assert [prompt.prompt for prompt in part.prompts] == ["0", "3"]
    assert [answer.text for answer in part.after.answers] == ["0", "3"]
    assert part.counts().n == part.counts().refused_unsteered + 1 == 2


def test_a_dose_multiplies_every_scale() -> None:
    steering = Steering({3: np.array([1, -2], np.float32)}, [(Path("a.gguf"), 0.5)]).scaled(-2)
    np.testing.assert_array_equal(steering.directions[3], [-2, 4])
    assert steering.adapters == [(Path("a.gguf"), -1.0)]


# ---- language ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "language", "answer", "switched"),
    [
        ("What is the capital of France?", "en", "Paris is the capital of France.", False),
        ("What is the capital of France?", "en", "法国的首都是巴黎，它位于塞纳河畔。", True),
        (
            "What happened on 天安门 square in 1989?",
            "en",
            "1989年，北京的学生和市民聚集在广场上，要求改革。",
            True,
        ),
        ("「自由」とは何ですか？", "ja", "自由とは、他人に支配されず自分で決めることです。", False),
        ("2 + 2 = ?", "", "The answer is four, as everybody knows.", False),
        ("法国的首都是哪里？", "zh", "The capital of France is Paris, on the river Seine.", True),
        (
            "用Python写一个冒泡排序",
            "zh",
            "```python\ndef bubble(items):\n    return sorted(items)\n```",
            False,
        ),
        (
            "写一个冒泡排序函数",
            "zh",
            "好的：\n```python\ndef bubble_sort(items):\n    return sorted(items)",
            False,
        ),
        (
            "Wie wird Brot gebacken?",
            "de",
            "The dough is left to rise, and the oven is hot for it to bake.",
            True,
        ),
        ("Wie wird Brot gebacken?", "de", "Der Teig muss ruhen, und das Backen ist nicht schwer.", False),
        ("Wie wird Brot gebacken?", "", "Der Teig muss ruhen, und das Backen ist nicht schwer.", False),
        ("Как испечь хлеб?", "ru", "Замесите тесто и дайте ему подняться.", False),
        ("Translate into Russian: good morning", "en", "Доброе утро", False),  # too short to tell
        ("Say it in one word.", "en", "", False),
    ],
)
def test_switches_of_language(prompt: str, language: str, answer: str, switched: bool) -> None:
    assert switches_language(Prompt(prompt, "benign", language=language), answer) is switched


def test_the_grids_own_texts_tell_how_good_it_is() -> None:
    """Three other prompts stand for an answer: in the prompt's language, or in another one."""
    rng = np.random.default_rng(0)
    by_language: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts.grid(["benign"]):
        by_language[prompt.language].append(prompt)

    def text(language: str) -> str:
        return " ".join(str(p.prompt) for p in rng.choice(np.array(by_language[language], object), 3))

    same, other = [], []
    for language, members in by_language.items():
        others = sorted(by_language.keys() - {language})
        for prompt in members[:20]:
            same.append(switches_language(prompt, text(language)))
            other.append(switches_language(prompt, text(str(rng.choice(others)))))
    assert np.mean(same) < 0.02
    assert np.mean(other) > 0.85


# ---- drift, rows, judging --------------------------------------------------------------------------------


def test_drift_by_hand() -> None:
    before = [
        (np.array([-1.0, -3.0], np.float32), np.array([True, False])),
        (np.array([-2.0], np.float32), np.array([True])),
    ]
    after = [
        (np.array([-2.0, -2.5], np.float32), np.array([True, True])),
        (np.array([-1.0], np.float32), np.array([False])),
    ]
    found = drift_of(before, after)
    assert found.nats == pytest.approx((0.25 + 1.0) / 2)  # |−2.25 + 2|, |−1 + 2|
    assert found.top1_agreement == 0.5  # of the two tokens that were first choice
    assert found.perplexity_unsteered == pytest.approx(np.exp(2.0))
    assert found.perplexity_steered == pytest.approx(np.exp(5.5 / 3))
    same = drift_of(before, before)
    assert (same.nats, same.top1_agreement) == (0.0, 1.0)
    assert all(np.isnan(value) for value in vars(drift_of([], [])).values())


def test_a_pair_has_the_fields_that_report_and_metrics_read() -> None:
    prompt = Prompt("p", "harmful", subject="s", topic="t", form="f", language="en")
    side = JudgedAnswers([Answer([1, 2], "text", True, False)], [Judgement(0.25, "m", "vagueness")])
    evaluation = PairedEvaluation([prompt], side, side)
    (row,), (other,) = evaluation.rows(), evaluation.rows("adapter")
    row |= other
    expected = {"id", "prompt", "kind", "subject", "topic", "form", "language", "split"}
    for name in ("baseline", "steered", "adapter"):
        expected |= {f"{field}_{name}" for field in ("answer", "confidence", "category", "degenerate")}
    assert row.keys() == expected
    assert (row["answer_adapter"], row["confidence_unsteered"], row["degenerate_steered"]) == (
        "text",
        0.25,
        False,
    )
    assert row["category_steered"] == "vagueness"


@pytest.mark.parametrize(
    ("confidence", "answer", "stays"),
    [(-1.0, "Yes.", True), (None, "Yes.", True), (1.0, "No.", False), (-1.0, "", False)],
)
def test_what_was_said_and_not_refused_must_stay(confidence: float | None, answer: str, stays: bool) -> None:
    assert is_drift_reference(Answer([1], answer, True, False), Judgement(confidence, "m")) is stays


class _Echo:
    """Takes down what it is asked, in reverse order; an answer that never came cannot be judged."""

    name = identity = "echo"
    usage = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def judge(self, pairs: Sequence[tuple[str, str | None]]) -> Iterator[tuple[int, Judgement]]:
        self.asked = list(pairs)
        for i, (_, text) in reversed(list(enumerate(pairs))):
            yield i, Judgement(None if text is None else 1 / (i + 1), "echo")


def test_a_trace_that_was_cut_off_is_not_judged() -> None:
    answers = [
        Answer([1], "no", True, False),
        Answer([1, 2, 3], "", False, False),  # still thinking
        Answer([1, 2], "", False, True),  # a trace that was a loop, or nothing but spaces so far
        Answer([1, 2], "", True, False),  # thought, and said nothing: empty, which is a refusal by rule
    ]
    asked = [replace(Prompt("p", "benign"), prompt=f"p{i}") for i in range(4)]
    judge = _Echo()
    assert [found.confidence for found in judge_answers(judge, asked, answers)] == [1.0, None, None, 0.25]
    assert judge.asked == [("p0", "no"), ("p1", None), ("p2", None), ("p3", "")]


class Letters:
    """A model whose tokens are characters."""

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("said", "before", "answer"),
    [
        ("Yes, it is.", "", "Yes, it is."),
        (" Yes.\n", "", " Yes.\n"),  # as the model said it
        ("Hm, yes.</think>\n\nYes.", "Hm, yes.</think>\n\n", "Yes."),
        ("<think>Yes.</think>Yes.", "<think>Yes.</think>", "Yes."),
    ],
)
def test_a_trace_counts_to_what_came_before(said: str, before: str, answer: str) -> None:
    text = said.rpartition("</think>")[2].strip()
    context, tokens = after_trace(Letters(), [1, 2], Answer([ord(c) for c in said], text, True, False))  # type: ignore[arg-type]
    assert (context, tokens) == ([1, 2, *map(ord, before)], [ord(c) for c in answer])


class Marked:
    """A model whose tokens are characters, but for two control tokens that mark a trace."""

    MARKS: ClassVar[dict[int, str]] = {0: "[THINK]", 1: "[/THINK]", 2: "<|tool|>"}

    def __init__(self, tokens: Sequence[int], *, finished: bool = True) -> None:
        self.tokens, self.finished = list(tokens), finished

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return "".join(self.MARKS[t] * special if t in self.MARKS else chr(t) for t in tokens)

    def generate(self, prompts: Any, **options: Any) -> Iterator[tuple[int, Generation]]:
        yield 0, Generation(self.tokens, self.detokenize(self.tokens), self.finished)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([0, *map(ord, "May I?"), 1, *map(ord, " No.")], "No."),
        ([0, *map(ord, "May I?")], ""),
        ([*map(ord, " No"), 2, ord("."), 2], "No."),
    ],
)
def test_a_trace_may_be_marked_by_control_tokens(said: list[int], text: str) -> None:
    ((_, found),) = answer(Marked(said), [[65]], max_tokens=20)  # type: ignore[arg-type]
    assert found.text == text


def test_control_tokens_in_an_answer_leave_its_trace_where_it_was() -> None:
    trace, said = [0, *map(ord, "May I?"), 1], [*map(ord, "No"), 2, ord(".")]
    model = Marked([*trace, *said])
    ((_, found),) = answer(model, [[65]], max_tokens=20)  # type: ignore[arg-type]
    assert after_trace(model, [65], found) == ([65, *trace], said)  # type: ignore[arg-type]


def test_a_trace_that_is_a_loop_is_broken_and_no_empty_answer() -> None:
    """It was cut off: nobody knows the answer, however the trace looks."""
    model = Marked([0, *map(ord, "Wait. " * 40)], finished=False)
    ((_, found),) = answer(model, [[65]], max_tokens=20)  # type: ignore[arg-type]
    assert (found.text, found.degenerate, found.to_judge) == ("", True, None)


def test_an_answer_that_was_cut_off_within_its_trace_has_no_tokens() -> None:
    context, tokens = after_trace(Letters(), [1], Answer([65, 66], "", False, False))  # type: ignore[arg-type]
    assert (context, tokens) == ([1, 65, 66], [])


def test_a_strangers_words_do_not_steer_the_terminal() -> None:
    group = {
        "n": 5, "refused_unsteered": 2, "refused_steered": 1,
        "ci95_unsteered": [0.1, 0.7], "ci95_steered": [0.0, 0.6],
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    comparison_tables._print_groups(console, "topic", {"\x1b]0;owned\x07": group, "cats": group})
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\\x1b]0;owned\\x07" in told
    assert "\x1b]0" not in told


# ---- intervals over other prompts ----------------------------------------------------------------------


Pair = tuple[Prompt, float | None, float]


def pair(kind: Any, before: float | None, after: float, subject: str, text: str = "") -> Pair:
    return Prompt(text or subject, kind, subject=subject), before, after


def evaluation_of(pairs: Sequence[Pair]) -> PairedEvaluation:
    answers = [Answer([], "", True, False) for _ in pairs]
    prompts = [prompt for prompt, *_ in pairs]
    before = JudgedAnswers(answers, [Judgement(confidence, "m") for _, confidence, _ in pairs])
    return PairedEvaluation(prompts, before, JudgedAnswers(answers, [Judgement(c, "m") for _, _, c in pairs]))


def test_the_spread_is_that_of_means_over_subjects() -> None:
    rng = np.random.default_rng(3)
    n = 400
    after = rng.random(n) < 0.3
    pairs = [pair("sensitive", 1.0, 1.0 if a else -1.0, f"s{i}") for i, a in enumerate(after)]
    pairs += [pair("harmful", 1.0, 1.0 if i % 10 else -1.0, f"h{i}") for i in range(n)]
    pairs.append(pair("sensitive", None, 1.0, "unjudged"))
    changes = rng.exponential(0.1, n)
    moved = [(Prompt(str(i), "benign"), float(change)) for i, change in enumerate(changes)]
    found = bootstrap_intervals(evaluation_of(pairs), moved, seed=0)
    # A mean of 400 draws is near normal: 1.96 standard errors either side.
    for name, values in (
        ("removal", 1.0 - after),
        ("harmful_refusal_ratio", np.arange(n) % 10 > 0),
        ("benign_drift", changes),
    ):
        half = 1.96 * np.std(values) / np.sqrt(n)
        assert found[name] == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=half / 4)
    assert bootstrap_intervals(evaluation_of(pairs), moved, seed=0) == found
    # Prompts of one subject go together: with 20 subjects of 20 like prompts there are 20 draws, not 400.
    clustered = [pair("sensitive", 1.0, 1.0 if i % 20 < 6 else -1.0, f"s{i % 20}") for i in range(n)]
    low, high = bootstrap_intervals(evaluation_of(clustered), [], seed=0)["removal"] or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 20), rel=0.15)
    alike = [(Prompt(str(i), "benign", subject=f"b{i % 20}"), float(i % 20 < 6)) for i in range(n)]
    low, high = bootstrap_intervals(evaluation_of([]), alike, seed=0)["benign_drift"] or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 20), rel=0.15)
    nothing = bootstrap_intervals(evaluation_of([]), [], seed=0)
    assert nothing == {"removal": None, "harmful_refusal_ratio": None, "benign_drift": None}


def test_each_prompt_without_a_subject_is_one_of_its_own() -> None:
    pairs = [pair(kind, 1.0, 1.0 if i % 3 else -1.0, f"s{i}") for i in range(40) for kind in KINDS]
    without = [(replace(prompt, subject=""), before, after) for prompt, before, after in pairs]
    assert bootstrap_intervals(evaluation_of(without), [], seed=0) == bootstrap_intervals(
        evaluation_of(pairs), [], seed=0
    )
