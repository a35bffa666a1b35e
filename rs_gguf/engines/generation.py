"""Code that all engines share when they generate: draw tokens, check lengths, group sequences.

Logits or token lists go in; tokens, random seeds, lengths or groups of indices come out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rs_gguf.errors import InputError
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.records.conversation import Answer

TokenLists = Sequence[Sequence[int]]
# Gets the index of a prompt and the tokens of its answer after each token; True truncates the answer there.
Enough = Callable[[int, Sequence[int]], bool]
Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # tokens of (prompt, continuation)

TRACE_TOKENS = 1024
"""The most tokens of a thinking trace, unless a recipe sets others."""

_SHOWN = 32  # last tokens of a prompt that an error message shows; they include the end of the chat template


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. A `temperature` of 0 is greedy decoding; above 0, `seed` fixes every draw.

    The draw is among the `top_k` likeliest tokens, cut to the likeliest ones with a joint probability of
    `top_p` at that temperature. A `top_k` of 0 keeps all tokens.
    """

    temperature: float = 0.0
    top_k: int = 20
    top_p: float = 0.95
    seed: int = 0


GREEDY = Sampling()
_SEEDS = 2**32 - 1  # a llama-server takes the next one for a seed of its choice


@dataclass(frozen=True)
class Asking:
    """How prompts are asked: system prompt (None for none), the most tokens of an answer, sampling, context.

    A context with a system prompt of its own replaces `system`. `trace_tokens`: see `answers.answer`.
    `reordered`: see `Engine.generate`.
    """

    system: str | None
    max_tokens: int
    sampling: Sampling = GREEDY
    context: Context = PLAIN
    trace_tokens: int = 0
    reordered: bool = False

    def within(self, context: Context) -> Asking:
        """Return how the prompts are asked in a context."""
        if context.temperature is None:
            return replace(self, context=context)
        sampling = replace(self.sampling, temperature=context.temperature)
        return replace(self, context=context, sampling=sampling)

    def for_draw(self, number: int) -> Asking:
        """Return how prompts are asked for draw `number`, counted from 0: each has the next seed."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + number) % _SEEDS)
        return replace(self, sampling=sampling)

    def again(self, number: int = 1) -> Asking:
        """Return how a second run asks: for draw `number`, and reordered. So near ties fall freely."""
        return replace(self.for_draw(number), reordered=True)

    def drafts(self, first: Sequence[Answer]) -> Sequence[Answer]:
        """Return the first answers as drafts of a second run; none of sampled ones, which have other seeds.

        Every token is drawn again, from logits of a batch of another form. So a near tie falls as freely as
        without a draft.
        """
        return [] if self.sampling.temperature > 0 else first


def seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """Return one random seed for each prompt.

    The seed depends on the tokens of the prompt, not on its index. A resumed run, which answers only the
    missing prompts, therefore draws the same tokens. A repeated prompt in one call gets another seed.
    """
    repeats: Counter[bytes] = Counter()
    prompt_seeds: list[tuple[int, ...]] = []
    for tokens in prompts:
        digest = hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).digest()
        prompt_seeds.append((seed, int.from_bytes(digest, "little"), repeats[digest]))
        repeats[digest] += 1
    return prompt_seeds


def never_enough(index: int, tokens: Sequence[int]) -> bool:
    """Return False: only the token limit truncates the answer."""
    return False


def draw(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token for `logits` [V]: the likeliest one, or a random one of the likely ones.

    If the largest logit is NaN or infinite, as under a steering that is far too strong, nothing is drawn.
    """
    if sampling.temperature <= 0 or not np.isfinite(logits.max()):
        return int(logits.argmax())
    k = min(sampling.top_k, logits.size) if sampling.top_k > 0 else logits.size
    top = np.argpartition(logits, -k)[-k:]
    top = top[np.argsort(-logits[top], kind="stable")]
    weights = np.exp((logits[top] - logits[top[0]]).astype(np.float64) / sampling.temperature)
    weights /= weights.sum()
    keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    return int(rng.choice(top[:keep], p=weights[:keep] / weights[:keep].sum()))


def rest_of_draft(draft: Sequence[int], answer: Sequence[int], max_tokens: int) -> Sequence[int]:
    """Return the tokens that `draft` has after `answer`; none if it does not begin with `answer`.

    The last of `max_tokens` tokens is left out: no token is drawn after it, so it need not be read.
    """
    agrees = list(draft[: len(answer)]) == list(answer)
    return draft[len(answer) : max_tokens - 1] if agrees else ()


def check_lengths(
    sequences: Sequence[Sequence[int]],
    at_most: int,
    text: Callable[[Sequence[int]], str],
    max_tokens: int = 0,
) -> None:
    """Raise `InputError` if a sequence and an answer of `max_tokens` together exceed `at_most` tokens.

    `text` detokenises: the message shows the end of the longest sequence.
    """
    longest = max(sequences, key=len)
    if (length := len(longest)) + max_tokens > at_most:
        answer = f" and its answer may have {max_tokens}" if max_tokens else ""
        lower = ", or allow fewer tokens for an answer" if max_tokens else ""
        raise InputError(
            f"a prompt has {length} tokens{answer}, but only {at_most} fit the model's context. Shorten it"
            f"{lower}. It ends in {text(longest[-_SHOWN:])!r}."
        )


def join(pairs: Pairs) -> list[list[int]]:
    """Return the sequences to decode for log-probabilities: prompt and continuation without its last token.

    Raises:
        InputError: an empty prompt or continuation.
    """
    if any(not prompt or not answer for prompt, answer in pairs):
        raise InputError("log-probabilities need a prompt and a continuation of at least one token each.")
    return [[*prompt, *answer][:-1] for prompt, answer in pairs]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix of all sequences, in tokens."""
    first, last = min(map(list, sequences)), max(map(list, sequences))
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return length


def group_by_length(
    lengths: Sequence[int], at_once: int, fits: Callable[[Sequence[int]], bool]
) -> Iterator[list[int]]:
    """Yield groups of at most `at_once` indices, sorted by length, so that a batch needs little padding.

    `fits` gets two or more indices, the longest sequence last, and decides whether they make one group. A
    single index always makes a group.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group.append(i)
        if len(group) > 1 and (len(group) > at_once or not fits(group)):
            group.pop()
            yield group
            group = [i]
    if group:
        yield group
