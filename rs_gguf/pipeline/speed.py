"""What a machine does in a second: a stored measurement, or one made here and now.

A loaded model and some prompts go in, or a number of cores; a `Speed` comes out, which tells how long tokens
of any other model take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rs_gguf.estimators.ridge import RidgeSystem
from rs_gguf.machine import one_thread
from rs_gguf.models.shape import Shape

if TYPE_CHECKING:
    from rs_gguf.engines.engine import Engine

_T = TypeVar("_T")

_STEPS = 16  # tokens of the one answer that is timed
_TOGETHER = 9  # tokens of each of those that are timed together
_SAMPLES, _WIDTH = 512, 1024  # of the factorisation that is timed


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    `prompt`: floating-point operations on tokens that go through the model together; `answer`: the same where
    sequences are answered, in smaller batches, each with a cache of its own; `bandwidth`: bytes of weights,
    all of which a step of answers reads besides; `algebra`: operations of a factorisation in fp64, on one
    core. `source`: where the figures come from.
    """

    prompt: float
    answer: float
    bandwidth: float
    algebra: float
    source: str

    def reading(self, model: Shape, tokens: float, context: float, outputs: float = 0.0) -> float:
        """Seconds to read tokens, and to compute the logits of so many of them."""
        return (tokens * model.flops(context) + outputs * 2 * model.head) / self.prompt

    def answering(
        self, model: Shape, n: float, tokens: float, steps: float, context: float, at_once: float
    ) -> float:
        """Seconds to answer n prompts of so many tokens in all, `at_once` of them together.

        `steps` are the tokens of all answers but the first of each, which comes with its prompt.
        """
        flops = (tokens + steps) * model.flops(context) + (n + steps) * 2 * model.head
        return flops / self.answer + steps / at_once * model.bytes_read(at_once) / self.bandwidth


def stored_speed(cores: int) -> Speed:
    """The speed of so many cores like those that this project is measured on (docs/scaling.md)."""
    return Speed(
        prompt=80e9 * cores,
        answer=60e9 * cores,
        bandwidth=9e9 * cores,
        algebra=52e9,
        source=f"{cores} times that of a server core; yours may take half or twice as long (--measure)",
    )


def measured_speed(model: Engine, shape: Shape, conversations: Sequence[Sequence[int]]) -> Speed:
    """The speed of this machine on a loaded model, which reads and answers `conversations`, and one alone."""
    from rs_gguf.engines.generation import common_prefix

    n, prefix = len(conversations), common_prefix(conversations)
    tokens = sum(map(len, conversations)) - (n - 1) * prefix
    context = tokens / n + prefix

    def read() -> None:
        for _ in model.next_logits(conversations):
            pass

    def answer(some: Sequence[Sequence[int]], most: int) -> list[int]:
        return [len(g.tokens) + g.finished for _, g in model.generate(some, max_tokens=most)]

    read()  # what is made at the first call is made
    seconds, _ = _timed(read)
    prompt = (tokens * shape.flops(context) + n * 2 * shape.head) / seconds
    alone = [conversations[0][:1]]
    answer(alone, _STEPS)
    seconds, (steps,) = _timed(lambda: answer(alone, _STEPS))
    step, step_flops = seconds / steps, shape.flops(0) + 2 * shape.head
    together, lengths = _timed(lambda: answer(conversations, _TOGETHER))
    flops = (tokens + sum(lengths) - n) * shape.flops(context) + sum(lengths) * 2 * shape.head
    # step = step_flops x + weights y; together = flops x + times weights y. Answering is never quicker than
    # reading, and no weights are free, whatever noise and a tiny model that stays in cache make of it.
    times = (max(lengths) - 1) * shape.bytes_read(n) / shape.bytes_read(1)
    x = max((together - times * step) / (flops - times * step_flops), 1 / prompt)
    y = max(step - step_flops * x, step / 100) / shape.bytes_read(1)
    return Speed(prompt, 1 / x, 1 / y, _algebra(), "measured on this machine")


def factorisation(rows: float, width: float) -> float:
    """Return the operations for a covariance, or Gram matrix where that is smaller, and its eigenvectors."""
    small, large = sorted((rows, width))
    return small * small * large + 9 * small**3


def cholesky(rows: float, width: float) -> float:
    """Operations for such a matrix and its Cholesky factor."""
    small, large = sorted((rows, width))
    return small * small * large + small**3 / 3


def _algebra() -> float:
    rows = np.random.default_rng(0).standard_normal((_SAMPLES, _WIDTH))

    def factorise() -> None:
        RidgeSystem.of_rows(rows)

    with one_thread():  # as the fit does
        factorise()
        return factorisation(_SAMPLES, _WIDTH) / min(_timed(factorise)[0] for _ in range(3))


def _timed(work: Callable[[], _T]) -> tuple[float, _T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
