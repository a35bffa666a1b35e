"""One factorisation of a layer's covariance, after which every ridge λ is a cheap solve.

One layer's answered class enters as activations and weights; `RidgeSystem` leaves, which applies (Σ + λI)⁻¹
for any number of λ and right-hand sides. Σ is reduced once to tridiagonal form, Σ = Q T Qᵀ with Q orthogonal:
the part of a symmetric eigendecomposition that costs, without the eigenvectors that nothing here needs. Then
(Σ + λI)⁻¹b = Q (T + λI)⁻¹ Qᵀb, and the middle step is linear in D. With fewer samples than dimensions the
same is done to the Gram matrix G = AAᵀ of Σ = AᵀA, and (Σ + λI)⁻¹b = (b − Aᵀ(G + λI)⁻¹Ab)/λ (Woodbury).
Everything is fp64. Method §3; shrinkage after Ledoit and Wolf
(2004) and Chen et al. (2010).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, lapack

from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import Float64, gather, layer_covariance, member_chunks

SHRINKAGES = ("ledoit-wolf", "oas")


class RidgeSystem:
    """(Σ + λI)⁻¹ of one layer, for many λ at once.

    Made from the lower triangle of Σ [D, D] or, with `factor` A [n, D], of G = AAᵀ [n, n]; Fortran-ordered
    and overwritten. `mean` [D] is the class mean, `trace` tr(Σ), `squares` ‖Σ‖²_F.
    """

    def __init__(self, lower: Float64, mean: Float64, factor: Float64 | None = None) -> None:
        size = len(lower)
        self.mean, self._factor = mean, factor
        self.trace = float(np.trace(lower))
        reflectors, self._diagonal, self._off_diagonal, self._tau, _ = lapack.dsytrd(
            lower, lower=1, lwork=64 * size, overwrite_a=1
        )
        self.squares = float(self._diagonal @ self._diagonal + 2 * self._off_diagonal @ self._off_diagonal)
        # LAPACK keeps Q's reflectors one row below the diagonal, where they are those of a QR
        # factorisation. The shifted view gives `dormqr` that block with leading dimension `size`, uncopied.
        flat = reflectors.reshape(-1, order="F")
        self._reflectors: Float64 = flat[1 : 1 + size * (size - 1)].reshape((size, size - 1), order="F")

    def solve(self, right: Float64, ridges: Float64) -> Float64:
        """(Σ + λI)⁻¹ B for B = `right` [D, r] and each λ in `ridges` [R] (absolute): [R, D, r]."""
        count, columns = len(ridges), right.shape[1]
        inner = self._rotate(right if self._factor is None else self._factor @ right, b"T")
        solved = np.concatenate([self._shifted(ridge, inner) for ridge in ridges], axis=1)
        solved = self._rotate(solved, b"N")
        if self._factor is not None:
            solved = np.tile(right, count) - self._factor.T @ solved
            solved /= np.repeat(ridges, columns)
        by_ridge: Float64 = solved.reshape(len(right), count, columns).transpose(1, 0, 2)
        return by_ridge

    def quadratic(self, right: Float64, ridges: Float64) -> Float64:
        """bᵀ(Σ + λI)⁻¹b of each column of `right` [D, r] and each λ in `ridges` [R]: [R, r]."""
        inner = self._rotate(right if self._factor is None else self._factor @ right, b"T")
        values = np.stack([np.einsum("ij,ij->j", inner, self._shifted(ridge, inner)) for ridge in ridges])
        if self._factor is not None:
            values = (np.einsum("ij,ij->j", right, right) - values) / ridges[:, None]
        return values

    def _rotate(self, columns: Float64, side: bytes) -> Float64:
        """Qᵀ (`T`) or Q (`N`) times `columns`; the first coordinate is Q's fixed point."""
        rotated = np.array(columns, order="F")
        if len(self._tau):
            # What LAPACK needs for blocks of 64 reflectors, its largest; with less it takes smaller ones, at
            # half the speed.
            workspace = 64 * columns.shape[1] + 65 * 64
            rotated[1:], _, _ = lapack.dormqr(b"L", side, self._reflectors, self._tau, rotated[1:], workspace)
        return rotated

    def _shifted(self, ridge: float, columns: Float64) -> Float64:
        """(T + λI)⁻¹ `columns`."""
        if len(self._diagonal) == 1:
            return np.asarray(columns / (self._diagonal + ridge))
        diagonal, off_diagonal, failed = lapack.dpttrf(self._diagonal + ridge, self._off_diagonal)
        if failed:
            raise InputError(
                f"ridge {ridge:.3g} (absolute) is lost in the rounding of a covariance with trace "
                f"{self.trace:.3g}; choose a larger ridge"
            )
        solution: Float64 = lapack.dpttrs(diagonal, off_diagonal, columns)[0]
        return solution


def layer_system(
    activations: Any, layer: int, weights: Float64, local: slice, *, distributed: bool = False
) -> RidgeSystem:
    """The `RidgeSystem` of the class with `weights` [N] at `layer`, by Gram matrix where n < D.

    `weights` are those of all samples; `local` says which of them `activations` holds (all, in one process).
    """
    members = np.flatnonzero(weights)
    width = activations.shape[2]
    if len(members) >= width:
        moments = layer_covariance(activations, layer, weights[local], distributed=distributed)
        assert moments.lower is not None  # asked for above
        moments.lower /= moments.weight
        return RidgeSystem(moments.lower, moments.mean)
    rows = np.empty((np.count_nonzero(weights[local]), width))
    filled = 0
    for _, chunk in member_chunks(activations, layer, weights[local]):
        rows[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    parts = gather(rows, distributed)
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    shares = weights[members] / weights[members].sum()
    mean = shares @ rows
    rows -= mean
    rows *= np.sqrt(shares)[:, None]
    return RidgeSystem(blas.dsyrk(1.0, rows.T, trans=1, lower=1), mean, rows)


def shrinkage_ridge(
    kind: str,
    system: RidgeSystem,
    activations: Any,
    layer: int,
    weights: Float64,
    local: slice,
    *,
    distributed: bool = False,
) -> float:
    """The ridge, relative to tr(Σ)/D, that `kind` of analytic shrinkage amounts to.

    (1 − ρ)Σ + ρ tr(Σ)/D · I is proportional to Σ + λI with λ = ρ/(1 − ρ) · tr(Σ)/D. Weighted samples count
    as n = (Σw)²/Σw², which is exact for equal weights. A class of one point gets the relative ridge 1.
    """
    width = activations.shape[2]
    if system.trace <= 0:
        return 1.0
    count = weights.sum() ** 2 / (weights @ weights)
    spread = system.squares - system.trace**2 / width  # ‖Σ − tr(Σ)/D · I‖²
    if spread <= 0:  # a multiple of I already, up to rounding
        share = 1.0
    elif kind == "oas":
        share = (system.squares / width**2 + (system.trace / width) ** 2) / ((count + 1) * spread / width**2)
    else:
        fourth = 0.0  # Σ w ‖h − μ‖⁴ / Σ w, about the mean that the factorisation found
        for part, rows in member_chunks(activations, layer, weights[local]):
            rows -= system.mean
            fourth += float(weights[local][part] @ np.einsum("ij,ij->i", rows, rows) ** 2)
        fourth = sum(gather(fourth, distributed)) / float(weights.sum())
        share = (fourth - system.squares) / count / spread
    # All of it shrunk away means λ → ∞, nothing λ = 0, which cannot be inverted where samples are few.
    share = min(max(share, 1e-9), 1 - 1e-9)
    return float(share / (1 - share))


def check_ridges(ridges: npt.ArrayLike) -> Float64:
    """`ridges` as fp64 [R]; `InputError` unless each is a positive finite number."""
    values = np.atleast_1d(np.asarray(ridges, dtype=np.float64))
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(f"ridge {ridges!r}: positive finite numbers are accepted, such as 0.01 or 1.0")
    return values
