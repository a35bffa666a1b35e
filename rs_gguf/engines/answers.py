"""What a model answers to prompts, and how likely given answers are to it, under what is put on it.

Prompts or tokens and an engine go in. Answers come out without their thinking traces, as the judge reads
them, and log-probabilities of continuations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import after_thinking, answer_start, begins_in_trace
from rs_gguf.records.conversation import Answer, Prompt

Advance = Callable[[int], None]


def chat_tokens(model: Engine, prompts: Sequence[Prompt], system: str | None = None) -> list[list[int]]:
    """Token lists of one-turn conversations in the model's own chat format."""
    chat = ChatFormat.of(model)
    return [chat.tokenize(model, prompt.prompt, system=system) for prompt in prompts]


def answer(
    model: Engine, tokens: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = GREEDY
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


def has_trace(model: Engine, found: Answer) -> bool:
    """Whether a thinking trace came before the final answer, or all of it is one so far."""
    return model.detokenize(found.tokens).strip() != found.text


def after_trace(model: Engine, prompt: Sequence[int], found: Answer) -> tuple[list[int], list[int]]:
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
    model: Engine, prompts: Sequence[Prompt], answers: Sequence[Answer], system: str | None
) -> LogProbs:
    """Log-probabilities of given answers, without their traces, under what is on the model now."""
    pairs = zip(chat_tokens(model, prompts, system), answers, strict=True)
    return model.token_logprobs([after_trace(model, tokens, found) for tokens, found in pairs])


def answer_all(
    model: Engine,
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
    with model.steered(steering):
        for i, found in answer(model, tokens, max_tokens=max_tokens, sampling=sampling):
            answers[i] = found
            advance(1)
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - start
