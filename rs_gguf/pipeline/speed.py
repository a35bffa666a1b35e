"""Seconds for one unit of each kind of work: stored ones of a server core, or timed here on small batches.

The shapes of a model and its judge and a number of cores go in, or both of them loaded and some prompts; a
`Speed` comes out, with which the stages multiply what they do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rs_gguf.estimators.ridge import RidgeSystem
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.rubric import MAX_PROMPT
from rs_gguf.machine import one_thread, usable_cores
from rs_gguf.models.dimensions import ModelDimensions

if TYPE_CHECKING:
    from collections.abc import Callable

    from rs_gguf.engines.engine import Engine
    from rs_gguf.judges.registry import Judge
    from rs_gguf.records.conversation import Prompt

# What a server core does in a second (docs/scaling.md): operations on tokens that are read together and
# where prompts are answered, bytes of weights in a step of answers, operations of the fit in float64.
_READING, _ANSWERING, _BANDWIDTH, _ALGEBRA = 80e9, 60e9, 9e9, 52e9
_CONTEXT = 100  # tokens before one that is read or answered, in the mean

BYTES_PER_TOKEN = 4.3  # of UTF-8, in any language
_ITEM = 8  # tokens around a prompt and its answer, for the judge

_TIMED, _TOKENS = 16, 12  # prompts that are timed, and tokens of the answers that are
_SAMPLES, _WIDTH = 512, 1024  # of the factorisation that is timed


@dataclass(frozen=True)
class JudgeModel:
    """A judge that is a model of this machine, and the share of its layers that a judgement needs."""

    model: ModelDimensions
    depth: float = 1.0


@dataclass(frozen=True)
class Speed:
    """What a unit of work takes with a model and a judge on a machine.

    Seconds for a token: `read`, of prompts that are read together; `begin`, of prompts that are answered;
    `answer`, of answers, as many at once as the recipe wants; `judge`, of judged prompts and answers.
    `algebra`: floating-point operations a second of the fit, in float64 on all cores. `source`: where the
    figures come from.
    """

    read: float
    begin: float
    answer: float
    judge: float
    algebra: float
    source: str


def stored_speed(cores: int, model: ModelDimensions, judge: JudgeModel | None, at_once: int) -> Speed:
    """Return the speed of so many cores like those that this project is measured on.

    A step of `at_once` answers reads all weights besides its arithmetic; of experts, those that any uses.
    """
    flops = model.flops(_CONTEXT)
    weights = model.bytes_read(at_once) / at_once / _BANDWIDTH
    return Speed(
        read=flops / _READING / cores,
        begin=flops / _ANSWERING / cores,
        answer=((flops + 2 * model.head) / _ANSWERING + weights) / cores,
        judge=judge.depth * judge.model.flops(_CONTEXT) / _READING / cores if judge else 0.0,
        algebra=_ALGEBRA * cores,
        source=f"{cores} times that of a server core; yours may take half or twice as long (--measure)",
    )


def measured_speed(
    model: Engine, judge: Judge | None, prompts: Sequence[Prompt], conversations: Sequence[Sequence[int]]
) -> Speed:
    """Return the speed of this machine, timed on `prompts` and, for answers, on all their `conversations`."""
    from rs_gguf.engines.generation import common_prefix

    prefix = common_prefix(conversations)
    some = conversations[:_TIMED]
    tokens = sum(map(len, some)) - (len(some) - 1) * prefix
    # Hardly a prompt before them, so that answers alone are timed.
    begun = [one[: prefix + 1] for one in conversations]
    answered: list[int] = []

    def answer() -> None:
        answered[:] = [len(g.tokens) + g.finished for _, g in model.generate(begun, max_tokens=_TOKENS)]

    _drain(model.next_logits(some[:2]))  # what is made at the first call is made
    _drain(model.generate(begun[:2], max_tokens=1))
    read = _timed(lambda: _drain(model.next_logits(some))) / tokens
    begin = _timed(lambda: _drain(model.generate(some, max_tokens=1))) / tokens
    step = _timed(answer) / max(1, sum(answered))
    graded = 0.0
    if judge is not None:
        try_out(judge)  # what it reads before all pairs is read
        # Of what it takes for an answer only the length matters; the prompt itself it would not read.
        texts = [prompt.prompt for prompt in prompts[:_TIMED]]
        pairs = list(zip(texts, [*texts[1:], texts[0]], strict=True))
        taken = _timed(lambda: _drain(judge.judge(pairs)))
        graded = taken / sum(pair_tokens(tokens_of(text), tokens_of(answer)) for text, answer in pairs)
    return Speed(read, begin, step, graded, _algebra(), "measured on this machine")


def tokens_of(text: str) -> float:
    """Return about how many tokens a text has."""
    return len(text.encode()) / BYTES_PER_TOKEN


def pair_tokens(prompt: float, answer: float) -> float:
    """Return the tokens that a judge reads of a prompt and an answer of so many tokens."""
    return min(prompt, MAX_PROMPT / BYTES_PER_TOKEN) + answer + _ITEM


def factorisation(rows: float, width: float) -> float:
    """Return the operations for the smaller of a covariance and its Gram matrix, and its eigenvectors.

    An eigendecomposition takes as long as 13 n³ operations of the product before it.
    """
    small, large = sorted((rows, width))
    return small * small * large + 13 * small**3


def cholesky(rows: float, width: float) -> float:
    """Return the operations for such a matrix and its Cholesky factor, which takes as long as n³ of them."""
    small, large = sorted((rows, width))
    return small * small * large + small**3


def _algebra() -> float:
    """Operations a second of all cores, each of which factorises matrices of its own."""
    rows = np.random.default_rng(0).standard_normal((_SAMPLES, _WIDTH))

    def factorise() -> None:
        RidgeSystem.of_rows(rows)

    with one_thread():  # as the fit does
        factorise()
        return usable_cores() * factorisation(_SAMPLES, _WIDTH) / min(_timed(factorise) for _ in range(3))


def _drain(items: Any) -> None:
    for _ in items:
        pass


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
