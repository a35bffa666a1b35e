"""Check that an adapter changes a model's products by B A x, by running llama.cpp.

An adapter, its file and a loaded model go in; an `EffectCheck` comes out. It compares, matrix by matrix, the
measured change with B A x, where x is the input of the matrix. A file without effect fails.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.errors import InputError
from rs_gguf.models import header
from rs_gguf.models.architecture import is_output_matrix, split_name
from rs_gguf.steering import lora_file
from rs_gguf.steering.effect_check import NOT_FINITE, check_prompts, distributions, mean_kl, read
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.report import EffectCheck

# Relative to the length of the intended change. The product is computed in F32, and its two factors round
# separately.
TOLERANCE = 1e-2

Rows = Mapping[str, NDArray[np.float64]]  # what was read of each prompt, by tensor or matrix


def check_adapter_effect(adapter: LoraAdapter, path: Path, model: Engine) -> EffectCheck:
    """Run an adapter, read from the file at `path`, on a loaded model and return what was observed.

    Raises:
        InputError: the model cannot run the prompts, or the inputs of its matrices cannot be read. Or the
            disk has no room for a file with one matrix.
    """
    if adapter.architecture != model.architecture:
        reason = (
            f"the adapter is for architecture {adapter.architecture!r}, but {model.path.name} is "
            f"{model.architecture!r}: it belongs to another model."
        )
        return EffectCheck(False, (reason,), {}, None)
    if reasons := _wrong_experts(adapter, model):  # llama.cpp would end the process
        return EffectCheck(False, tuple(reasons), {}, None)
    prompts = check_prompts(model)
    with contextlib.ExitStack() as steering:
        try:
            steering.enter_context(model.steered(Steering(adapters=[(path, 1.0)])))
        except InputError as error:  # llama.cpp's loader refused the file; later errors have other causes
            return EffectCheck(False, (str(error),), {}, None)
        steered = distributions(model, prompts)
    plain = distributions(model, prompts)
    kl_mean = mean_kl(plain, steered)
    if kl_mean is None:
        return EffectCheck(
            False, (f"{NOT_FINITE} changes B A are too large. Use a smaller scale.",), {}, None
        )
    errors = _errors_by_matrix(adapter, model, prompts)
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    reasons = []
    if np.array_equal(plain, steered):
        reasons.append("no logit changes: this llama.cpp does not apply the adapter.")
    if wrong:
        worst = max(wrong, key=lambda name: errors[name])
        reasons.append(
            f"{wrong}: the product does not change by B A x (relative error {errors[worst]:.2g} at "
            f"{worst}, tolerance {TOLERANCE:g})."
        )
    return EffectCheck(not reasons, tuple(reasons), errors, kl_mean)


def _wrong_experts(adapter: LoraAdapter, model: Engine) -> list[str]:
    """Return a reason for each tensor of experts whose number differs from the model's."""
    counts = {name: len(a) for name, (a, _) in adapter.factors.items() if a.ndim == 3}
    shapes = {tensor.name: tensor.shape for tensor in header.read(model.path).tensors} if counts else {}
    return [
        f"{name} has {count} experts in the adapter but {shapes[name][2]} in {model.path.name}: it belongs "
        "to another model."
        for name, count in counts.items()
        if name in shapes and count != shapes[name][2]
    ]


def _errors_by_matrix(adapter: LoraAdapter, model: Engine, prompts: list[list[int]]) -> dict[str, float]:
    """Return the relative error of each matrix in the adapter's first, middle and last layer.

    Each matrix is changed separately, so that its input stays the same. Its product must then change by
    B A x. Changes of other matrices than output matrices show in the logits alone.
    """
    layers, norms = adapter.layers, adapter.norms
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    present = {tensor.name for tensor in header.read(model.path).tensors}
    # A file cannot hold a change of zero alone. Some scales of a matrix multiply its change too.
    names = [name for name in adapter.factors if split_name(name)[0] in chosen and is_output_matrix(name)]
    names = [n for n in names if norms[n] and f"{n.removesuffix('.weight')}.scale" not in present]
    if not names:
        return {}
    products = {name: f"{name.removesuffix('.weight')}.product" for name in names}
    plain = read(model, prompts, [], (), [*names, *products.values()])
    singles = {name: LoraAdapter({name: adapter.factors[name]}, adapter.architecture) for name in names}
    return {
        name: _product_error(singles[name], product, plain, model, prompts)
        for name, product in products.items()
    }


def _product_error(
    single: LoraAdapter, product: str, plain: Rows, model: Engine, prompts: list[list[int]]
) -> float:
    """Return the largest ‖change − B A x‖ over the prompts, relative to the largest ‖B A x‖.

    single: an adapter of one matrix. x is the input of the matrix; the change is read at its `product`.
    plain: both of them, unsteered.
    """
    ((name, (a, b)),) = single.factors.items()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "single.gguf"
            lora_file.write(single, path)
            with model.steered(Steering(adapters=[(path, 1.0)])):
                change = read(model, prompts, [], (), (product,))[product] - plain[product]
    except OSError as error:
        raise InputError(
            f"cannot write a file with {name} alone ({error}). Free disk space or set TMPDIR."
        ) from error
    expected = plain[name] @ a.T.astype(np.float64) @ b.T.astype(np.float64)
    norm = np.linalg.norm(expected, axis=1).max()
    return float(np.linalg.norm(change - expected, axis=1).max() / norm) if norm else 0.0
