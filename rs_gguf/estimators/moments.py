"""Compute weighted means and covariances of one layer, in float64 on the device of the fit.

Activations and sample weights go in; means [M, D] and covariances [D, D] come out. Two passes read the
samples, 256 at a time: the first for the means, the second for the products of the centred rows. Processes
that share the samples add their sums, so that each gets the moments of all samples. No estimator needs more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.activations.activations import Activations
from rs_gguf.machine import ALONE, Processes

Float64 = npt.NDArray[np.float64]

# Columns of a product that are computed at once. The product is symmetric, so only its blocks on and below
# the diagonal are computed; torch has no function for that.
_BLOCK = 512


def add_product(total: Tensor, rows: Tensor) -> None:
    """Add RᵀR of `rows` R [n, D] to the lower triangle of `total` [D, D]."""
    for start in range(0, total.shape[0], _BLOCK):
        stop = min(start + _BLOCK, total.shape[0])
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def lower_product(rows: Tensor) -> Tensor:
    """Return RᵀR [D, D] of `rows` R [n, D], correct on and below the diagonal."""
    total = rows.new_zeros((rows.shape[1], rows.shape[1]))
    add_product(total, rows)
    return total


def weighted_means(
    activations: Activations,
    layer: int,
    weights: Tensor,
    *,
    processes: Processes = ALONE,
) -> Tensor:
    """Return the weighted means [M, D] of M classes at `layer`; the mean of a class without weight is 0.

    Args:
        activations: the samples of this process.
        weights: [M, n] ≥ 0 for these samples, on the device of the fit.
    """
    totals = processes.sum(weights.sum(dim=1))
    # Weights are divided by their total first, so that the mean of a single sample is exactly that sample.
    shares = weights / torch.where(totals > 0, totals, 1.0)[:, None]
    members = np.flatnonzero((weights > 0).any(dim=0).cpu().numpy())
    means = weights.new_zeros((len(weights), activations.shape[2]))
    for part, rows in activations.chunks(layer, members, weights.device):
        means += shares[:, torch.from_numpy(part).to(weights.device)] @ rows
    return processes.sum(means)


def covariance(
    activations: Activations,
    layer: int,
    shares: Tensor,
    mean: Tensor,
    *,
    processes: Processes = ALONE,
) -> Tensor:
    """Return Σ s (h − μ)(h − μ)ᵀ [D, D] over the samples h at `layer`, correct on and below the diagonal.

    Args:
        activations: the samples of this process.
        shares: s [n] ≥ 0 for these samples. Over all processes they add up to 1.
        mean: μ [D] over all processes.
    """
    total = mean.new_zeros((len(mean), len(mean)))
    for rows in centred_chunks(activations, layer, shares, mean):
        add_product(total, rows)
    return processes.sum(total)


def centred_rows(
    activations: Activations,
    layer: int,
    shares: Tensor,
    mean: Tensor,
    *,
    processes: Processes = ALONE,
) -> Tensor:
    """Return √s (h − μ) [n, D] for the samples with s > 0 of all processes; arguments as for `covariance`."""
    centred = mean.new_empty((int((shares > 0).sum()), len(mean)))
    filled = 0
    for rows in centred_chunks(activations, layer, shares, mean):
        centred[filled : filled + len(rows)] = rows
        filled += len(rows)
    return processes.concatenate(centred)


def centred_chunks(activations: Activations, layer: int, shares: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Yield √s (h − μ) [n, D] for the local samples with s > 0, at most 256 rows at a time."""
    members = np.flatnonzero((shares > 0).cpu().numpy())
    for part, rows in activations.chunks(layer, members, shares.device):
        rows -= mean
        rows *= shares[torch.from_numpy(part).to(shares.device)].sqrt()[:, None]
        yield rows
