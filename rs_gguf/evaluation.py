"""Before and after, through llama.cpp: refusals, degenerate answers, drift of benign answers, speed.

A model, prompts, a judge and the steering go in; paired rows and rates with intervals come out.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.chat import ChatFormat, opens_thinking, split_thinking
from rs_gguf.judges import Judge
from rs_gguf.llama import Generation, LlamaModel, Sampling
from rs_gguf.prompts import Prompt
from rs_gguf.steering import SteeringVector
from rs_gguf.targets import TorchModel

Model = LlamaModel | TorchModel
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Steering:
    """What is put on the model: directions added to blocks, and LoRA adapters with their scales."""

    directions: Mapping[int, Any]
    adapters: Sequence[tuple[Path, float]] = ()

    def on(self, model: Model) -> contextlib.AbstractContextManager[None]:
        return model.steered(dict(self.directions), adapters=self.adapters)


NO_STEERING = Steering({})


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt: its tokens, the text after any thinking trace, whether it looks broken."""

    tokens: list[int]
    text: str
    finished: bool
    degenerate: bool


def chat_tokens(model: Model, prompts: Sequence[Prompt], system: str | None = None) -> list[list[int]]:
    """Token lists of one-turn conversations in the model's own chat format."""
    chat = ChatFormat.of(model)
    return [chat.tokenize(model, prompt.prompt, system=system) for prompt in prompts]


def answer(
    model: Model, tokens: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) for conversations given as tokens, as they finish."""
    opened = [opens_thinking(model.detokenize(t[-8:], special=True)) for t in tokens]
    for i, generation in model.generate(tokens, max_tokens=max_tokens, sampling=sampling):
        _, text = split_thinking(generation.text, starts_inside=opened[i])
        yield i, Answer(generation.tokens, text, generation.finished, is_degenerate(generation))


def is_degenerate(generation: Generation) -> bool:
    """Empty, or a loop: the text compresses far better than language does, or one token fills a window."""
    text = generation.text.strip()
    if not text:
        return True
    data = text.encode("utf-8")
    if len(data) >= 160 and len(zlib.compress(data, 9)) < 0.25 * len(data):
        return True
    tokens = generation.tokens
    return any(len(set(tokens[i : i + 12])) <= 2 for i in range(len(tokens) - 11))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; (0, 1) without samples."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The bound is 0 or 1 exactly at the ends; rounding would leave it a hair inside or outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value from the numbers of pairs that changed one way and the other."""
    n = gained + lost
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


def drift(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], steering: Steering
) -> tuple[float, float]:
    """Mean |Δ log-probability| per token of unsteered answers (paper section 6), and top-1 agreement.

    The mean is over conversations of the absolute change of their mean log-probability, in nats.
    """
    pairs = [(prompt, tokens) for prompt, tokens in pairs if tokens]
    if not pairs:
        return float("nan"), float("nan")
    before = model.token_logprobs(pairs)
    with steering.on(model):
        after = model.token_logprobs(pairs)
    # Greedy answers are top-1 by construction, but for the rounding of another batch.
    same = np.concatenate([b[1][a[1]] for a, b in zip(before, after, strict=True)])
    return mean_change(before, after), float(same.mean())


def mean_change(before: Sequence[tuple[Any, Any]], after: Sequence[tuple[Any, Any]]) -> float:
    """Mean over conversations of |Δ mean log-probability|, from two results of `token_logprobs`; nats."""
    return float(np.mean([abs(b[0].mean() - a[0].mean()) for a, b in zip(before, after, strict=True)]))


def answer_and_judge(
    model: Model,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    steering: Steering,
    max_tokens: int,
    system: str | None = None,
    sampling: Sampling | None = None,
    advance: Advance = lambda n: None,
) -> tuple[list[Answer], list[float | None], float]:
    """Answers and refusal confidences of `prompts` under `steering`, and tokens per second of answering."""
    tokens = chat_tokens(model, prompts, system)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    with steering.on(model):
        for i, found in answer(model, tokens, max_tokens=max_tokens, sampling=sampling):
            answers[i] = found
            advance(1)
    seconds = time.perf_counter() - start
    ordered = [answers[i] for i in range(len(prompts))]
    # Judged unsteered: the judge may be the very model that is being steered.
    graded = dict(judge.judge([(p.prompt, a.text) for p, a in zip(prompts, ordered, strict=True)]))
    speed = sum(len(a.tokens) for a in ordered) / seconds if seconds else 0.0
    return ordered, [graded[i].confidence for i in range(len(prompts))], speed


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of one set from paired rows (`confidence_baseline`, `confidence_steered`, `degenerate_…`)."""
    judged = [r for r in rows if r["confidence_baseline"] is not None and r["confidence_steered"] is not None]
    n = len(judged)
    before = [r["confidence_baseline"] > 0 for r in judged]
    after = [r["confidence_steered"] > 0 for r in judged]
    kept = sum(b and a for b, a in zip(before, after, strict=True))
    return {
        "n": n,
        "unjudged": len(rows) - n,
        "refusal_baseline": sum(before) / n if n else 0.0,
        "refusal_steered": sum(after) / n if n else 0.0,
        "ci95_baseline": list(wilson(sum(before), n)),
        "ci95_steered": list(wilson(sum(after), n)),
        "refused_baseline": sum(before),
        "refused_steered": sum(after),
        "refused_both": kept,
        "mcnemar_p": mcnemar(sum(after) - kept, sum(before) - kept),
        "degenerate_baseline": _mean([r["degenerate_baseline"] for r in rows]),
        "degenerate_steered": _mean([r["degenerate_steered"] for r in rows]),
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def compare(
    model: Model,
    judge: Judge,
    sets: Mapping[str, Sequence[Prompt]],
    steering: Steering,
    *,
    max_tokens: int,
    system: str | None = None,
    advance: Advance = lambda n: None,
) -> dict[str, Any]:
    """Unsteered and steered side by side for named sets: rates, paired rows, drift, top-1 agreement, speed.

    Drift is of the answers that were not refused unsteered, which is what must stay as it was.
    """
    result: dict[str, Any] = {"judge": judge.name, "tokens": max_tokens, "sets": {}, "rows": []}
    speeds: dict[str, list[float]] = {"baseline": [], "steered": []}
    for name, prompts in sets.items():
        sides = {}
        for side, applied in (("baseline", NO_STEERING), ("steered", steering)):
            answers, confidences, speed = answer_and_judge(
                model, judge, prompts, steering=applied, max_tokens=max_tokens, system=system, advance=advance
            )
            sides[side] = answers, confidences
            speeds[side].append(speed)
        rows = []
        for i, prompt in enumerate(prompts):
            row: dict[str, Any] = {"set": name, "prompt": prompt.prompt}
            for side, (answers, confidences) in sides.items():
                row[f"answer_{side}"] = answers[i].text
                row[f"confidence_{side}"] = confidences[i]
                row[f"degenerate_{side}"] = answers[i].degenerate
            rows.append(row)
        tokens = chat_tokens(model, prompts, system)
        answers, confidences = sides["baseline"]
        kept = [
            (tokens[i], answers[i].tokens)
            for i in range(len(prompts))
            if (confidences[i] or 0) <= 0 and answers[i].tokens
        ]
        moved, agreement = drift(model, kept, steering) if kept else (None, None)
        result["sets"][name] = {**summarise(rows), "drift": moved, "top1_agreement": agreement}
        result["rows"] += rows
    result["tokens_per_second"] = {side: sum(values) / len(values) for side, values in speeds.items()}
    return result


def summed(
    parts: Sequence[tuple[SteeringVector, float]], layer_range: tuple[int, int] | None
) -> dict[int, NDArray[np.float32]]:
    """Directions of several vectors, each times its scale, added up within an inclusive range of blocks."""
    total: dict[int, NDArray[np.float32]] = {}
    for vector, scale in parts:
        for layer, direction in vector.directions.items():
            if layer_range is None or layer_range[0] <= layer <= layer_range[1]:
                total[layer] = total.get(layer, np.zeros_like(direction)) + np.float32(scale) * direction
    return total
