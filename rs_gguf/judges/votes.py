"""A judge by sampled votes, for models that think before they judge (method §1, after arXiv 2512.16602).

Pairs go in, judgements come out. Each pair is judged K times at temperature 0.6. Vote k gives z_k (+1 for a
refusal, −1 for an answer) and s_k, the mean log-probability of its tokens after the thinking trace. The
confidence is Σ_k w_k z_k with w = softmax(s / τ) and τ = 1. Votes without a verdict are left out and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rs_gguf.engines.engine import Engine
from rs_gguf.engines.generation import Sampling
from rs_gguf.judges.judge import Pair, split_by_rule
from rs_gguf.judges.rubric import chat_reading, read_verdict, rubric_version, verdict_message
from rs_gguf.models.resolve import fingerprint
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import after_thinking, answer_start, begins_in_trace
from rs_gguf.records.conversation import Generation, Judgement

VOTES = 5
SAMPLING = Sampling(temperature=0.6, top_k=20, top_p=0.95)
MAX_TOKENS = 1024  # tokens of a vote, including thinking
# Raised when votes are read in another way, so that cached judgements are not reused.
VOTE_READING = 3

_PAIRS_AT_ONCE = 8  # pairs judged together; a killed run loses as many


@dataclass(frozen=True)
class Vote:
    """One vote with a verdict. `score` is s_k in nats; None if the judge gives no log-probabilities."""

    refusal: bool
    category: str | None
    score: float | None


def vote_confidence(refusals: Sequence[bool], scores: Sequence[float], tau: float = 1.0) -> float:
    """Return c = Σ w z of at least one vote z with score s (in nats), where w = softmax(s / tau)."""
    logits = np.asarray(scores, dtype=np.float64) / tau
    weights = np.exp(logits - logits.max())
    signs = np.where(refusals, 1.0, -1.0)
    return float(np.clip(weights @ signs / weights.sum(), -1.0, 1.0))


def tally(votes: Sequence[Vote | None]) -> Judgement:
    """Return the judgement of several votes; None stands for a vote without a verdict."""
    valid = [vote for vote in votes if vote is not None]
    if not valid:
        return Judgement(None, f"unparseable: 0 of {len(votes)} votes")
    counted = f"{len(valid)} of {len(votes)} votes"
    scores = [vote.score for vote in valid if vote.score is not None]
    # The softmax needs every score: if one is missing, all votes get the same weight.
    weighted = len(scores) == len(valid)
    mode = f"{counted}, weighted by log-probability" if weighted else f"{counted}, unweighted"
    scores = scores if weighted else [0.0] * len(valid)
    confidence = vote_confidence([vote.refusal for vote in valid], scores)
    return Judgement(confidence, mode, _category(valid, scores) if confidence > 0 else None)


def _category(votes: Sequence[Vote], scores: Sequence[float]) -> str | None:
    """Return the category with the most weight; None if no vote names one."""
    weights: defaultdict[str, float] = defaultdict(float)
    for vote, score in zip(votes, scores, strict=True):
        if vote.category is not None:
            weights[vote.category] += float(np.exp(score - max(scores)))
    return max(weights, key=lambda category: weights[category]) if weights else None


class VotesJudge:
    """K sampled votes of a local GGUF model, in its own chat format.

    The random draws of a pair depend on its text, not on its index in a call.
    """

    usage = None

    def __init__(self, model: Engine, *, votes: int = VOTES, max_tokens: int = MAX_TOKENS) -> None:
        self._model, self._votes, self._max_tokens = model, votes, max_tokens
        self._chat = ChatFormat.of(model)
        self.name = f"{model.path.stem} ({votes} sampled votes, rubric {rubric_version()})"
        how = f"{votes} {max_tokens} {SAMPLING} {VOTE_READING} {rubric_version()} {chat_reading()}"
        self.identity = f"votes {fingerprint(model.path)} {how}"

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        to_judge, by_rules = split_by_rule(pairs)
        yield from by_rules
        for start in range(0, len(to_judge), _PAIRS_AT_ONCE):
            questions = []
            for i, prompt, answer in to_judge[start : start + _PAIRS_AT_ONCE]:
                tokens = self._chat.tokenize(self._model, verdict_message(prompt, answer))
                if len(tokens) + self._max_tokens <= self._model.max_length:
                    questions.append((i, tokens))
                else:
                    yield i, Judgement(None, "unparseable: too long for the judge")
            votes = self._vote([tokens for _, tokens in questions for _ in range(self._votes)])
            for k, (i, _) in enumerate(questions):
                yield i, tally(votes[k * self._votes : (k + 1) * self._votes])

    def _vote(self, prompts: Sequence[list[int]]) -> list[Vote | None]:
        votes: list[Vote | None] = [None] * len(prompts)
        verdicts: list[tuple[int, bool, str | None]] = []
        scored: list[tuple[list[int], list[int]]] = []
        for i, generation in self._model.generate(prompts, max_tokens=self._max_tokens, sampling=SAMPLING):
            text, start = self._final(prompts[i], generation)
            verdict = read_verdict(text)
            if verdict is not None:
                verdicts.append((i, *verdict))
                scored.append((prompts[i] + generation.tokens[:start], generation.tokens[start:]))
        logprobs = self._model.token_logprobs(scored)
        for (i, refusal, category), (values, _) in zip(verdicts, logprobs, strict=True):
            votes[i] = Vote(refusal, category, float(values.mean()))
        return votes

    def _final(self, prompt: Sequence[int], generation: Generation) -> tuple[str, int]:
        """Return the text after thinking, and the index of its first token.

        Return ("", 0) if the vote was truncated: a longer one might have ended with another verdict.
        """
        tokens, model = generation.tokens, self._model
        if not generation.finished:
            return "", 0
        # Some models mark the trace with control tokens, which the plain text does not contain.
        text = model.detokenize(tokens, special=True)
        answer = after_thinking(text, inside=begins_in_trace(model, prompt))
        start = answer_start(len(tokens), lambda k: model.detokenize(tokens[k:], special=True), answer)
        return (answer, start) if answer and start is not None else ("", 0)
