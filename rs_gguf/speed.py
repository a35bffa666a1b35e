"""What a machine does in a second: a stored measurement, or one made here and now.

A loaded model and some prompts go in, or a number of cores; a `Speed` comes out, which tells how long tokens
of any other model take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import blas
from threadpoolctl import threadpool_limits

from rs_gguf.ridge import RidgeSystem
from rs_gguf.shape import Shape

if TYPE_CHECKING:
    from rs_gguf.evaluation import Model

_STEPS = 16  # tokens of the answer that is timed
_SAMPLES, _WIDTH = 512, 1024  # of the factorisation that is timed


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    `prompt`: floating-point operations on tokens that go through the model together; `bandwidth`: bytes of
    weights, all of which a step of answers reads besides; `algebra`: operations of a factorisation in fp64,
    on one core. `source`: where the figures come from.
    """

    prompt: float
    bandwidth: float
    algebra: float
    source: str

    def reading(self, model: Shape, tokens: float, context: float, outputs: float = 0.0) -> float:
        """Seconds to read tokens, and to compute the logits of so many of them."""
        return (tokens * model.flops(context) + outputs * 2 * model.head) / self.prompt

    def answering(self, model: Shape, tokens: float, context: float, at_once: float) -> float:
        """Seconds to answer so many tokens in all, of so many sequences at once."""
        arithmetic = self.reading(model, at_once, context, at_once)
        return tokens / at_once * (arithmetic + model.bytes_read(at_once) / self.bandwidth)


def stored_speed(cores: int) -> Speed:
    """The speed of so many cores like those that this project is measured on (docs/scaling.md)."""
    return Speed(
        prompt=80e9 * cores,
        bandwidth=9e9 * cores,
        algebra=52e9,
        source=f"{cores} times the core of docs/scaling.md; yours may take half or twice as long (--measure)",
    )


def measured_speed(model: Model, shape: Shape, conversations: Sequence[Sequence[int]]) -> Speed:
    """The speed of this machine on a loaded model: `conversations` are read together, and one is answered."""
    from rs_gguf.generation import common_prefix

    count, prefix = len(conversations), common_prefix(conversations)
    tokens = sum(map(len, conversations)) - (count - 1) * prefix
    context = tokens / count + prefix

    def read() -> None:
        for _ in model.next_logits(conversations):
            pass

    flops = tokens * shape.flops(context) + count * 2 * shape.head
    read()  # what is made at the first call is made
    prompt = flops / _seconds(read)
    step = _step(model, conversations[0][:1])
    arithmetic = (shape.flops(0) + 2 * shape.head) / prompt
    bandwidth = shape.bytes_read(1) / max(step - arithmetic, step / 100)  # a tiny model's weights are cached
    return Speed(prompt, bandwidth, _algebra(), "measured on this machine")


def _step(model: Model, beginning: Sequence[int]) -> float:
    """Seconds of a step that answers one sequence."""

    def answer() -> int:
        ((_, found),) = model.generate([beginning], max_tokens=_STEPS)
        return len(found.tokens) + found.finished

    answer()
    start = time.perf_counter()
    steps = answer()
    return (time.perf_counter() - start) / steps


def factorisation(rows: float, width: float) -> float:
    """Operations for a covariance, or Gram matrix where that is smaller, and its tridiagonal form."""
    small, large = sorted((rows, width))
    return small * small * large + 4 / 3 * small**3


def cholesky(rows: float, width: float) -> float:
    """Operations for such a matrix and its Cholesky factor."""
    small, large = sorted((rows, width))
    return small * small * large + small**3 / 3


def _algebra() -> float:
    rows = np.random.default_rng(0).standard_normal((_SAMPLES, _WIDTH))

    def factorise() -> None:
        RidgeSystem(blas.dsyrk(1.0, rows.T, trans=1, lower=1), np.zeros(_WIDTH), rows)

    with threadpool_limits(1):  # as the fit does
        factorise()
        return factorisation(_SAMPLES, _WIDTH) / min(_seconds(factorise) for _ in range(3))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
