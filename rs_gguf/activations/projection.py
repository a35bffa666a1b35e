"""Project activations on directions: p = ⟨h − o, v⟩ for every sample, layer and direction.

Takes activations [N, L, D] in float32, float16 or bfloat16: a NumPy array, a memory map or a tensor. Any
stride in N and L is accepted. They are read in place, once. Returns the projections [N, L, K], or only the
statistics that layer scores and calibration need (arXiv 2512.16602: layer selection, calibration).

The compiled kernel `rs_gguf._core` (csrc/, docs/kernel.md) does the work; PyTorch does it for tensors on a
GPU. If the kernel is missing, NumPy replaces it and this module warns once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from rs_gguf.activations.fallback import (
    Float32,
    Float64,
    numpy_layers,
    numpy_projections,
    statistics,
    torch_layers,
    torch_projections,
)
from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores
from rs_gguf.records.conversation import NEUTRAL

try:
    from rs_gguf import _core
except ImportError as error:  # The installation had no compiler, or a library is missing.
    HAS_KERNEL, _MISSING = False, str(error)
else:
    HAS_KERNEL, _MISSING = True, ""

if TYPE_CHECKING:
    import torch

Activations: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
Values: TypeAlias = "npt.ArrayLike | torch.Tensor"


class SlowProjectionWarning(RuntimeWarning):
    """The compiled kernel is missing, so NumPy projects: the same results, many times more slowly."""


@dataclass(frozen=True)
class ProjectionStatistics:
    """Statistics of every direction's projections p with the refusal confidence c. All are float64 [L, K].

    `rs_gguf.activations.scores` computes layer scores and calibration scales from them.

    NaN means that a figure is undefined: the class has no sample, or there is no variance.
    """

    pearson: Float64
    """Weighted correlation of p with c."""
    disagreement: Float64
    """Weighted root mean square of p − c over samples with sign(p) ≠ sign(c); 0 without such samples."""
    auroc: Float64
    """Area under the ROC curve of p for c > neutral against c < −neutral, unweighted."""
    upper: Float64
    """Quantile q of p over c > 0, unweighted, linearly interpolated."""
    lower: Float64
    """Quantile 1 − q of p over c < 0."""


def project(
    activations: Activations,
    directions: Values,
    offset: Values | None = None,
    threads: int | None = None,
) -> Float32:
    """Return ⟨h − o, v⟩ as float32 [N, L, K].

    activations: [N, L, D] float32, float16 or bfloat16 (ml_dtypes or torch), D contiguous; never copied.
    directions: [L, K, D]. offset: the point o, [L, D], or None for the origin. Both are taken as float32.
    threads: the largest number of threads; None for all cores that this process may use.
    Sums are float32, by lanes, runs and chunks. The error is at most (44 + D/512) · 2⁻²⁴ · Σ|h − o||v| for
    any data. For random rows and rows of equal numbers it is at most 1e−6 · Σ|h − o||v| up to D = 16,384.
    The GIL is released. The environment variable RS_GGUF_KERNEL=scalar|avx2|avx512|neon selects the
    instruction set.
    Raises InputError, which names the invalid argument or RS_GGUF_KERNEL.
    """
    workers = _as_threads(threads)
    if _is_on_gpu(activations):
        return torch_projections(activations, *_as_directions(directions, offset, activations.shape))
    h = _as_array(activations)
    v, o = _as_directions(directions, offset, h.shape)
    if not HAS_KERNEL:
        _warn_once()
        return numpy_projections(h, v, o)
    try:
        return _core.project(h, v, o, threads=workers)
    except ValueError as error:  # RS_GGUF_KERNEL names a target that this machine does not have.
        raise InputError(str(error)) from None


def project_statistics(
    activations: Activations,
    directions: Values,
    confidence: Values,
    offset: Values | None = None,
    *,
    weights: Values | None = None,
    neutral: float = NEUTRAL,
    quantile: float = 0.95,
    threads: int | None = None,
) -> ProjectionStatistics:
    """Return the statistics for layer scores and calibration, without storing the [N, L, K] projections.

    confidence: c, [N] in [−1, 1]. weights: [N] ≥ 0, None for equal weights. neutral: half-width of the
    neutral band; a sample with |c| up to it is in neither class. quantile: q of `upper`; `lower` uses 1 − q.
    The other arguments are as in `project`.
    It makes one pass over the activations. Each thread works on one layer and stores its N × K projections.
    Raises InputError, which names the invalid argument, RS_GGUF_KERNEL, or the layer with a projection that
    is NaN or infinite.
    """
    _expect_range("neutral", neutral, 0, 1)
    _expect_range("quantile", quantile, 0, 1)
    workers = _as_threads(threads)
    if _is_on_gpu(activations):
        v, o = _as_directions(directions, offset, activations.shape)
        c, w = _as_samples(confidence, weights, activations.shape[0])
        figures = statistics(torch_layers(activations, v, o), v.shape[:2], c, w, neutral, quantile)
        return _finite(ProjectionStatistics(**figures))
    h = _as_array(activations)
    v, o = _as_directions(directions, offset, h.shape)
    c, w = _as_samples(confidence, weights, h.shape[0])
    if not HAS_KERNEL:
        _warn_once()
        figures = statistics(numpy_layers(h, v, o), v.shape[:2], c, w, neutral, quantile)
        return _finite(ProjectionStatistics(**figures))
    try:
        figures = _core.statistics(h, v, c, w, o, neutral=neutral, quantile=quantile, threads=workers)
    except ValueError as error:
        raise InputError(str(error)) from None
    return _finite(ProjectionStatistics(**figures))


def _finite(figures: ProjectionStatistics) -> ProjectionStatistics:
    bad = np.flatnonzero(np.isnan(figures.disagreement).any(axis=1))
    if len(bad):
        raise InputError(
            f"projections of layer {bad[0]} hold NaN or Inf; finite numbers are needed. Check the "
            "activations of this layer."
        )
    return figures


# --- arguments ---


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    # Compares names, because importing torch takes seconds and callers without tensors do not need it.
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def _is_on_gpu(activations: Activations) -> TypeGuard[torch.Tensor]:
    return _is_tensor(activations) and activations.device.type == "cuda"


def _as_array(activations: Activations) -> npt.NDArray[Any]:
    """Return the activations [N, L, D] as float32, float16, or the bits of bfloat16 as uint16. Never copy."""
    if _is_tensor(activations):
        import torch

        if activations.device.type != "cpu":
            raise InputError(
                "activations: expected a tensor on the CPU or a CUDA device, got one on "
                f"{activations.device}: use .cpu()"
            )
        tensor = activations.detach()
        if tensor.layout != torch.strided:
            raise InputError(f"activations: expected a dense tensor, got {tensor.layout}: use .to_dense()")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"activations: expected float32, float16 or bfloat16, got {tensor.dtype}: convert it"
            )
        # DLPack cannot pass bfloat16 to NumPy, so pass its bits as integers.
        array = np.from_dlpack(tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor)
        is_bfloat16 = tensor.dtype == torch.bfloat16
    elif isinstance(activations, np.ndarray):
        array = activations
        is_bfloat16 = array.dtype.name == "bfloat16"
    else:
        raise InputError(
            f"activations: expected a NumPy array or a torch tensor, got {type(activations).__name__}"
        )
    if is_bfloat16:
        array = array.view(np.uint16)
    elif array.dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise InputError(f"activations: expected float32, float16 or bfloat16, got {array.dtype}: convert it")
    if array.ndim != 3:
        raise InputError(f"activations: expected shape [N, L, D], got {list(array.shape)}")
    if array.size > 0 and array.shape[2] > 1 and array.strides[2] != array.itemsize:
        raise InputError(
            f"activations: the last axis must be contiguous, got strides {list(array.strides)} bytes: "
            "use numpy.ascontiguousarray, or capture with D as the last axis"
        )
    return array


def _as_float(name: str, values: Values, dtype: type[np.floating[Any]]) -> npt.NDArray[Any]:
    if _is_tensor(values):
        values = values.detach().cpu().double().numpy()
    try:
        with np.errstate(over="ignore"):  # A float64 beyond float32's range becomes infinite.
            return np.ascontiguousarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected an array of numbers: {error}") from None


def _as_directions(
    directions: Values, offset: Values | None, shape: tuple[int, ...]
) -> tuple[Float32, Float32 | None]:
    if len(shape) != 3:
        raise InputError(f"activations: expected shape [N, L, D], got {list(shape)}")
    _, layers, width = shape
    v = _as_float("directions", directions, np.float32)
    if v.ndim != 3 or (v.shape[0], v.shape[2]) != (layers, width):
        hint = ": for one direction a layer give directions[:, None]" if v.shape == (layers, width) else ""
        raise InputError(
            f"directions: expected shape [L, K, D] = [{layers}, K, {width}] as in activations, "
            f"got {list(v.shape)}{hint}"
        )
    if offset is None:
        return v, None
    o = _as_float("offset", offset, np.float32)
    if o.shape != (layers, width):
        raise InputError(f"offset: expected shape [L, D] = [{layers}, {width}], got {list(o.shape)}")
    return v, o


def _as_samples(confidence: Values, weights: Values | None, samples: int) -> tuple[Float64, Float64]:
    c = _as_float("confidence", confidence, np.float64)
    w = np.ones(samples) if weights is None else _as_float("weights", weights, np.float64)
    for name, values in (("confidence", c), ("weights", w)):
        if values.shape != (samples,):
            raise InputError(
                f"{name}: expected shape [N] = [{samples}] as in activations, got {list(values.shape)}"
            )
    for name, values, good, accepted in (
        ("confidence", c, np.abs(c) <= 1, "numbers from −1 to 1"),
        ("weights", w, (w >= 0) & np.isfinite(w), "finite numbers of at least 0"),
    ):
        if not good.all():
            raise InputError(f"{name}: expected {accepted}, got {values[~good][0]}")
    return c, w


def _expect_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name}: expected {low} to {high}, got {value}")


def _as_threads(threads: int | None) -> int:
    if threads is None:
        return usable_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(
            f"threads: expected a whole number of at least 1, or None for all cores, got {threads!r}"
        )
    return threads


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the compiled kernel rs_gguf._core is missing ({_MISSING}), so NumPy projects, many times more "
            "slowly. Install a C++17 compiler and reinstall "
            "(pip install --force-reinstall --no-deps --no-cache-dir rs-gguf).",
            SlowProjectionWarning,
            stacklevel=3,
        )
