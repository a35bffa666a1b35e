"""Estimate the seconds of one unit of each sort of work: stored for a server core, or measured here.

For the stored speed, the dimensions of a model and its judge and a number of cores go in. For the measured
speed, the loaded model, its judge and a few prompts go in. A `Speed` comes out, by which stages multiply
their units of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rs_gguf.engines.engine import Engine
from rs_gguf.engines.generation import common_prefix
from rs_gguf.estimators.ridge import RidgeSystem
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.registry import Judge
from rs_gguf.judges.rubric import MAX_PROMPT
from rs_gguf.machine import one_thread, usable_cores
from rs_gguf.models.dimensions import ModelDimensions
from rs_gguf.records.conversation import Prompt

# Work of a server core per second (docs/scaling.md).
_READING = 80e9  # operations on tokens that are read together
_ANSWERING = 60e9  # operations on prompts and answers where prompts are answered
_BANDWIDTH = 9e9  # bytes of weights in a decoding step
_ALGEBRA = 52e9  # float64 operations of the fit
_CONTEXT = 100  # mean number of tokens before a token that is read or generated

BYTES_PER_TOKEN = 4.3
"""Bytes of UTF-8 per token, averaged over languages."""
_ITEM = 8  # tokens around a prompt and its answer, for the judge

_TIMED, _TOKENS = 16, 12  # prompts to time, and tokens per answer to time
_SAMPLES, _WIDTH = 512, 1024  # rows and columns of the factorisation to time


@dataclass(frozen=True)
class JudgeModel:
    """A judge that is a model on this machine, and the share of its layers that a judgement needs."""

    model: ModelDimensions
    depth: float = 1.0


@dataclass(frozen=True)
class Speed:
    """The time of one unit of work with a model and a judge on a machine.

    read: seconds per token of prompts that are read together.
    begin: seconds per token of prompts that are answered.
    answer: seconds per token of answers, with as many at once as the recipe sets.
    judge: seconds per token of judged prompts and answers.
    algebra: float64 operations per second of the fit, on all cores.
    source: where the figures come from.
    """

    read: float
    begin: float
    answer: float
    judge: float
    algebra: float
    source: str


def stored_speed(cores: int, model: ModelDimensions, judge: JudgeModel | None, at_once: int) -> Speed:
    """Return the speed of `cores` cores like those on which this project was measured.

    A decoding step of `at_once` answers reads the weights once, besides its arithmetic. Of experts, it reads
    those that at least one of the answers uses.
    """
    flops = model.flops(_CONTEXT)
    weights = model.bytes_read(at_once) / at_once / _BANDWIDTH
    return Speed(
        read=flops / _READING / cores,
        begin=flops / _ANSWERING / cores,
        answer=((flops + 2 * model.head) / _ANSWERING + weights) / cores,
        judge=judge.depth * judge.model.flops(_CONTEXT) / _READING / cores if judge else 0.0,
        algebra=_ALGEBRA * cores,
        source=f"{cores} server cores; this machine may take half or twice as long (use --measure)",
    )


def measured_speed(
    model: Engine, judge: Judge | None, prompts: Sequence[Prompt], conversations: Sequence[Sequence[int]]
) -> Speed:
    """Return the speed of this machine, timed on `prompts` and their `conversations` (tokens)."""
    prefix = common_prefix(conversations)
    timed = conversations[:_TIMED]
    tokens = sum(map(len, timed)) - (len(timed) - 1) * prefix
    # Prompts of one token after the common prefix, so that answers alone are timed.
    starts = [conversation[: prefix + 1] for conversation in conversations]
    lengths: list[int] = []

    def answer() -> None:
        lengths[:] = [len(g.tokens) + g.finished for _, g in model.generate(starts, max_tokens=_TOKENS)]

    # Warm-up: the first call allocates memory. The prefix would stay in the cache, but it is to be timed.
    _drain(model.next_logits([conversation[-1:] for conversation in timed[:2]]))
    _drain(model.generate([conversation[-1:] for conversation in timed[:2]], max_tokens=1))
    read = _seconds(lambda: _drain(model.next_logits(timed))) / tokens
    begin = _seconds(lambda: _drain(model.generate(timed, max_tokens=1))) / tokens
    step = _seconds(answer) / max(1, sum(lengths))
    judging = 0.0
    if judge is not None:
        try_out(judge)  # warm-up: it reads its instructions once for all pairs
        # Only the length of an answer matters, so the text of the next prompt serves as one. A judge does not
        # read an answer that repeats its prompt.
        texts = [prompt.prompt for prompt in prompts[:_TIMED]]
        pairs = list(zip(texts, [*texts[1:], texts[0]], strict=True))
        pair_lengths = [pair_tokens(tokens_of(prompt), tokens_of(text)) for prompt, text in pairs]
        judging = _seconds(lambda: _drain(judge.judge(pairs))) / sum(pair_lengths)
    return Speed(read, begin, step, judging, _algebra(), "measured on this machine")


def tokens_of(text: str) -> float:
    """Return an estimate of the number of tokens of a text."""
    return len(text.encode()) / BYTES_PER_TOKEN


def pair_tokens(prompt: float, answer: float) -> float:
    """Return the tokens that a judge reads of a prompt and an answer of `prompt` and `answer` tokens."""
    return min(prompt, MAX_PROMPT / BYTES_PER_TOKEN) + answer + _ITEM


def factorisation(rows: float, width: float) -> float:
    """Return the operations for the smaller of a covariance and its Gram matrix, and its eigendecomposition.

    An eigendecomposition takes as long as 13 n³ operations of a matrix product.
    """
    small, large = sorted((rows, width))
    return small * small * large + 13 * small**3


def cholesky(rows: float, width: float) -> float:
    """Return the operations for the smaller matrix and its Cholesky factor, which takes as long as n³."""
    small, large = sorted((rows, width))
    return small * small * large + small**3


def _algebra() -> float:
    """Return the operations per second of all cores, if each factorises its own matrices."""
    rows = np.random.default_rng(0).standard_normal((_SAMPLES, _WIDTH))

    def factorise() -> None:
        RidgeSystem.of_rows(rows)

    with one_thread():  # as the fit does
        factorise()
        return usable_cores() * factorisation(_SAMPLES, _WIDTH) / min(_seconds(factorise) for _ in range(3))


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
