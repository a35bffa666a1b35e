"""Projections and their statistics in NumPy and PyTorch, for cases that the compiled kernel does not cover.

NumPy replaces a missing kernel, and is the reference for the kernel's tests. PyTorch computes on the device
of the activations.

Takes activations [N, L, D] (float32, float16, or the bits of bfloat16 as uint16), directions [L, K, D] and an
offset [L, D], which `activations.projection` has checked. Returns the same figures as the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Layers: TypeAlias = Callable[[int], Float32]
"""Projections [N, K] of one layer, by its number."""


def numpy_projections(h: npt.NDArray[Any], v: Float32, o: Float32 | None) -> Float32:
    """Return ⟨h − o, v⟩ [N, L, K]: float64 sums, rounded to float32 once."""
    return _all_layers(numpy_layers(h, v, o), h.shape, v)


def torch_projections(h: torch.Tensor, v: Float32, o: Float32 | None) -> Float32:
    """Return ⟨h − o, v⟩ [N, L, K] as `numpy_projections` does, computed where `h` lies."""
    return _all_layers(torch_layers(h, v, o), h.shape, v)


def _all_layers(project: Layers, shape: Sequence[int], v: Float32) -> Float32:
    out = np.empty((shape[0], shape[1], v.shape[1]), np.float32)
    for layer in range(shape[1]):
        out[:, layer] = project(layer)
    return out


def statistics(
    project: Layers,
    shape: tuple[int, int],
    c: Float64,
    w: Float64,
    neutral: float,
    quantile: float,
) -> dict[str, Float64]:
    """Return the fields of `ProjectionStatistics`, each [L, K]; NaN for a layer with a non-finite projection.

    `project` returns the projections [N, K] of one layer; `shape` is (L, K). `c`: confidence, `w`: weights.
    """
    names = ("pearson", "disagreement", "auroc", "upper", "lower")
    figures = {name: np.full(shape, np.nan) for name in names}
    refused, answered = c > neutral, c < -neutral
    for layer in range(shape[0]):
        p = project(layer).astype(np.float64)
        if not np.isfinite(p).all():
            continue
        with np.errstate(all="ignore"):
            dp = p - w @ p / w.sum()
            dc = c - w @ c / w.sum()
            weighted = w > 0
            p_varies = (p[weighted] != p[weighted][:1]).any(axis=0)
            varies = p_varies & (c[weighted] != c[weighted][:1]).any()
            spread = np.sqrt(w @ dp**2) * np.sqrt(w @ dc**2)
            figures["pearson"][layer] = np.where(varies & (spread > 0), (w * dc) @ dp / spread, np.nan)
            mass = w[:, None] * (np.sign(p) != np.sign(c)[:, None])
            errors = np.where(mass > 0, p - c[:, None], 0)
            mean_square = (mass * errors**2).sum(axis=0) / mass.sum(axis=0)
            figures["disagreement"][layer] = np.where(mass.sum(axis=0) > 0, np.sqrt(mean_square), 0)
        if refused.any() and answered.any():
            from scipy.stats import rankdata  # The extra `run` has SciPy; other statistics do not need it.

            above = rankdata(np.concatenate([p[refused], p[answered]]), axis=0)[: refused.sum()]
            pairs = above.sum(axis=0) - refused.sum() * (refused.sum() + 1) / 2
            figures["auroc"][layer] = pairs / (refused.sum() * answered.sum())
        for name, mask, q in (("upper", c > 0, quantile), ("lower", c < 0, 1 - quantile)):
            if mask.any():
                figures[name][layer] = np.quantile(p[mask], q, axis=0)
    return figures


def numpy_layers(h: npt.NDArray[Any], v: Float32, o: Float32 | None) -> Layers:
    """Return a function that projects one layer of `h` in NumPy."""

    def project(layer: int) -> Float32:
        rows = h[:, layer]
        if rows.dtype == np.uint16:
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):  # Infinities and NaN are data here, as in the kernel.
            wide = rows.astype(np.float64)
            if o is not None:
                wide -= o[layer]
            p: Float32 = (wide @ v[layer].T.astype(np.float64)).astype(np.float32)
        return p

    return project


def torch_layers(h: torch.Tensor, v: Float32, o: Float32 | None) -> Layers:
    """Return a function that projects one layer of `h` in PyTorch, on its device."""

    def project(layer: int) -> Float32:
        wide = h.detach()[:, layer].double()
        if o is not None:
            wide = wide - wide.new_tensor(o[layer])
        p: Float32 = (wide @ wide.new_tensor(v[layer]).T).float().cpu().numpy()
        return p

    return project
