"""Compare a merged model with the model that has the adapters loaded, by running both in llama.cpp.

Takes the merged file, the model and the adapters with their scales. Returns a `MergeCheck` of the next-token
probabilities at the last positions of a few prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.engines.generation import Pairs
from rs_gguf.engines.next_token import kl, log_probabilities
from rs_gguf.errors import VerificationError
from rs_gguf.steering.effect_check import check_prompts

if TYPE_CHECKING:
    from rs_gguf.engines.settings import EngineSettings

EXACT, QUANTISED = 1e-3, 0.05
"""Tolerances: the largest KL divergence in nats at one position that a merge may cause.

The first is for matrices that are F32 or F16 before and after, the second for all others: llama.cpp rounds
what such a matrix multiplies, and rounds it in another way for each type.
"""
_POSITIONS = 8  # of each prompt, the last ones


@dataclass(frozen=True)
class MergeCheck:
    """What was observed at `positions` positions.

    `effect`: the largest KL divergence, with the adapters from unsteered. `kl`: the largest KL divergence of
    the merged model from the model with the adapters. `difference`: the largest difference of a
    log-probability between these two. `tolerance`: the largest `kl` accepted. All are in nats.
    """

    positions: int
    effect: float
    kl: float
    difference: float
    tolerance: float


def check_merge(
    merged: Path,
    model: Path,
    files: Sequence[tuple[Path, float]],
    tolerance: float,
    engine: EngineSettings | None = None,
) -> MergeCheck:
    """Return how far the merged model is from the model with the adapters `files`, each at its scale.

    engine: how llama.cpp runs them; None for the defaults.

    Raises:
        InputError: llama.cpp cannot run one of the two models, or load an adapter.
        VerificationError: they differ by more than `tolerance`, or a probability is not finite.
    """
    from rs_gguf.engines.llama.model import LlamaModel
    from rs_gguf.engines.settings import DEFAULTS

    engine = engine or DEFAULTS
    with LlamaModel(model, n_parallel=4, settings=engine, as_stored=True) as loaded:
        pairs = _pairs(loaded)
        plain = _distributions(loaded, pairs)
        with loaded.steered(Steering(adapters=list(files))):
            adapted = _distributions(loaded, pairs)
    with LlamaModel(merged, n_parallel=4, settings=engine, as_stored=True) as loaded:
        result = _distributions(loaded, pairs)
    found = MergeCheck(
        positions=len(adapted),
        effect=float(kl(adapted, plain).max()),
        kl=float(kl(result, adapted).max()),
        difference=float(np.abs(result - adapted).max()),
        tolerance=tolerance,
    )
    if not found.kl <= tolerance:  # written so that NaN counts as a failure
        raise VerificationError(
            f"the merged model differs from the model with the adapter: KL divergence of the next token up "
            f"to {found.kl:.3g} nats, tolerance {tolerance:g}. Nothing was written. Use --type f16, or load "
            "the adapter with --lora."
        )
    return found


def _pairs(model: Engine) -> Pairs:
    """Return each prompt with its last tokens as the continuation, and a token more, which is not read."""
    prompts = check_prompts(model)
    cuts = [max(1, len(prompt) + 1 - _POSITIONS) for prompt in prompts]
    return [(prompt[:cut], [*prompt[cut:], 0]) for prompt, cut in zip(prompts, cuts, strict=True)]


def _distributions(model: Engine, pairs: Pairs) -> NDArray[np.float64]:
    """Return the log-probabilities [N, V] at every token of the continuations."""
    rows = {(i, step): logits.copy() for i, step, logits in model.answer_logits(pairs)}
    return log_probabilities(np.stack([rows[key] for key in sorted(rows)]))
