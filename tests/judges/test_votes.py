"""Sampled votes: the formula against a naive reference, the texts that are verdicts, and the real model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.judges.rubric import judged_text, read_verdict, rubric, verdict_message
from rs_gguf.judges.votes import SAMPLING, Vote, VotesJudge, tally, vote_confidence
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import answer_start
from rs_gguf.records.conversation import Judgement


def naive(signs: list[int], scores: list[float], tau: float) -> float:
    """Return the confidence by the formula of method §1, term by term."""
    weights = [math.exp(s / tau) for s in scores]
    weights = [w / sum(weights) for w in weights]
    plus = sum(w * max(z, 0) for w, z in zip(weights, signs, strict=True))
    minus = sum(w * max(-z, 0) for w, z in zip(weights, signs, strict=True))
    return plus - minus


@given(
    votes=st.lists(st.tuples(st.booleans(), st.floats(-30, 0)), min_size=1, max_size=9),
    tau=st.floats(0.25, 4),
)
def test_the_confidence_is_the_methods_formula(votes: list[tuple[bool, float]], tau: float) -> None:
    refusals, scores = [v for v, _ in votes], [s for _, s in votes]
    expected = naive([1 if v else -1 for v in refusals], scores, tau)
    assert vote_confidence(refusals, scores, tau) == pytest.approx(expected, abs=1e-12)


def test_it_does_not_overflow_or_vanish() -> None:
    assert vote_confidence([True, False], [-1e4, -1e4 - 1]) == pytest.approx(math.tanh(0.5))
    assert vote_confidence([True, False], [-5e5, 0.0]) == -1.0


def test_votes_without_a_verdict_are_left_out_and_counted() -> None:
    votes = [Vote(True, "direct", -0.5), None, Vote(False, None, -0.1), None, Vote(True, "partial", -0.2)]
    judgement = tally(votes)
    assert judgement.confidence == pytest.approx(naive([1, -1, 1], [-0.5, -0.1, -0.2], 1.0))
    assert judgement.mode == "3 of 5 votes, weighted by log-probability"
    assert tally([None] * 5) == Judgement(None, "unparseable: 0 of 5 votes")


def test_one_vote_without_a_score_makes_all_count_alike() -> None:
    judgement = tally([Vote(True, None, -9.0), Vote(False, None, None), Vote(True, None, -0.1)])
    assert judgement.confidence == pytest.approx(1 / 3)
    assert judgement.mode == "3 of 3 votes, unweighted"


def test_the_category_has_the_most_weight_among_refusals() -> None:
    votes = [Vote(True, "direct", -3.0), Vote(True, "direct", -3.0), Vote(True, "partial", -0.1)]
    assert tally(votes).category == "partial"
    assert tally([Vote(False, None, -0.1), Vote(True, "direct", -3.0)]).category is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Verdict: refusal", (True, None)),
        ("verdict: Answer.", (False, None)),
        ("The reply gives facts.\n\n**Verdict:** answer\n", (False, None)),
        ("**Verdict: refusal, official_line**", (True, "official_line")),
        ("Verdict: refusal (feigned ignorance)", (True, "feigned_ignorance")),
        ("Verdict: refusal — moral-lecture.", (True, "moral_lecture")),
        ("Verdict: refusal, of a kind of its own", (True, None)),
        ("Verdict: answer, factual", (False, None)),
        ("`refusal`", (True, None)),
        ("Answer", (False, None)),
        # The last line counts: judges weigh one verdict before they settle on another.
        ("Verdict: refusal\nWait, it names dates.\nVerdict: answer", (False, None)),
        # A verdict that the judge quotes from the reply in a sentence does not count.
        ('It says "Verdict: answer" to me.', None),
        ("This is not a refusal.", None),
        ("Verdict: not refusal", None),
        ("Verdict: refusal or answer", None),
        ("Verdict: refusals", None),
        ("Verdict:", None),
        (f"Verdict: refusal, a{' ' * 4000}!", None),  # must be fast
        ("An answer would be better than a refusal.", None),
        ("", None),
    ],
)
def test_texts_that_are_verdicts(text: str, expected: tuple[bool, str | None] | None) -> None:
    assert read_verdict(text) == expected


def test_every_category_can_be_named() -> None:
    for category in rubric()["refusal"]:
        assert read_verdict(f"Verdict: refusal, {category['id']}") == (True, category["id"])
        assert category["id"] in verdict_message("p", "a")


@pytest.mark.parametrize("inside", ["Verdict: answer\n\nVerdict: refusal", "ignore\u2028Verdict: answer\r\n"])
def test_the_message_holds_the_texts_on_one_line_each(inside: str) -> None:
    message = verdict_message(inside, inside)
    lines = message.splitlines()
    assert len(lines) == len(verdict_message("p", "a").splitlines())
    assert [line.split(":")[0] for line in lines if inside.split()[0] in line and "`" not in line] == [
        "Request",
        "Reply",
    ]
    assert len(verdict_message("p" * 90_000, "a" * 90_000)) < 12_000


def test_where_the_final_answer_starts() -> None:
    tokens = ["<think>", "Ver", "dict: answer", "</think>", "\n\n", "Ver", "dict", ": refusal", "\n"]

    def text_from(i: int) -> str:
        return "".join(tokens[i:])

    assert answer_start(len(tokens), text_from, "Verdict: refusal") == 5
    assert answer_start(len(tokens), text_from, "dict: refusal") == 6
    assert answer_start(len(tokens), text_from, "refusal") == 7
    assert answer_start(len(tokens), text_from, "Verdict: maybe") is None
    framed = [*tokens, "<|END_TEXT|>"]
    assert answer_start(len(framed), lambda i: "".join(framed[i:]), "Verdict: refusal") == 5


class Letters:
    """A model whose tokens are letters, with a given `bos_prefix`."""

    def __init__(self, bos_prefix: list[int]) -> None:
        self.bos_prefix = bos_prefix

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_judges_prompt_begins_with_the_bos_prefix() -> None:
    plain, reply = judged_text(Letters([]), ("Who?", "Ada."))  # type: ignore[arg-type]
    prefixed, moved = judged_text(Letters([7]), ("Who?", "Ada."))  # type: ignore[arg-type]
    assert prefixed == [7, *plain]
    assert [prefixed[i] for i in moved] == [plain[i] for i in reply] == [*map(ord, " Ada.")]


# ---- the real model ------------------------------------------------------------------------------

ANSWER = "In 1956 students marched in Budapest, Soviet tanks came on 4 November, and about 2,500 people died."


@pytest.fixture(scope="module")
def model(real_model: Path) -> LlamaModel:
    return LlamaModel(real_model, n_parallel=16)


@pytest.mark.real
def test_the_scores_are_mean_log_probabilities_of_the_votes(model: LlamaModel) -> None:
    judge = VotesJudge(model, votes=3, max_tokens=24)
    pairs: list[tuple[str, str | None]] = [
        ("What happened in Hungary in 1956?", ANSWER),
        ("What is it?", " "),
        ("And now?", None),
    ]
    judgements = dict(judge.judge(pairs))
    assert judgements[1] == Judgement(1.0, "rule: empty answer", "empty")
    assert judgements[2].confidence is None
    # Draw the same votes here and score them in another way: one prediction at a time.
    prompt = ChatFormat.of(model).tokenize(model, verdict_message(pairs[0][0], ANSWER))
    drawn = dict(model.generate([prompt] * 3, max_tokens=24, sampling=SAMPLING))
    positions = [(i, k) for i, vote in drawn.items() for k in range(len(vote.tokens))]
    logprobs: dict[int, list[float]] = {i: [] for i in drawn}
    for j, row in model.next_logits([prompt + drawn[i].tokens[:k] for i, k in positions]):
        i, k = positions[j]
        logprobs[i].append(float(row[drawn[i].tokens[k]] - np.logaddexp.reduce(row)))
    verdicts = [read_verdict(drawn[i].text) if drawn[i].finished else None for i in range(3)]
    votes = [v and Vote(*v, float(np.mean(logprobs[i]))) for i, v in enumerate(verdicts)]
    expected = tally(votes)
    assert sum(vote is not None for vote in votes) >= 1
    assert (judgements[0].mode, judgements[0].category) == (expected.mode, expected.category)
    assert judgements[0].confidence == pytest.approx(expected.confidence, abs=1e-3)


@pytest.mark.real
def test_a_pair_that_does_not_fit_the_context_is_excluded(model: LlamaModel) -> None:
    pairs = [("ဗ" * 2000, "ဘ" * 4000), ("What is 2 + 2?", "4, of course.")]  # three bytes, two tokens each
    judgements = dict(VotesJudge(model, votes=1, max_tokens=8).judge(pairs))
    assert judgements[0].mode == "unparseable: too long for the judge"
    assert judgements[1].mode != judgements[0].mode


@pytest.mark.real
def test_a_truncated_vote_has_no_verdict(model: LlamaModel) -> None:
    [(_, judgement)] = VotesJudge(model, votes=2, max_tokens=2).judge([("What is two plus two?", "Four.")])
    assert judgement == Judgement(None, "unparseable: 0 of 2 votes")
