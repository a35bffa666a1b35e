"""What engines share when they generate: how tokens are drawn, what an answer is, how prompts are looked at.

Logits or token lists go in; a token, a `Generation` or a length comes out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rs_gguf.errors import InputError

_SHOWN = 32  # tokens at the end of a prompt that is too long, those of the chat template among them


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Greedy unless `temperature` > 0; `seed` then fixes every draw.

    Of the `top_k` likeliest tokens, at that temperature, those that make up `top_p`.
    """

    temperature: float = 0.0
    top_k: int = 20
    top_p: float = 0.95
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Asking:
    """How prompts are asked: under which system prompt, for how many tokens, drawn how."""

    system: str | None
    max_tokens: int
    sampling: Sampling = GREEDY


def seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """The seed of each prompt's own draws.

    By its tokens and not its place: a run that was stopped and goes on with what is missing draws what it
    would have drawn. A prompt that is given again in one call draws anew.
    """
    seen: Counter[bytes] = Counter()
    found: list[tuple[int, ...]] = []
    for tokens in prompts:
        digest = hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).digest()
        found.append((seed, int.from_bytes(digest, "little"), seen[digest]))
        seen[digest] += 1
    return found


def draw(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token by its `logits` [V]: the likeliest, or one of the likely ones at random.

    Where the likeliest is no number, as under a steering that is far too strong, nothing is left to chance.
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


def check_lengths(
    sequences: Sequence[Sequence[int]],
    at_most: int,
    text: Callable[[Sequence[int]], str],
    max_tokens: int = 0,
) -> None:
    """Raise `InputError` if a sequence and an answer of `max_tokens` have more than `at_most` tokens.

    It shows how the `text` of the sequence ends.
    """
    longest = max(sequences, key=len)
    if (length := len(longest)) + max_tokens > at_most:
        answer = f" and its answer may have {max_tokens}" if max_tokens else ""
        lower = ", or lower the tokens of an answer" if max_tokens else ""
        raise InputError(
            f"a prompt has {length} tokens{answer}, but only {at_most} fit the model's context. Shorten it"
            f"{lower}. It ends in {text(longest[-_SHOWN:])!r}."
        )


def joined(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
    """What is read for the log-probabilities of continuations: each with its prompt, but for the last token.

    Raises:
        InputError: an empty prompt or continuation.
    """
    if any(not prompt or not answer for prompt, answer in pairs):
        raise InputError("log-probabilities need a prompt and a continuation of at least one token each.")
    return [[*prompt, *answer][:-1] for prompt, answer in pairs]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all sequences begin with."""
    first, last = min(map(list, sequences)), max(map(list, sequences))
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return length


def groups(
    lengths: Sequence[int], at_once: int, fits: Callable[[Sequence[int]], bool]
) -> Iterator[list[int]]:
    """Yield indices by length, in groups of `at_once` at most that fit together: a batch wastes little then.

    `fits` is asked of two indices or more, the longest last. One alone always fits.
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
