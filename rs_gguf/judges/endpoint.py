"""A judge behind an OpenAI-compatible endpoint (method §1).

Pairs go in, judgements come out. A server with log-probabilities gives the verdict in one token: c = 2p − 1,
where p is the share of "refusal" in the mass of "refusal" and "answer". Other servers, and judges that think
first, give K sampled votes. The judge chooses between the two on one example.
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

_LEAST_MASS = 0.1  # least probability of both labels together; below it, the judge would say something else
_TOP = 20  # likeliest tokens to return, the most that the protocol allows

_LABEL: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP}
_VOTE: dict[str, Any] = {
    "max_tokens": MAX_TOKENS, "temperature": SAMPLING.temperature, "top_p": SAMPLING.top_p,
}  # fmt: skip
# Request options, the most informative first. Some servers lack top_k or log-probabilities.
_OPTIONS: tuple[dict[str, Any], ...] = (
    _LABEL,
    {**_VOTE, "top_k": SAMPLING.top_k, "logprobs": True},
    {**_VOTE, "logprobs": True},
    _VOTE,
)


class EndpointJudge:
    """Judgements of a model on one or several servers."""

    def __init__(self, client: EndpointClient) -> None:
        self._client = client
        self._options: dict[str, Any] | None = None  # None before the first judgement
        self._where = ", ".join(client.urls)
        self.name = f"{client.model} at {self._where} (rubric {rubric_version()})"

    @classmethod
    def of(cls, spec: str, options: EndpointOptions) -> EndpointJudge:
        """Return the judge for `ADDRESS[,ADDRESS…][#MODEL]`. Raises as `EndpointClient` does."""
        return cls(EndpointClient.of(spec, options))

    @cached_property
    def identity(self) -> str:
        how = f"{VOTES} {_OPTIONS} {VOTE_READING} {rubric_version()} {chat_reading()}"
        # The same address and name of a llama-server may stand for another file by now.
        models = {repr(model) for url in self._client.urls for model in _only_model(url)}
        return " ".join([f"endpoint {self._client.model} {self._where} {how}", *sorted(models)])

    @property
    def usage(self) -> Usage:
        return self._client.usage

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        to_judge, by_rules = split_by_rule(pairs)
        yield from by_rules
        if not to_judge:
            return
        options = self._options = self._options or self._find_options()
        count = 1 if options is _LABEL else VOTES
        bodies = (_body(options, prompt, answer, k) for _, prompt, answer in to_judge for k in range(count))
        results: defaultdict[int, list[Completion | RequestRefusedError]] = defaultdict(list)
        for j, result in self._client.complete_all(bodies):
            row = j // count
            results[row].append(result)
            if len(results[row]) == count:
                yield to_judge[row][0], _judgement(options, results.pop(row))

    def _find_options(self) -> dict[str, Any]:
        """Return the first options that the server accepts and that give a judgement of an example."""
        problem = "its answer has no verdict."
        for options in _OPTIONS:
            try:
                completion = self._client.complete(_body(options, *EXAMPLE, 0))
            except RequestRefusedError as error:
                problem = str(error)
                continue
            if _judgement(options, [completion]).confidence is not None:
                return options
        raise InputError(f"{self.name} cannot judge an example: {problem} Choose another judge.")


def _only_model(url: str) -> list[ServedModel]:
    """Return the model of a server that lists exactly one, else an empty list."""
    try:
        models = served_models(url, KEY_VARIABLE)
    except (TryFailedError, InputError):
        return []
    if len(models) != 1:
        return []
    (model,) = models
    # n_ctx depends on how the server was started, not on the model.
    return [replace(model, figures={name: v for name, v in model.figures.items() if name != "n_ctx"})]


def _body(options: dict[str, Any], prompt: str, answer: str, seed: int) -> dict[str, Any]:
    message = label_message if options is _LABEL else verdict_message
    return {"messages": [{"role": "user", "content": message(prompt, answer)}], "seed": seed, **options}


def _judgement(options: dict[str, Any], results: Sequence[Completion | RequestRefusedError]) -> Judgement:
    completions = [result for result in results if isinstance(result, Completion)]
    if not completions:
        return Judgement(None, f"unparseable: {results[0]}")
    if options is not _LABEL:
        return tally([None if isinstance(r, RequestRefusedError) else _vote(r) for r in results])
    confidence = label_confidence(completions[0].tokens)
    if confidence is None:
        return Judgement(None, "unparseable: no label among the likeliest tokens")
    return Judgement(confidence, "label log-probabilities of an endpoint, uncalibrated")


def label_confidence(tokens: Sequence[Token] | None) -> float | None:
    """Return 2p − 1 from the likeliest first tokens; None if both labels together have too little mass."""
    if not tokens:
        return None
    mass = {"refusal": 0.0, "answer": 0.0}
    for text, logprob in tokens[0].top:
        start = text.strip().lower()
        for label in mass:
            # A single letter could begin many words.
            if len(start) > 1 and label.startswith(start):
                mass[label] += math.exp(logprob)
    total = sum(mass.values())
    return None if total < _LEAST_MASS else (mass["refusal"] - mass["answer"]) / total


def _vote(completion: Completion) -> Vote | None:
    if not completion.finished:  # a longer vote might have ended with another verdict
        return None
    answer = after_thinking(completion.text)
    verdict = read_verdict(answer)
    if verdict is None:
        return None
    return Vote(*verdict, _score(completion.tokens, answer))


def _score(tokens: Sequence[Token] | None, answer: str) -> float | None:
    """Return the mean log-probability (nats) of the answer's tokens, without a thinking trace before it."""
    texts = [token.text for token in tokens or ()]
    start = answer_start(len(texts), lambda k: "".join(texts[k:]), answer)
    if tokens is None or start is None:
        return None
    # Some servers list an end token that is not in the text, and a frame may end after the answer.
    end = next(k for k in range(start, len(texts) + 1) if answer in "".join(texts[start:k]))
    return sum(token.logprob for token in tokens[start:end]) / (end - start)
