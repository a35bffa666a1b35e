"""What every stage asks of a model under a steering, in llama.cpp or PyTorch: answers and log-probabilities.

Prompts or tokens and a `Steering` go in. Answers come out without their thinking traces, as the judge reads
them, and log-probabilities of continuations.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import after_thinking, answer_start, begins_in_trace
from rs_gguf.records.conversation import Answer, Prompt

if TYPE_CHECKING:  # imports PyTorch, which takes seconds and hundreds of megabytes: for who uses it
    from rs_gguf.engines.pytorch.model import TorchModel

Model: TypeAlias = "LlamaModel | TorchModel"
Advance = Callable[[int], None]
# Of each (prompt, continuation): log-probabilities [T] of the continuation, and which tokens are top-1 [T].
LogProbs = Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]]


@dataclass(frozen=True)
class Steering:
    """What is put on the model: directions added to blocks, and LoRA adapters with their scales."""

    directions: Mapping[int, Any]
    adapters: Sequence[tuple[Path, float]] = ()

    def on(self, model: Model) -> contextlib.AbstractContextManager[None]:
        return model.steered(self.directions, adapters=self.adapters)

    def scaled(self, dose: float) -> Steering:
        """The same steering, every scale times `dose`."""
        return Steering(
            {layer: np.float32(dose) * direction for layer, direction in self.directions.items()},
            [(path, dose * scale) for path, scale in self.adapters],
        )


NO_STEERING = Steering({})


def chat_tokens(model: Model, prompts: Sequence[Prompt], system: str | None = None) -> list[list[int]]:
    """Token lists of one-turn conversations in the model's own chat format."""
    chat = ChatFormat.of(model)
    return [chat.tokenize(model, prompt.prompt, system=system) for prompt in prompts]


def answer(
    model: Model, tokens: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) for conversations given as tokens, as they finish."""
    opened = [begins_in_trace(model, prompt) for prompt in tokens]
    for i, generation in model.generate(tokens, max_tokens=max_tokens, sampling=sampling):
        # Some models mark the trace with control tokens, which the plain text leaves out.
        marked = model.detokenize(generation.tokens, special=True)
        text = after_thinking(marked, inside=opened[i])
        if text == marked.strip():
            text = generation.text.strip()
        yield i, Answer(generation.tokens, text, generation.finished, is_degenerate(generation))


def has_trace(model: Model, found: Answer) -> bool:
    """Whether a thinking trace came before the final answer, or all of it is one so far."""
    return model.detokenize(found.tokens).strip() != found.text


def after_trace(model: Model, prompt: Sequence[int], found: Answer) -> tuple[list[int], list[int]]:
    """Tokens of what came before the final answer, and its own, for log-probabilities under a steering.

    A thinking trace counts as part of the prompt: what a steering does is measured on the answer. Traces
    begin alike, and what they say is not what anybody asked for.
    """
    tokens = found.tokens
    if not found.text:
        return [*prompt, *tokens], []
    start = 0
    if has_trace(model, found):
        # As `answer` read it: after a trace with the control tokens that are in it.
        start = (
            answer_start(len(tokens), lambda k: model.detokenize(tokens[k:], special=True), found.text) or 0
        )
    return [*prompt, *tokens[:start]], tokens[start:]


def logprobs_of(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[Answer], system: str | None
) -> LogProbs:
    """Log-probabilities of given answers, without their traces, under what is on the model now."""
    pairs = zip(chat_tokens(model, prompts, system), answers, strict=True)
    return model.token_logprobs([after_trace(model, tokens, found) for tokens, found in pairs])


def answer_all(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    steering: Steering,
    max_tokens: int,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    advance: Advance = lambda n: None,
) -> tuple[list[Answer], float]:
    """The answers to `prompts` under `steering`, in order, and the seconds that they took."""
    tokens = chat_tokens(model, prompts, system)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    with steering.on(model):
        for i, found in answer(model, tokens, max_tokens=max_tokens, sampling=sampling):
            answers[i] = found
            advance(1)
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - start
