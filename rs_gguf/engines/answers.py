"""Answer prompts with an engine, and compute log-probabilities of given answers, steered or not.

Prompts or token lists and an engine go in. Answers without their thinking traces, as the judge reads them,
or log-probabilities in nats come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import GREEDY, Asking, Sampling, TokenLists, rest_of_draft
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.markers import THINKING_MARKERS
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import answer_start, begins_in_trace, split_trace
from rs_gguf.records.conversation import Answer, Generation, Prompt, Trace

_MARKER_TOKENS = 16  # the last tokens, among which the marker that ends a trace is looked for

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
    trace_tokens: int = 0,
    sampling: Sampling = GREEDY,
    drafts: Sequence[Answer] = (),
    reordered: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) for conversations given as tokens, in the order in which they finish.

    max_tokens: of an answer. A thinking trace counts too, unless `trace_tokens` is above 0.
    trace_tokens: the most tokens of a trace, or `max_tokens` if that is more. `max_tokens` then limits the
        final answer alone, and 0 gives a trace no room of its own.
    drafts: an earlier answer to each conversation, perhaps of another steering (see `Engine.generate`).
    reordered: see `Engine.generate`.
    """
    starts_in_trace = [begins_in_trace(model, prompt) for prompt in tokens]
    earlier = [draft.tokens for draft in drafts]
    # Models that do not think need no room for a trace, which would leave room for fewer answers at once.
    # So the trace shows first, and then its answer is continued.
    begun: dict[int, Answer] = {}
    for i, generation in model.generate(
        tokens, max_tokens=max_tokens, sampling=sampling, drafts=earlier, reordered=reordered
    ):
        reply = _answer_of(model, generation, starts_in_trace[i])
        if trace_tokens and reply.trace and not reply.finished:
            begun[i] = reply
        else:
            yield i, reply
    trace_tokens = max(trace_tokens, max_tokens)
    # A long conversation leaves a trace less room. It must not shorten the traces of the others.
    by_limit: dict[int, dict[int, Answer]] = {}
    for i, reply in begun.items():
        limit = min(trace_tokens, model.max_length - len(tokens[i]) - len(reply.tokens))
        by_limit.setdefault(limit, {})[i] = reply
    for limit, replies in by_limit.items():
        if limit < 1:
            yield from replies.items()
            continue
        room = _Room(model, replies, starts_in_trace, max_tokens, trace_tokens)
        rests: list[Sequence[int]] = []
        if earlier:  # without a limit of their own: `generate` has one
            rests = [rest_of_draft(earlier[i], one.tokens, len(earlier[i]) + 1) for i, one in replies.items()]
        for k, generation in model.generate(
            [[*tokens[i], *one.tokens] for i, one in replies.items()], max_tokens=limit, sampling=sampling,
            drafts=rests, enough=room.is_full, reordered=reordered,
        ):  # fmt: skip
            i = room.indices[k]
            said = [*replies[i].tokens, *generation.tokens]
            whole = Generation(said, model.detokenize(said), generation.finished)
            yield i, _answer_of(model, whole, starts_in_trace[i])


class _Room:
    """How long answers may grow whose beginning had a trace: tokens of the trace, then of the answer."""

    def __init__(
        self,
        model: Engine,
        begun: Mapping[int, Answer],
        starts_in_trace: Sequence[bool],
        max_tokens: int,
        trace_tokens: int,
    ) -> None:
        self.indices = list(begun)
        self.trace_tokens = trace_tokens
        self._model, self._max_tokens = model, max_tokens
        self._begun = [begun[i].tokens for i in self.indices]
        self._inside = [starts_in_trace[i] for i in self.indices]
        # Where the answers begin whose trace has ended.
        traces = {k: begun[i].trace for k, i in enumerate(self.indices)}
        self._starts = {
            k: trace.tokens for k, trace in traces.items() if trace and trace.ended and trace.tokens
        }

    def is_full(self, k: int, tokens: Sequence[int]) -> bool:
        """Return whether no further token is wanted after these `tokens` of the k-th answer (an `Enough`)."""
        said = [*self._begun[k], *tokens]
        if k not in self._starts and self._has_ended(k, said):
            self._starts[k] = len(said)
        if k in self._starts:
            return len(said) - self._starts[k] >= self._max_tokens
        return len(said) >= self.trace_tokens

    def _has_ended(self, k: int, said: Sequence[int]) -> bool:
        end = self._model.detokenize(said[-_MARKER_TOKENS:], special=True)
        if not any(closing in end for _, closing in THINKING_MARKERS):
            return False  # the rule, and faster to see than in the whole text
        return split_trace(self._model.detokenize(said, special=True), inside=self._inside[k]).ended


def _answer_of(model: Engine, generation: Generation, inside: bool) -> Answer:
    """Return the final answer and the trace of a generation. `inside`: the prompt opened the trace."""
    tokens, finished = generation.tokens, generation.finished
    # Some models mark the trace with control tokens, which the plain text does not contain.
    marked = model.detokenize(tokens, special=True)
    parts = split_trace(marked, inside=inside)
    text = generation.text.strip() if parts.answer == marked.strip() else parts.answer
    if not parts.trace:
        return Answer(tokens, text, finished, is_degenerate(generation))
    start = _start(model, tokens, text) if text else len(tokens)
    trace = Generation(tokens[:start], parts.trace, parts.ended)
    said = Generation(tokens[start:], text, finished) if text else generation
    return Answer(
        tokens, text, finished, is_degenerate(said),
        Trace(parts.trace, start, parts.ended, is_degenerate(trace)),
    )  # fmt: skip


def _start(model: Engine, tokens: Sequence[int], text: str) -> int:
    """Return the index of the first token of the final answer `text`; 0 if the tokens do not show it."""
    return answer_start(len(tokens), lambda k: model.detokenize(tokens[k:], special=True), text) or 0


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
        start = _start(model, tokens, reply.text)
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
            model, tokens, max_tokens=asking.max_tokens, trace_tokens=asking.trace_tokens,
            sampling=asking.sampling, drafts=drafts, reordered=asking.reordered,
        ):  # fmt: skip
            answers[i] = reply
            advance(1)
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - start
