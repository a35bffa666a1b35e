"""Proof that a control vector does to a model what its numbers say, by running both through llama.cpp.

A vector and a model go in; what was observed comes out: block by block, the residual with the direction
minus the residual without, against the direction itself. A vector that does nothing is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rs_gguf.chat import ChatFormat
from rs_gguf.llama import LlamaModel
from rs_gguf.steering import SteeringVector

# llama.cpp adds the direction in F32 to a residual that is far larger, so rounding alone leaves about
# 1e-7 × ‖h‖/‖direction‖ of relative error.
TOLERANCE = 1e-3

_PROMPTS = (
    "Name three rivers in Europe.",
    "Who governs a city, and how are they chosen?",
    "写一首关于秋天的短诗。",
    "What does a pawnbroker do?",
)


@dataclass(frozen=True)
class VectorProof:
    """What was seen. `reasons` is empty when the effect is the one that the file promises."""

    effect_observed: bool
    reasons: tuple[str, ...]
    relative_error: dict[int, float]  # of each steered block
    kl_mean: float  # nats, next-token distribution steered against unsteered

    @property
    def largest_relative_error(self) -> float:
        return max(self.relative_error.values(), default=float("nan"))


def prove_vector(vector: SteeringVector, model: str | Path | LlamaModel) -> VectorProof:
    """Run `vector` on `model` (a GGUF file, or one already loaded) and compare effect and promise.

    Each block is steered alone, so that what is upstream stays the same and the difference at its output
    must be the direction itself, up to F32 rounding (`TOLERANCE`, relative).

    Raises:
        InputError: the model cannot be loaded.
    """
    if isinstance(model, LlamaModel):
        return _prove(vector, model)
    with LlamaModel(Path(model), n_parallel=4, n_ctx=1024) as loaded:
        return _prove(vector, loaded)


def _prove(vector: SteeringVector, model: LlamaModel) -> VectorProof:
    reasons = []
    if vector.width != model.n_embd:
        reasons.append(
            f"the vector is {vector.width} wide but {model.path.name} is {model.n_embd}: "
            "it belongs to another model."
        )
    beyond = [layer for layer in vector.layers if layer >= model.n_layer]
    if beyond:
        reasons.append(
            f"layers {beyond} do not exist: {model.path.name} has blocks 0 to {model.n_layer - 1}. "
            "llama.cpp ignores them in silence."
        )
    if reasons:
        return VectorProof(False, tuple(reasons), {}, float("nan"))
    chat = ChatFormat.of(model)
    prompts = [chat.tokenize(model, prompt) for prompt in _PROMPTS]
    pair = prompts[:2]
    before = _residuals(model, pair, vector.layers)
    errors: dict[int, float] = {}
    for k, (layer, direction) in enumerate(vector.directions.items()):
        with model.steered({layer: direction}):
            moved = _residuals(model, pair, [layer])[:, 0] - before[:, k]
        size = float(np.linalg.norm(direction))
        errors[layer] = float(np.linalg.norm(moved - direction, axis=1).max()) / size if size else 0.0
    plain = _distributions(model, prompts)
    with model.steered(dict(vector.directions)):
        steered = _distributions(model, prompts)
    kl = float(np.mean(np.sum(np.exp(steered) * (steered - plain), axis=1)))
    ignored = [layer for layer, error in errors.items() if error > 0.99]
    wrong = [layer for layer, error in errors.items() if TOLERANCE < error <= 0.99]
    if ignored:
        reasons.append(
            f"blocks {ignored}: the residual does not move. The graph of architecture {model.architecture!r} "
            "in this llama.cpp ignores control vectors."
        )
    if wrong:
        worst = max(wrong, key=lambda layer: errors[layer])
        reasons.append(
            f"blocks {wrong}: the residual moves by something else than the direction (relative error "
            f"{errors[worst]:.2g} at block {worst}, tolerance {TOLERANCE:g})."
        )
    return VectorProof(not reasons, tuple(reasons), errors, kl)


def _residuals(model: LlamaModel, prompts: list[list[int]], layers: list[int]) -> NDArray[np.float64]:
    """Block outputs [N, L, D] at the last token, in the same batch every time: only steering differs."""
    found = dict(model.activations(prompts, layers=layers))
    return np.stack([found[i]["l_out"] for i in range(len(prompts))]).astype(np.float64)


def _distributions(model: LlamaModel, prompts: list[list[int]]) -> NDArray[np.float64]:
    """Log-probabilities [N, V] of the next token."""
    rows = {i: logits.astype(np.float64) for i, logits in model.next_logits(prompts)}
    logits = np.stack([rows[i] for i in range(len(prompts))])
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
