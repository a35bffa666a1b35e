"""Fit all estimators and all ridges layer by layer: class means, then one factorisation per covariance.

Activations [N, L, D] and pairs of estimator and `Labels` go in; a `RidgePath` for each pair comes out. A
layer is read once for the means of all classes and once for each distinct covariance. It is held whole in
float64 only if it has fewer answered samples than D. Estimators with the same negative class share its
factorisation. Layers are fitted in parallel, each on one thread. Method §3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.activations.activations import Activations
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import resolve_device, workers
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.moments import Float64, weighted_means
from rs_gguf.estimators.ridge import RidgeSystem, check_ridges, layer_system
from rs_gguf.machine import ALONE, Device, Processes, on_all_cores

ROUNDING = 1e-6
"""Means that differ by less, relative to their length, count as equal: a model computes in float32."""


class Estimator(Protocol):
    """What `solve_paths` needs of an estimator (`rs_gguf.estimators.estimator.DirectionEstimator`)."""

    ridge: float
    ridge_scale: Literal["relative", "absolute"]

    @property
    def name(self) -> str: ...

    @property
    def uses_covariance(self) -> bool: ...

    def classes(self, labels: Labels) -> dict[str, Float64]: ...

    def direct(self, means: Mapping[str, Tensor], system: RidgeSystem | None, ridges: Tensor) -> Tensor: ...

    def ridge_unit(self, system: RidgeSystem) -> float: ...


@dataclass(frozen=True)
class RidgePath:
    """Directions of one estimator for R ridges.

    A layer has rows of zeros if its two class means are equal. This happens before the first attention, where
    a convolution may see nothing except the end of the chat template. It also has rows of zeros if the means
    differ, at some ridge, only in the harmful contrast that the estimator must not respond to. The harmful
    contrast is the mean of refused harmful minus the mean of answered benign samples.

    ridges: [R, L], absolute; 0 for an estimator without a ridge and for a layer without a direction.
    directions: [R, L, D], float64 unit rows.
    offset: [L, D], the point from which projections are measured.
    harm_cosine: [R, L], cosine of each direction with the harmful contrast.
    contrast_cosine: [L], cosine of the difference of the two class means with the harmful contrast.

    Both cosines are NaN if kinds are not known, the harmful contrast is zero or has an empty class, or the
    layer has no direction.
    """

    ridges: Float64
    directions: Float64
    offset: Float64
    harm_cosine: Float64
    contrast_cosine: Float64


@dataclass(frozen=True)
class _Classes:
    """The classes of all jobs: each distinct weight vector is held once.

    weights: [M, N], on the device of the fit.
    names: the row of `weights` for each class of each job; classes without weight are left out.
    """

    weights: Tensor
    names: Sequence[dict[str, int]]

    @classmethod
    def of(cls, jobs: Sequence[tuple[Estimator, Labels]], device: torch.device) -> _Classes:
        rows: dict[bytes, int] = {}
        distinct: list[Float64] = []
        names = []
        for estimator, labels in jobs:
            of_job = {}
            for name, weights in estimator.classes(labels).items():
                if not weights.any():
                    continue
                row = rows.setdefault(weights.tobytes(), len(distinct))
                if row == len(distinct):
                    distinct.append(weights)
                of_job[name] = row
            names.append(of_job)
        return cls(torch.from_numpy(np.stack(distinct)).to(device), names)


def solve_paths(
    activations: Any,
    jobs: Sequence[tuple[Estimator, Labels]],
    *,
    ridges: npt.ArrayLike | None = None,
    device: Device = "auto",
    processes: Processes = ALONE,
) -> list[RidgePath]:
    """Return the path of each estimator with its own `Labels` of the same samples; see `fit_paths`."""
    samples = Activations.of(activations)
    count, n_layers, width = samples.shape
    local = jobs[0][1].local
    if local.stop - local.start != count:
        raise InputError(
            f"{count} samples of activations and {local.stop - local.start} of confidence: one confidence "
            "per sample is needed"
        )
    grid = None if ridges is None else check_ridges(ridges)
    torch_device = resolve_device(device)
    classes = _Classes.of(jobs, torch_device)
    # Jobs are grouped by their covariance, so that one factorisation is held at a time.
    systems: dict[int | None, list[int]] = {}
    for index, (estimator, _) in enumerate(jobs):
        answered = classes.names[index]["answered"] if estimator.uses_covariance else None
        systems.setdefault(answered, []).append(index)
    paths = [_empty_path(1 if grid is None else len(grid), n_layers, width) for _ in jobs]

    def fit_layer(layer: int) -> None:
        means = weighted_means(samples, layer, classes.weights[:, local], processes=processes)
        for answered, members in systems.items():
            system: RidgeSystem | None = None
            if answered is not None:
                system = layer_system(
                    samples,
                    layer,
                    classes.weights[answered],
                    means[answered],
                    local,
                    processes=processes,
                )
            for index in members:
                of_job = {name: means[row] for name, row in classes.names[index].items()}
                of_job.setdefault("offset", (of_job["refused"] + of_job["answered"]) / 2)
                _fill(paths[index], layer, jobs[index][0], of_job, system, grid)
            system = None  # as large as a layer: free it before the next one is computed

    for _ in on_all_cores(fit_layer, range(n_layers), workers=workers(torch_device, width, processes)):
        pass
    for (estimator, _), path in zip(jobs, paths, strict=True):
        if not path.directions.any():
            raise InputError(
                f"{estimator.name} has no direction at any layer: its classes have the same mean, or differ "
                "only in the harmful contrast, which it must not respond to. Check that the activations vary"
            )
    return paths


def _empty_path(n_ridges: int, n_layers: int, width: int) -> RidgePath:
    return RidgePath(
        np.zeros((n_ridges, n_layers)),
        np.zeros((n_ridges, n_layers, width)),
        np.empty((n_layers, width)),
        np.full((n_ridges, n_layers), np.nan),
        np.full(n_layers, np.nan),
    )


def _fill(
    path: RidgePath,
    layer: int,
    estimator: Estimator,
    means: dict[str, Tensor],
    system: RidgeSystem | None,
    grid: Float64 | None,
) -> None:
    """Write one layer of a path: unit directions, offset and cosines with the harmful contrast."""
    path.offset[layer] = means["offset"].cpu().numpy()
    difference = means["refused"] - means["answered"]
    size = difference.norm()
    if size <= ROUNDING * means["answered"].norm():
        return
    ridges = difference.new_zeros(len(path.ridges))
    if system is not None:
        unit = estimator.ridge_unit(system) if estimator.ridge_scale == "relative" else 1.0
        ridges += difference.new_tensor(estimator.ridge if grid is None else grid) * unit
    directions = estimator.direct(means, system, ridges)
    lengths = directions.norm(dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        return
    directions = directions / lengths[:, None]
    path.ridges[:, layer] = ridges.cpu().numpy()
    path.directions[:, layer] = directions.cpu().numpy()
    if "harmful" in means and "benign" in means:
        harm = means["harmful"] - means["benign"]
        harm_size = harm.norm()
        if harm_size > 0:
            path.harm_cosine[:, layer] = (directions @ harm / harm_size).cpu().numpy()
            path.contrast_cosine[layer] = float(difference @ harm / (harm_size * size))
