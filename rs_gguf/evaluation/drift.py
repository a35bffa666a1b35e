"""How far a steering moves what the model makes of text that it did not write under it.

Log-probabilities of the same continuations, unsteered and steered, go in; a `Drift` comes out (method §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import LogProbs
from rs_gguf.evaluation.outcomes import outcome_of
from rs_gguf.evaluation.paired_statistics import cluster_interval, clusters_of
from rs_gguf.records.conversation import Answer, Judgement, Prompt


@dataclass(frozen=True)
class Drift:
    """The drift over a list of texts; every field is NaN without text.

    `nats`: mean over the texts of |Δ mean log-probability of a token|. `top1_agreement`: share of the tokens
    that were the model's first choice and still are. The perplexities are over all tokens of all texts.
    """

    nats: float
    top1_agreement: float
    perplexity_unsteered: float
    perplexity_steered: float


def drift_of(before: LogProbs, after: LogProbs) -> Drift:
    """Return the drift from two results of `token_logprobs` for the same continuations."""
    if not before:
        return Drift(*[float("nan")] * 4)
    # Greedy answers are top-1 by construction, except where another batch rounds otherwise.
    same = np.concatenate([a[1][b[1]] for b, a in zip(before, after, strict=True)])
    return Drift(
        mean_change(before, after),
        float(same.mean()) if same.size else float("nan"),
        _perplexity(before),
        _perplexity(after),
    )


def changes_of(before: LogProbs, after: LogProbs) -> NDArray[np.float32]:
    """Return |Δ mean log-probability| [N] of N conversations, in nats a token."""
    return np.array([abs(b[0].mean() - a[0].mean()) for b, a in zip(before, after, strict=True)])


def mean_change(before: LogProbs, after: LogProbs) -> float:
    """Return the mean of `changes_of`, in nats a token."""
    return float(changes_of(before, after).mean())


def drift_interval(
    prompts: Sequence[Prompt], changes: Sequence[float], seed: int
) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of `changes` [N], by a bootstrap over subjects and forms."""
    return cluster_interval(changes, np.ones(len(changes)), clusters_of(prompts), seed=seed)


def is_drift_reference(answer: Answer, judgement: Judgement) -> bool:
    """Tell whether an unsteered answer should stay as it was: it has text and neither refuses nor fails."""
    return bool(answer.text) and outcome_of(answer, judgement) in ("complies", "unjudged")


def _perplexity(values: LogProbs) -> float:
    mean = np.concatenate([logprobs for logprobs, _ in values]).mean(dtype=np.float64)
    with np.errstate(over="ignore"):  # under a steering that is far too strong
        return float(np.exp(-mean))
