"""Check that a control vector changes a model's residual stream by its directions, by running llama.cpp.

A vector and a loaded model go in; an `EffectCheck` comes out. It compares, layer by layer, the measured
change of the residual stream with the direction. A file without effect fails. `adapter_effect` checks
adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine, Steering, read_last
from rs_gguf.engines.next_token import kl, log_probabilities
from rs_gguf.models.resolve import fingerprint
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.report import EffectCheck
from rs_gguf.steering.vector import SteeringVector

# Relative to the length of the intended change.
TOLERANCE = 1e-3
# llama.cpp adds the direction in F32 to a far longer residual h. Each sum is off by up to 2^-24 |h|, which is
# not an error of a short direction.
ROUNDING = 2.0**-23
NOT_FINITE = "the next-token probabilities are NaN or infinite: the"
_SHORT = "the direction is so short that F32 rounding of the residual stream removes it"

_PROMPTS = (
    "Name three rivers in Europe.",
    "Who governs a city, and how are they chosen?",
    "写一首关于秋天的短诗。",
    "What does a pawnbroker do?",
)


def other_model(provenance: Mapping[str, ProvenanceValue], model: str | Path) -> list[str]:
    """Return a warning if a file was fitted on another model file; the effect check does not cover that."""
    fitted = provenance.get("model.sha256")
    if fitted is None or fitted == fingerprint(Path(model)):
        return []
    return [
        f"the file was fitted on another model file, {provenance.get('model.name', '')!r} (SHA-256 "
        f"{str(fitted)[:12]!r}...): its strength and its measurements hold for that model."
    ]


def check_vector_effect(vector: SteeringVector, model: Engine) -> EffectCheck:
    """Run a vector on a loaded model and return what was observed.

    Raises:
        InputError: the model cannot run the prompts, or its activations cannot be read.
    """
    mismatch = _mismatch(vector, model)
    if mismatch is not None:
        return mismatch
    prompts = check_prompts(model)
    plain = distributions(model, prompts)
    with model.steered(Steering(vector.directions)):
        steered = distributions(model, prompts)
    kl_mean = mean_kl(plain, steered)
    if kl_mean is None:
        return EffectCheck(
            False, (f"{NOT_FINITE} direction norms are too large. Use a smaller scale.",), {}, None
        )
    if np.array_equal(plain, steered):
        return EffectCheck(False, (_why_without_effect(vector, model, prompts, plain),), {}, kl_mean)
    errors, reasons = _errors_by_layer(vector, model, prompts[:2])
    return EffectCheck(not reasons, tuple(reasons), errors, kl_mean)


def _mismatch(vector: SteeringVector, model: Engine) -> EffectCheck | None:
    """Return the failed check of a vector whose width or layers the model does not have; None if it fits."""
    reasons = []
    loader_says = ""
    if vector.width != model.n_embd:
        loader_says = "control vector n_embd does not match model"
        reasons.append(
            f"the vector has width {vector.width} but {model.path.name} has {model.n_embd}: "
            "it belongs to another model."
        )
    missing = [layer for layer in vector.layers if layer >= model.n_layer]
    if missing:
        reasons.append(
            f"layers {missing} do not exist: {model.path.name} has layers 0 to {model.n_layer - 1}. "
            "llama.cpp ignores directions of other layers silently."
            + (
                " If the file counts layers from 1, convert it with "
                "`rs-export convert --from FORMAT --base 1`."
                if missing == [model.n_layer]
                else ""
            )
        )
    return EffectCheck(False, tuple(reasons), {}, None, loader_says) if reasons else None


def _errors_by_layer(
    vector: SteeringVector, model: Engine, prompts: list[list[int]]
) -> tuple[dict[str, float], list[str]]:
    """Return the relative error of each layer, and a sentence for each kind of failure.

    Each layer is steered separately, so that its input stays the same. The activation must then change by the
    direction, up to `TOLERANCE` (relative) and F32 rounding.
    """
    before = _activations(model, prompts, vector.layers)
    lost = {
        layer: ROUNDING * float(np.linalg.norm(before[:, k], axis=1).max())
        for k, layer in enumerate(vector.layers)
    }
    norms = vector.norms
    short = [layer for layer, norm in norms.items() if 0.0 < norm <= lost[layer]]
    if short:
        return {}, [f"layers {short}: {_SHORT} (norm {norms[short[0]]:.2g} at layer {short[0]})."]
    errors: dict[int, float] = {}
    ignored, wrong = [], []
    for k, (layer, direction) in enumerate(vector.directions.items()):
        with model.steered(Steering({layer: direction})):
            change = _activations(model, prompts, [layer])[:, 0] - before[:, k]
        norm = norms[layer]
        error = float(np.linalg.norm(change - direction, axis=1).max())
        errors[layer] = error / norm if norm else 0.0
        if norm and not change.any():
            ignored.append(layer)
        elif norm and not error <= TOLERANCE * norm + lost[layer]:  # written so that NaN counts as wrong
            wrong.append(layer)
    reasons = []
    if ignored:
        reasons.append(
            f"layers {ignored}: the residual stream does not change. This llama.cpp ignores control vectors "
            f"for architecture {model.architecture!r}. Use the gated adapter or another build of llama.cpp."
        )
    if wrong:
        worst = max(wrong, key=lambda layer: errors[layer])
        reasons.append(
            f"layers {wrong}: the residual stream does not change by the direction (relative error "
            f"{errors[worst]:.2g} at layer {worst}, tolerance {TOLERANCE:g})."
        )
    return {str(layer): error for layer, error in errors.items()}, reasons


def _why_without_effect(
    vector: SteeringVector, model: Engine, prompts: list[list[int]], plain: NDArray[np.float64]
) -> str:
    """Return why no logit changed: short directions change the logits once they are scaled to norm 1000."""
    longest = max(vector.norms.values())
    rows = {n: row.astype(np.float64) / (longest or 1.0) * 1e3 for n, row in vector.directions.items()}
    with model.steered(Steering({n: row.astype(np.float32) for n, row in rows.items()})):
        if not np.array_equal(plain, distributions(model, prompts)):
            return f"no logit changes: {_SHORT} (largest norm {longest:.2g}). Use a larger scale."
    return (
        "no logit changes: this llama.cpp ignores control vectors for architecture "
        f"{model.architecture!r}. Use the gated adapter or another build of llama.cpp."
    )


def _activations(model: Engine, prompts: list[list[int]], layers: list[int]) -> NDArray[np.float64]:
    """Return the activations [N, L, D] at the last token."""
    return read(model, prompts, layers, ("l_out",))["l_out"]


def read(
    model: Engine,
    prompts: list[list[int]],
    layers: list[int],
    tensors: Sequence[str],
    matrices: Sequence[str] = (),
) -> dict[str, NDArray[np.float64]]:
    """Return each tensor [N, L, width] at the last token; batches stay the same, only steering differs."""
    rows_by_tensor = read_last(model, prompts, layers, tensors, matrices)
    return {name: rows.astype(np.float64) for name, rows in rows_by_tensor.items()}


def check_prompts(model: Engine) -> list[list[int]]:
    """Return the tokens of the prompts on which files are checked, in the model's chat format."""
    chat = ChatFormat.of(model)
    return [chat.tokenize(model, prompt) for prompt in _PROMPTS]


def mean_kl(plain: NDArray[np.float64], steered: NDArray[np.float64]) -> float | None:
    """Return the mean KL(steered ‖ plain) over prompts in nats, from log-probabilities [N, V].

    None if a log-probability is NaN or infinite.
    """
    mean = float(kl(steered, plain).mean())
    return mean if math.isfinite(mean) else None


def distributions(model: Engine, prompts: list[list[int]]) -> NDArray[np.float64]:
    """Return the log-probabilities [N, V] of the next token."""
    rows = {i: logits.copy() for i, logits in model.next_logits(prompts)}
    return log_probabilities(np.stack([rows[i] for i in range(len(prompts))]))
