"""Solve (Σ + λI)x = b of one layer for every ridge λ, from one eigendecomposition.

Activations and weights of the answered class at one layer go in; a `RidgeSystem` comes out. It decomposes the
smaller of the covariance Σ = AᵀA [D, D] and its Gram matrix G = AAᵀ [n, n] once. Each ridge then costs only a
division: Σ = V diag(s) Vᵀ gives (Σ + λI)⁻¹b = V diag(1/(s + λ)) Vᵀb. With G, Woodbury's identity gives
(b − Aᵀ(G + λI)⁻¹Ab)/λ. Everything is float64. Method §3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.activations.activations import Activations
from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import Float64, centred_rows, covariance, lower_product
from rs_gguf.machine import ALONE, Processes


class RidgeSystem:
    """(Σ + λI)⁻¹ of one layer, for many λ at once.

    Args:
        lower: the lower triangle of Σ [D, D] or, with `factor`, of G = AAᵀ [n, n].
        mean: mean [D] of the class.
        factor: A [n, D] if there are fewer samples than dimensions; None if `lower` is Σ.
    """

    def __init__(self, lower: Tensor, mean: Tensor, factor: Tensor | None = None) -> None:
        self.mean, self._factor = mean, factor
        self.trace = float(lower.trace())
        self._values, self._vectors = torch.linalg.eigh(lower)

    @classmethod
    def of_rows(cls, rows: npt.NDArray[np.float64]) -> RidgeSystem:
        """Return the system of n < D centred samples [n, D] of equal weight."""
        factor = torch.from_numpy(rows / len(rows) ** 0.5)
        return cls(lower_product(factor.T), factor.new_zeros(factor.shape[1]), factor)

    def solve(self, right: Tensor, ridges: Tensor) -> Tensor:
        """Return (Σ + λI)⁻¹B [R, D, r] for B = `right` [D, r] and each λ of `ridges` [R] (absolute).

        Raises:
            InputError: a ridge is smaller than the rounding errors of Σ.
        """
        shifted = self._values + ridges[:, None]  # [R, m]
        lost = shifted.amin(dim=1) <= torch.finfo(torch.float64).eps * self._values[-1].abs()
        if lost.any():
            raise InputError(
                f"ridge {float(ridges[lost][0]):.3g} (absolute) is lost in the rounding of a covariance with "
                f"trace {self.trace:.3g}; use a larger ridge"
            )
        inner = right if self._factor is None else self._factor @ right
        solved: Tensor = self._vectors @ ((self._vectors.T @ inner) / shifted[:, :, None])  # [R, m, r]
        if self._factor is not None:
            solved = (right - self._factor.T @ solved) / ridges[:, None, None]
        return solved


def layer_system(
    activations: Activations,
    layer: int,
    weights: Tensor,
    mean: Tensor,
    local: slice,
    *,
    processes: Processes = ALONE,
) -> RidgeSystem:
    """Return the `RidgeSystem` of the class with `weights` [N] at `layer`; from the Gram matrix if n < D.

    Args:
        activations: the samples of this process.
        weights: weights [N] of the samples of all processes, on the device of the fit.
        mean: mean [D] of the class.
        local: the part of the N samples that `activations` holds.
    """
    shares = weights[local] / weights.sum()
    if int((weights > 0).sum()) >= len(mean):
        return RidgeSystem(covariance(activations, layer, shares, mean, processes=processes), mean)
    rows = centred_rows(activations, layer, shares, mean, processes=processes)
    return RidgeSystem(lower_product(rows.T), mean, rows)


def check_ridges(ridges: npt.ArrayLike) -> Float64:
    """Return `ridges` as float64 [R].

    Raises:
        InputError: `ridges` is empty, or a value is not a positive finite number.
    """
    values = np.atleast_1d(np.asarray(ridges, dtype=np.float64))
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(f"ridge {ridges!r}: positive finite numbers are accepted, such as 0.01 or 1.0")
    return values
