"""EffectCheck that a file does to a model what its numbers say, by running both through llama.cpp.

A control vector or an adapter and a model go in; what was observed comes out. For a vector: block by block,
the residual with the direction minus the residual without, against the direction itself. For an adapter:
matrix by matrix, the same difference against B A x, x being what the matrix multiplied. A file that does
nothing is found here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine, Steering, read_last
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import OUTPUT_MATRICES, PRODUCT_TENSORS, matrix_input_tensors
from rs_gguf.models.resolve import fingerprint
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.steering import lora_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.report import EffectCheck
from rs_gguf.steering.vector import SteeringVector

TOLERANCE = 1e-3
# llama.cpp adds the direction in F32 to a residual h that is far larger: each sum is off by up to 2^-24 |h|,
# which is no fault of a short direction.
ROUNDING = 2.0**-23
# An adapter's product is computed from F32 inputs too, but its two factors round apart.
ADAPTER_TOLERANCE = 1e-2
_SHORT = "beside the residual the direction is so short that rounding swallows it"

_PROMPTS = (
    "Name three rivers in Europe.",
    "Who governs a city, and how are they chosen?",
    "写一首关于秋天的短诗。",
    "What does a pawnbroker do?",
)


def other_model(provenance: Mapping[str, ProvenanceValue], model: str | Path) -> list[str]:
    """A warning where a file was fitted on other bytes than `model`, of which its proof says nothing."""
    fitted = provenance.get("model.sha256")
    if fitted is None or fitted == fingerprint(Path(model)):
        return []
    return [
        f"it was fitted on another model file, {provenance.get('model.name', '')!r} (SHA-256 "
        f"{str(fitted)[:12]!r}...): its strength and all that was measured are of that one."
    ]


def check_vector_effect(vector: SteeringVector, model: Engine) -> EffectCheck:
    """Run a vector on a loaded model.

    Raises:
        InputError: the model cannot be run on the prompts, or its block outputs cannot be read.
    """
    foreign = _foreign(vector, model)
    if foreign is not None:
        return foreign
    chat = ChatFormat.of(model)
    prompts = [chat.tokenize(model, prompt) for prompt in _PROMPTS]
    plain = _distributions(model, prompts)
    with model.steered(Steering(vector.directions)):
        steered = _distributions(model, prompts)
    kl = _mean_kl(plain, steered)
    if kl is None:
        reason = "the next-token probabilities are no numbers any more: the directions are far too long."
        return EffectCheck(False, (reason,), {}, None)
    if np.array_equal(plain, steered):
        return EffectCheck(False, (_why_nothing_moves(vector, model, prompts, plain),), {}, kl)
    errors, reasons = _blocks_alone(vector, model, prompts[:2])
    return EffectCheck(not reasons, tuple(reasons), errors, kl)


def _foreign(vector: SteeringVector, model: Engine) -> EffectCheck | None:
    """The proof of a vector that cannot be of this model, or None."""
    reasons = []
    says = ""
    if vector.width != model.n_embd:
        says = "control vector n_embd does not match model"
        reasons.append(
            f"the vector is {vector.width} wide but {model.path.name} is {model.n_embd}: "
            "it belongs to another model."
        )
    beyond = [layer for layer in vector.layers if layer >= model.n_layer]
    if beyond:
        reasons.append(
            f"layers {beyond} do not exist: {model.path.name} has blocks 0 to {model.n_layer - 1}. "
            "llama.cpp ignores them in silence."
            + (
                " Does the file count blocks from 1? `rs-export convert --from FORMAT --base 1` moves them."
                if beyond == [model.n_layer]
                else ""
            )
        )
    return EffectCheck(False, tuple(reasons), {}, None, says) if reasons else None


def _blocks_alone(
    vector: SteeringVector, model: Engine, prompts: list[list[int]]
) -> tuple[dict[str, float], list[str]]:
    """Relative errors by block, each steered alone so that what is upstream stays the same, and reasons.

    The difference at its output must be the direction itself, up to `TOLERANCE` (relative) and what F32
    rounds away.
    """
    before = _residuals(model, prompts, vector.layers)
    lost = {
        layer: ROUNDING * float(np.linalg.norm(before[:, k], axis=1).max())
        for k, layer in enumerate(vector.layers)
    }
    norms = vector.norms
    short = [layer for layer, norm in norms.items() if 0.0 < norm <= lost[layer]]
    if short:
        return {}, [f"blocks {short}: {_SHORT} (length {norms[short[0]]:.2g} at block {short[0]})."]
    errors: dict[int, float] = {}
    ignored, wrong = [], []
    for k, (layer, direction) in enumerate(vector.directions.items()):
        with model.steered(Steering({layer: direction})):
            moved = _residuals(model, prompts, [layer])[:, 0] - before[:, k]
        size = norms[layer]
        missed = float(np.linalg.norm(moved - direction, axis=1).max())
        errors[layer] = missed / size if size else 0.0
        if size and not moved.any():
            ignored.append(layer)
        elif size and not missed <= TOLERANCE * size + lost[layer]:  # so that NaN is a miss
            wrong.append(layer)
    reasons = []
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
    return {str(layer): error for layer, error in errors.items()}, reasons


def _why_nothing_moves(
    vector: SteeringVector, model: Engine, prompts: list[list[int]], plain: NDArray[np.float64]
) -> str:
    """Directions lost in rounding do move the logits once they are made long."""
    longest = max(vector.norms.values())
    rows = {n: row.astype(np.float64) / (longest or 1.0) * 1e3 for n, row in vector.directions.items()}
    with model.steered(Steering({n: row.astype(np.float32) for n, row in rows.items()})):
        if not np.array_equal(plain, _distributions(model, prompts)):
            return f"no logit moves: {_SHORT} (longest {longest:.2g})."
    return (
        f"no logit moves: the graph of architecture {model.architecture!r} in this llama.cpp ignores control "
        "vectors."
    )


def check_adapter_effect(adapter: LoraAdapter, path: Path, model: Engine) -> EffectCheck:
    """Run an adapter, which was read from the file at `path`, on a loaded model.

    Raises:
        InputError: the model cannot be run on the prompts, what its matrices multiply cannot be read, or
            there is no room for one of them.
    """
    if adapter.architecture != model.architecture:
        reason = (
            f"the adapter is for {adapter.architecture!r}, {model.path.name} is {model.architecture!r}: it "
            "belongs to another model."
        )
        return EffectCheck(False, (reason,), {}, None)
    chat = ChatFormat.of(model)
    prompts = [chat.tokenize(model, prompt) for prompt in _PROMPTS]
    with contextlib.ExitStack() as steering:
        try:
            steering.enter_context(model.steered(Steering(adapters=[(path, 1.0)])))
        except InputError as error:  # by llama.cpp's loader; whatever fails later is no fault of the adapter
            return EffectCheck(False, (str(error),), {}, None)
        steered = _distributions(model, prompts)
    plain = _distributions(model, prompts)
    kl = _mean_kl(plain, steered)
    if kl is None:
        reason = "the next-token probabilities are no numbers any more: the change is far too large."
        return EffectCheck(False, (reason,), {}, None)
    errors = _matrices_alone(adapter, model, prompts)
    wrong = [name for name, error in errors.items() if not error <= ADAPTER_TOLERANCE]
    reasons = []
    if np.array_equal(plain, steered):
        reasons.append("no logit moves: this llama.cpp applies nothing of the adapter.")
    if wrong:
        worst = max(wrong, key=lambda name: errors[name])
        reasons.append(
            f"{wrong}: the residual does not move by B A x (relative error {errors[worst]:.2g} at {worst}, "
            f"tolerance {ADAPTER_TOLERANCE:g})."
        )
    return EffectCheck(not reasons, tuple(reasons), errors, kl)


def _matrices_alone(adapter: LoraAdapter, model: Engine, prompts: list[list[int]]) -> dict[str, float]:
    """Relative errors of the matrices of its first, middle and last block, each run alone.

    Alone, so that what is upstream stays the same and the sum that the product goes into must move by B A x.
    """
    errors: dict[str, float] = {}
    layers, norms = adapter.layers, adapter.norms
    graph = model.graph_tensors()
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        try:
            inputs = matrix_input_tensors(graph, layer)
        except InputError:  # the graph names none: the logits alone are seen to move
            continue
        for writer in OUTPUT_MATRICES:
            name = f"blk.{layer}.{writer}.weight"
            # A change of zero says nothing, and cannot be written as a file of its own.
            if norms.get(name) and writer in inputs:
                seen_at = _next(graph, inputs[writer], layer)
                if seen_at in PRODUCT_TENSORS[writer]:
                    errors[name] = _product_error(adapter, name, inputs[writer], seen_at, model, prompts)
    return errors


def _next(graph: Sequence[str], read: str, layer: int) -> str:
    """The tensor of a block that comes after `read`: in some families a norm of the product, or a part of it.

    `graph`: names of all tensors, in the order of evaluation.
    """
    tensors = [name.rpartition("-")[0] for name in graph if name.endswith(f"-{layer}")]
    return [*tensors, ""][tensors.index(read) + 1]


def _product_error(
    adapter: LoraAdapter, name: str, read: str, seen_at: str, model: Engine, prompts: list[list[int]]
) -> float:
    """Largest ‖moved − B A x‖ over prompts, as a share of the largest ‖B A x‖; the one matrix is changed."""
    layer = int(name.split(".")[1])
    a, b = (factor.astype(np.float64) for factor in adapter.factors[name])

    def sums() -> dict[str, NDArray[np.float64]]:
        return {n: rows[:, 0] for n, rows in _read(model, prompts, [layer], (read, seen_at)).items()}

    before = sums()
    try:
        with tempfile.TemporaryDirectory() as folder:
            single = Path(folder) / "single.gguf"
            lora_file.write(LoraAdapter({name: adapter.factors[name]}, adapter.architecture), single)
            with model.steered(Steering(adapters=[(single, 1.0)])):
                moved = sums()[seen_at] - before[seen_at]
    except OSError as error:
        raise InputError(
            f"No room for a file with {name} alone ({error}). Free space or set TMPDIR."
        ) from error
    promised = before[read] @ a.T @ b.T
    size = np.linalg.norm(promised, axis=1).max()
    return float(np.linalg.norm(moved - promised, axis=1).max() / size) if size else 0.0


def _residuals(model: Engine, prompts: list[list[int]], layers: list[int]) -> NDArray[np.float64]:
    """Block outputs [N, L, D] at the last token."""
    return _read(model, prompts, layers, ("l_out",))["l_out"]


def _read(
    model: Engine, prompts: list[list[int]], layers: list[int], tensors: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Tensors [N, L, width] at the last token, in the same batch every time: only steering differs."""
    found = read_last(model, prompts, layers, tensors)
    return {name: rows.astype(np.float64) for name, rows in found.items()}


def _mean_kl(plain: NDArray[np.float64], steered: NDArray[np.float64]) -> float | None:
    """Mean of KL(steered ‖ plain) over prompts, in nats, of log-probabilities; None where it is no number."""
    if not np.isfinite(steered).all():
        return None
    return float(np.mean(np.sum(np.exp(steered) * (steered - plain), axis=1)))


def _distributions(model: Engine, prompts: list[list[int]]) -> NDArray[np.float64]:
    """Log-probabilities [N, V] of the next token."""
    rows = {i: logits.astype(np.float64) for i, logits in model.next_logits(prompts)}
    logits = np.stack([rows[i] for i in range(len(prompts))])
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
