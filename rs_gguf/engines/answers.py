"""Answer prompts with an engine, and compute log-probabilities of given answers, steered or not.

Prompts or token lists and an engine go in. Answers without their thinking traces, as the judge reads them,
or log-probabilities in nats come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import GREEDY, Asking, Sampling, TokenLists
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import after_thinking, answer_start, begins_in_trace
from rs_gguf.records.conversation import Answer, Prompt

Advance = Callable[[int], None]  # gets the number of finished items


def chat_tokens(
    model: Engine, prompts: Sequence[Prompt], system: str | None = None, context: Context = PLAIN
) -> list[list[int]]:
    """Return the tokens of conversations that end with a prompt, in the model's own chat format.

    system: the system prompt, if the context has none of its own.
    """
    chat = ChatFormat.of(model)
    return [context.tokens(chat, model, prompt.prompt, system) for prompt in prompts]


def answer(
    model: Engine,
    tokens: TokenLists,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    drafts: Sequence[Answer] = (),
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) for conversations given as tokens, in the order in which they finish.

    drafts: an earlier answer to each conversation, perhaps of another steering (see `Engine.generate`).
    """
    starts_in_trace = [begins_in_trace(model, prompt) for prompt in tokens]
    earlier = [draft.tokens for draft in drafts]
    for i, generation in model.generate(tokens, max_tokens=max_tokens, sampling=sampling, drafts=earlier):
        # Some models mark the trace with control tokens, which the plain text does not contain.
        marked = model.detokenize(generation.tokens, special=True)
        text = after_thinking(marked, inside=starts_in_trace[i])
        if text == marked.strip():
            text = generation.text.strip()
        yield i, Answer(generation.tokens, text, generation.finished, is_degenerate(generation))


def has_trace(model: Engine, reply: Answer) -> bool:
    """Return whether a thinking trace precedes the final answer, or makes up all tokens so far."""
    return model.detokenize(reply.tokens).strip() != reply.text


def after_trace(model: Engine, prompt: Sequence[int], reply: Answer) -> tuple[list[int], list[int]]:
    """Return the tokens before the final answer and the tokens of the answer, for log-probabilities.

    A thinking trace counts as part of the prompt, because the effect of a steering is measured on the answer.
    Traces all begin alike, and the user did not ask for their content.
    """
    tokens = reply.tokens
    if not reply.text:
        return [*prompt, *tokens], []
    start = 0
    if has_trace(model, reply):
        # `answer` also looks for the end of the trace in the text with control tokens.
        start = (
            answer_start(len(tokens), lambda k: model.detokenize(tokens[k:], special=True), reply.text) or 0
        )
    return [*prompt, *tokens[:start]], tokens[start:]


def logprobs_of(
    model: Engine,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    system: str | None,
    context: Context = PLAIN,
) -> LogProbs:
    """Return log-probabilities of given answers, without their traces, under the model's current steering."""
    pairs = zip(chat_tokens(model, prompts, system, context), answers, strict=True)
    return model.token_logprobs([after_trace(model, tokens, reply) for tokens, reply in pairs])


def answer_all(
    model: Engine,
    prompts: Sequence[Prompt],
    steering: Steering,
    asking: Asking,
    advance: Advance = lambda n: None,
    drafts: Sequence[Answer] = (),
) -> tuple[list[Answer], float]:
    """Return the answers to `prompts` under `steering`, in order, and the seconds that they took.

    drafts: as in `answer`.
    """
    tokens = chat_tokens(model, prompts, asking.system, asking.context)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    with model.steered(steering):
        for i, reply in answer(
            model, tokens, max_tokens=asking.max_tokens, sampling=asking.sampling, drafts=drafts
        ):
            answers[i] = reply
            advance(1)
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - start
