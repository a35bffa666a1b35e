"""A judge behind an OpenAI-compatible endpoint (method §1).

Pairs go in, judgements come out. A server that gives log-probabilities is asked for the verdict in one token:
c = 2p − 1, p the mass of "refusal" against "answer". Where that says nothing (no log-probabilities, or a
judge that thinks first), it is K sampled votes. Which of the two is found out on one example.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.exchange import KEY_VARIABLE, RequestRefusedError, TryFailedError
from rs_gguf.engines.server.replies import Completion, ServedModel, Token, Usage, served_models
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import EXAMPLE, Pair, split_by_rule
from rs_gguf.judges.rubric import chat_reading, label_message, read_verdict, rubric_version, verdict_message
from rs_gguf.judges.votes import MAX_TOKENS, SAMPLING, VOTE_READING, VOTES, Vote, tally
from rs_gguf.prompts.trace import after_thinking, answer_start
from rs_gguf.records.conversation import Judgement

_LEAST_MASS = 0.1  # of both labels together; less, and the judge was about to say something else
_TOP = 20  # the most that the protocol allows

_LABEL: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP}
_VOTE: dict[str, Any] = {
    "max_tokens": MAX_TOKENS, "temperature": SAMPLING.temperature, "top_p": SAMPLING.top_p,
}  # fmt: skip
# Most telling first. Not every server knows top_k, or has log-probabilities.
_WAYS: tuple[dict[str, Any], ...] = (
    _LABEL,
    {**_VOTE, "top_k": SAMPLING.top_k, "logprobs": True},
    {**_VOTE, "logprobs": True},
    _VOTE,
)


class EndpointJudge:
    """Judgements of a model on one or several servers."""

    def __init__(self, client: EndpointClient) -> None:
        self._client = client
        self._way: dict[str, Any] | None = None
        self._where = ", ".join(client.urls)
        self.name = f"{client.model} at {self._where} (rubric {rubric_version()})"

    @classmethod
    def of(cls, spec: str, options: EndpointOptions) -> EndpointJudge:
        """The judge for `ADDRESS[,ADDRESS…][#MODEL]`. `InputError` as of `EndpointClient`."""
        return cls(EndpointClient.of(spec, options))

    @cached_property
    def identity(self) -> str:
        how = f"{VOTES} {_WAYS} {VOTE_READING} {rubric_version()} {chat_reading()}"
        # A llama-server may have another file by now, behind the same address and name.
        told = {repr(found) for url in self._client.urls for found in _only_model(url)}
        return " ".join([f"endpoint {self._client.model} {self._where} {how}", *sorted(told)])

    @property
    def usage(self) -> Usage:
        return self._client.usage

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        asked, ruled = split_by_rule(pairs)
        yield from ruled
        if not asked:
            return
        way = self._way = self._way or self._find_way()
        count = 1 if way is _LABEL else VOTES
        bodies = (_body(way, prompt, answer, k) for _, prompt, answer in asked for k in range(count))
        got: defaultdict[int, list[Completion | RequestRefusedError]] = defaultdict(list)
        for j, completion in self._client.complete_all(bodies):
            row = j // count
            got[row].append(completion)
            if len(got[row]) == count:
                yield asked[row][0], _judgement(way, got.pop(row))

    def _find_way(self) -> dict[str, Any]:
        """The first way that this server takes and that gives a judgement of an example."""
        said = "it names no verdict"
        for way in _WAYS:
            try:
                completion = self._client.complete(_body(way, *EXAMPLE, 0))
            except RequestRefusedError as error:
                said = str(error)
                continue
            if _judgement(way, [completion]).confidence is not None:
                return way
        raise InputError(f"{self.name} cannot judge an example: {said}")


def _only_model(url: str) -> list[ServedModel]:
    """The model of a server that lists just one; none of any other server."""
    try:
        models = served_models(url, KEY_VARIABLE)
    except (TryFailedError, InputError):
        return []
    if len(models) != 1:
        return []
    (model,) = models
    # n_ctx tells how it was started, and not what it is.
    return [replace(model, figures={name: v for name, v in model.figures.items() if name != "n_ctx"})]


def _body(way: dict[str, Any], prompt: str, answer: str, seed: int) -> dict[str, Any]:
    message = label_message if way is _LABEL else verdict_message
    return {"messages": [{"role": "user", "content": message(prompt, answer)}], "seed": seed, **way}


def _judgement(way: dict[str, Any], got: Sequence[Completion | RequestRefusedError]) -> Judgement:
    answered = [c for c in got if isinstance(c, Completion)]
    if not answered:
        return Judgement(None, f"unparseable: {got[0]}")
    if way is not _LABEL:
        return tally([None if isinstance(c, RequestRefusedError) else _vote(c) for c in got])
    confidence = label_confidence(answered[0].tokens)
    if confidence is None:
        return Judgement(None, "unparseable: no label among the likeliest tokens")
    return Judgement(confidence, "label log-probabilities of an endpoint, uncalibrated")


def label_confidence(tokens: Sequence[Token] | None) -> float | None:
    """2p − 1 from the likeliest first tokens; None if they hold too little of both labels."""
    if not tokens:
        return None
    mass = {"refusal": 0.0, "answer": 0.0}
    for text, logprob in tokens[0].top:
        start = text.strip().lower()
        for label in mass:
            # A single letter could begin many a word.
            if len(start) > 1 and label.startswith(start):
                mass[label] += math.exp(logprob)
    total = sum(mass.values())
    return None if total < _LEAST_MASS else (mass["refusal"] - mass["answer"]) / total


def _vote(completion: Completion) -> Vote | None:
    if not completion.finished:  # who was still talking might have select_final on another verdict
        return None
    answer = after_thinking(completion.text)
    verdict = read_verdict(answer)
    if verdict is None:
        return None
    return Vote(*verdict, _score(completion.tokens, answer))


def _score(tokens: Sequence[Token] | None, answer: str) -> float | None:
    """Mean log-probability of the tokens of the answer, without those of a thinking trace before it."""
    texts = [token.text for token in tokens or ()]
    start = answer_start(len(texts), lambda k: "".join(texts[k:]), answer)
    if tokens is None or start is None:
        return None
    # Some servers list the token that ended the answer, which is not in its text; a frame may end after it.
    end = next(k for k in range(start, len(texts) + 1) if answer in "".join(texts[start:k]))
    return sum(token.logprob for token in tokens[start:end]) / (end - start)
