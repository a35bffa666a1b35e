"""Streaming, mergeable, weighted moments in fp64.

Activations [N, L, D] enter (NumPy array, memory map or torch tensor; f16, bf16, f32 or f64), one layer and
one chunk of samples at a time; a weighted mean [D] and, where asked for, a weighted covariance [D, D] leave.
Chunks, files larger than memory and several processes are one code path: update, then merge. The merge is
the pairwise one of Chan, Golub and LeVeque (1979) with West's (1979) weights. The directions
of García-Ferrero et al. (arXiv 2512.16602) are functions of these moments alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas

from rs_gguf.errors import InputError

Float64 = npt.NDArray[np.float64]
T = TypeVar("T")

# Samples converted to fp64 at once: small beside a layer, large enough for BLAS 3 to run near full speed.
CHUNK_SAMPLES = 128


class Moments:
    """Weighted count, mean [D] and (with `scatter`) sum of weighted outer products about the mean.

    `update` adds samples, `merge` adds another `Moments`; both are exact up to fp64 rounding, in any order.
    """

    def __init__(self, width: int, *, scatter: bool = False) -> None:
        self.weight = 0.0
        self.mean: Float64 = np.zeros(width)
        # Only the lower triangle is kept current: BLAS needs no more, and it halves the work.
        self.lower: Float64 | None = np.zeros((width, width), order="F") if scatter else None

    def update(self, rows: Float64, weights: Float64) -> None:
        """Add samples `rows` [n, D] with non-negative `weights` [n]; weight 0 leaves a sample out."""
        used = weights > 0
        if not used.all():
            rows, weights = rows[used], weights[used]
        weight = float(weights.sum())
        if weight == 0.0:
            return
        mean = weights @ rows / weight
        shift = mean - self.mean
        between = self.weight * weight / (self.weight + weight)
        if self.lower is not None:
            # One rank-(n + 1) update: the chunk's own scatter and, as its last row, the shift of the mean.
            factor = np.empty((len(rows) + 1, rows.shape[1]))
            np.subtract(rows, mean, out=factor[:-1])
            factor[:-1] *= np.sqrt(weights)[:, None]
            factor[-1] = np.sqrt(between) * shift
            self._add_outer(factor)
        self.weight += weight
        self.mean = self.mean + shift * (weight / self.weight)

    def merge(self, other: Moments) -> None:
        """Add the samples behind `other`, which must have been made with the same width and `scatter`."""
        if other.mean.shape != self.mean.shape or (other.lower is None) != (self.lower is None):
            raise InputError(
                f"moments of width {other.mean.shape[0]} (scatter: {other.lower is not None}) cannot be "
                f"merged into width {self.mean.shape[0]} (scatter: {self.lower is not None}); make both alike"
            )
        if other.weight == 0.0:
            return
        shift = other.mean - self.mean
        between = self.weight * other.weight / (self.weight + other.weight)
        if self.lower is not None and other.lower is not None:
            self.lower += other.lower
            self._add_outer(np.sqrt(between) * shift[None, :])
        self.weight += other.weight
        self.mean = self.mean + shift * (other.weight / self.weight)

    def _add_outer(self, factor: Float64) -> None:
        self.lower = blas.dsyrk(1.0, factor.T, beta=1.0, c=self.lower, lower=1, overwrite_c=1)


def check_activations(activations: Any) -> tuple[int, int, int]:
    """The shape (N, L, D) of `activations`; `InputError` when it is not a non-empty array of three axes."""
    shape = tuple(int(size) for size in getattr(activations, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        raise InputError(
            f"activations have the shape {shape}; a non-empty array or tensor [samples, layers, width] is "
            "needed"
        )
    return shape[0], shape[1], shape[2]


def read_rows(activations: Any, samples: slice | npt.NDArray[np.intp], layer: int) -> Float64:
    """Activations of `samples` at `layer` as fp64 [n, D]; `InputError` names the layer of a NaN or Inf."""
    picked = activations[samples, layer]
    if hasattr(picked, "detach"):  # a torch tensor; asked this way so that NumPy users need no torch
        picked = picked.detach().cpu().double().numpy()
    rows = np.array(picked, dtype=np.float64, order="C")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        first = bad[0] + (samples.start or 0) if isinstance(samples, slice) else samples[bad[0]]
        raise InputError(
            f"activations of layer {layer} hold NaN or Inf in {len(bad)} of the samples read, first in "
            f"sample {first}; leave such samples out, or capture again with a wider dtype"
        )
    return rows


def chunks(activations: Any, layer: int) -> Iterator[tuple[slice, Float64]]:
    """All samples of one layer as (slice, rows [n, D] in fp64), at most `CHUNK_SAMPLES` at a time."""
    for start in range(0, activations.shape[0], CHUNK_SAMPLES):
        part = slice(start, min(start + CHUNK_SAMPLES, activations.shape[0]))
        yield part, read_rows(activations, part, layer)


def member_chunks(
    activations: Any, layer: int, weights: Float64
) -> Iterator[tuple[npt.NDArray[np.intp], Float64]]:
    """As `chunks`, but only the samples with a weight, as (indices [n], rows [n, D]); others are not read."""
    members = np.flatnonzero(weights)
    for start in range(0, len(members), CHUNK_SAMPLES):
        part = members[start : start + CHUNK_SAMPLES]
        yield part, read_rows(activations, part, layer)


def gather(value: T, distributed: bool) -> list[T]:
    """`value` of every rank of torch.distributed's default group, in rank order; `[value]` when not asked."""
    if not distributed:
        return [value]
    import torch.distributed as dist

    if not dist.is_initialized():
        raise InputError("distributed=True needs torch.distributed.init_process_group to have been called")
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def layer_means(
    activations: Any, layer: int, weights: Float64, *, distributed: bool = False
) -> tuple[Float64, Float64]:
    """Weighted means [M, D] and total weights [M] of M classes at `layer`, for `weights` [M, N].

    One pass over the layer whatever M. With `distributed`, `weights` are those of this rank's samples and
    the result, the same on every rank, is over all of them. A class without weight has the mean 0.
    """
    classes = [Moments(activations.shape[2]) for _ in weights]
    for part, rows in chunks(activations, layer):
        for moments, weight in zip(classes, weights[:, part], strict=True):
            moments.update(rows, weight)
    first, *others = gather(classes, distributed)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            mine.merge(theirs)
    return np.stack([m.mean for m in first]), np.array([m.weight for m in first])


def layer_covariance(activations: Any, layer: int, weights: Float64, *, distributed: bool = False) -> Moments:
    """`Moments` with scatter of one class at `layer`, for `weights` [N]; `distributed` as above."""
    moments = Moments(activations.shape[2], scatter=True)
    for part, rows in member_chunks(activations, layer, weights):
        moments.update(rows, weights[part])
    first, *others = gather(moments, distributed)
    for other in others:
        first.merge(other)
    return first
