"""KL divergence of the next token, steered against unsteered, on everyday benign prompts.

A model, a steering and conversations go in; a `KlDivergence` in nats comes out, exact from full logits. At
most 32 rows of logits are kept at once, or one answer's 64: 40 MB with a vocabulary of 150,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rs_gguf.engines.answers import after_trace, answer, chat_tokens
from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.engines.next_token import kl
from rs_gguf.prompts.grid import grid, stratified
from rs_gguf.records.conversation import Answer, Prompt

PROMPTS = 100  # for the first token, as many as heretic takes
CONVERSATIONS, TOKENS = 16, 64  # for whole answers
_AT_ONCE = 32  # prompts whose logits are kept together

Tokens = tuple[Sequence[int], Sequence[int]]  # of a prompt and of its answer


@dataclass(frozen=True)
class KlDivergence:
    """Mean KL divergences in nats; NaN where nothing was compared or a logit is not finite.

    `first_token`: KL(unsteered‖steered) at the first token of the answer, mean over prompts, as heretic
    reports it. `sequence`: KL(steered‖unsteered), mean over all tokens of unsteered answers.
    """

    first_token: float
    sequence: float


NO_CHANGE = KlDivergence(0.0, 0.0)


def everyday_prompts(size: int) -> list[Prompt]:
    """Return at most `size` of the embedded benign validation prompts, without look-alikes."""
    everyday = [p for p in grid(["benign"]) if p.split == "validation" and p.topic != "lookalike"]
    return stratified(everyday, size, seed=0)


def everyday_answers(model: Engine, system: str | None) -> Sequence[Tokens]:
    """Let the unsteered model answer a few everyday prompts; return the conversations."""
    prompts = chat_tokens(model, everyday_prompts(CONVERSATIONS), system)
    replies = dict(answer(model, prompts, max_tokens=TOKENS))
    return conversations(model, prompts, [replies[i] for i in range(len(prompts))])


def conversations(
    model: Engine, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]
) -> Sequence[Tokens]:
    """Return conversations as tokens, without empty answers. Answers are cut at 64 tokens after the trace."""
    pairs = [after_trace(model, *pair) for pair in zip(prompts, answers, strict=True)]
    return [(prompt, reply[:TOKENS]) for prompt, reply in pairs if reply]


def kl_divergences(
    model: Engine, steerings: Sequence[Steering], system: str | None, answered: Sequence[Tokens]
) -> list[KlDivergence]:
    """Return how far each steering moves the next token, on everyday prompts and in `answered`."""
    first: list[list[float]] = [[] for _ in steerings]
    prompts = chat_tokens(model, everyday_prompts(PROMPTS), system)
    for start in range(0, len(prompts), _AT_ONCE):
        part = prompts[start : start + _AT_ONCE]
        before = {i: row.copy() for i, row in model.next_logits(part)}
        for found, steering in zip(first, steerings, strict=True):
            with model.steered(steering):
                found += [float(kl(before[i], row)) for i, row in model.next_logits(part)]
    sequence: list[list[float]] = [[] for _ in steerings]
    for pair in answered:
        unsteered = {step: row.copy() for _, step, row in model.answer_logits([pair])}
        for found, steering in zip(sequence, steerings, strict=True):
            with model.steered(steering):
                found += [float(kl(row, unsteered[step])) for _, step, row in model.answer_logits([pair])]
    return [
        KlDivergence(*(float(np.mean(values)) if values else float("nan") for values in both))
        for both in zip(first, sequence, strict=True)
    ]


def tokens_read(prompt: float, n_files: int) -> float:
    """Return the tokens that `kl_divergences` reads for `n_files` files, with prompts of `prompt` tokens."""
    return (1 + n_files) * (PROMPTS * prompt + CONVERSATIONS * (prompt + TOKENS))
