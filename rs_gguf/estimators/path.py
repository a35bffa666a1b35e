"""The walk over layers that every fit is: class means, one factorisation, all estimators and all λ.

Activations [N, L, D] and pairs of estimator and `Labels` enter; a `RidgePath` each leaves. A layer is read
once for the means of all classes and once for each distinct covariance (once more for Ledoit and Wolf's
shrinkage), and is never held whole in fp64 unless its answered samples are fewer than D. Estimators with the
same negative class share its factorisation. Method §3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rs_gguf.errors import InputError
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.moments import Float64, check_activations, layer_means
from rs_gguf.estimators.ridge import RidgeSystem, check_ridges, layer_system, shrinkage_ridge

if TYPE_CHECKING:
    from rs_gguf.estimators.estimator import DirectionEstimator

# Of means: what differs by less is one and the same, but for the rounding of a model that computes in F32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class RidgePath:
    """Directions of one estimator for R ridges: `directions` [R, L, D] fp64 unit rows, `offset` [L, D].

    A layer whose two class means are the same has rows of zeros: before the first attention, say, a
    convolution may have seen nothing but the end of the chat template. So has one whose means differ, for any
    of the ridges, only in what the estimator must not respond to. `ridges` [R, L] are absolute, 0 where there
    is none. With kinds given, `harm_cosine` [R, L] is the cosine of each direction with the harmful
    contrast (mean of refused harmful minus mean of answered benign), and `contrast_cosine` [L] that of the
    difference of the estimator's own two class means with it; else, or where there is no such sample or no
    direction, they are NaN.
    """

    ridges: Float64
    directions: Float64
    offset: Float64
    harm_cosine: Float64
    contrast_cosine: Float64


def solve_paths(
    activations: Any,
    jobs: Sequence[tuple[DirectionEstimator, Labels]],
    *,
    ridges: npt.ArrayLike | None = None,
    distributed: bool = False,
) -> list[RidgePath]:
    """The path of each estimator under its own `Labels` of the same samples; see `estimators.fit_paths`."""
    count, n_layers, width = check_activations(activations)
    local = jobs[0][1].local
    if local.stop - local.start != count:
        raise InputError(
            f"{count} samples of activations and {local.stop - local.start} of confidence: one confidence "
            "for each sample is needed"
        )
    grid = None if ridges is None else check_ridges(ridges)
    classes = [estimator.classes(labels) for estimator, labels in jobs]
    # Equal weight vectors are one class: its mean and its factorisation are computed once.
    keys = [{name: weights.tobytes() for name, weights in named.items()} for named in classes]
    distinct = {key: named[name] for named, k in zip(classes, keys, strict=True) for name, key in k.items()}
    stacked = np.stack([weights[local] for weights in distinct.values()])
    # Estimators in the order of their covariance, so that one factorisation is held at a time.
    systems: dict[bytes | None, list[int]] = {}
    for index, (estimator, _) in enumerate(jobs):
        systems.setdefault(keys[index]["answered"] if estimator.uses_covariance else None, []).append(index)

    paths = [_empty_path(1 if grid is None else len(grid), n_layers, width) for _ in jobs]
    # One BLAS thread: the order of its sums, and with it the last bits, would follow the thread count.
    with threadpool_limits(1):
        for layer in range(n_layers):
            rows, _ = layer_means(activations, layer, stacked, distributed=distributed)
            mean_of = dict(zip(distinct, rows, strict=True))
            for key, members in systems.items():
                system: RidgeSystem | None = None
                if key is not None:
                    system = layer_system(activations, layer, distinct[key], local, distributed=distributed)
                for index in members:
                    estimator = jobs[index][0]
                    # A class without weight has no mean.
                    means = {
                        name: mean_of[k] for name, k in keys[index].items() if classes[index][name].any()
                    }
                    means.setdefault("offset", (means["refused"] + means["answered"]) / 2)
                    absolute = np.zeros(len(paths[index].ridges))
                    if system is not None and key is not None:
                        absolute = _absolute(estimator, grid, system, functools.partial(
                            shrinkage_ridge, system=system, activations=activations, layer=layer,
                            weights=distinct[key], local=local, distributed=distributed,
                        ))  # fmt: skip
                    _fill(paths[index], layer, estimator, means, system, absolute)
                # Freed before the next one, or the next layer, is read: it is as large as a layer.
                system = None
    for (estimator, _), path in zip(jobs, paths, strict=True):
        if not path.directions.any():
            raise InputError(
                f"{estimator.name} has no direction at any layer: its classes have the same mean, or differ "
                "only in what it must not respond to; check that the activations vary"
            )
    return paths


def _empty_path(count: int, n_layers: int, width: int) -> RidgePath:
    return RidgePath(
        np.zeros((count, n_layers)),
        np.zeros((count, n_layers, width)),
        np.empty((n_layers, width)),
        np.full((count, n_layers), np.nan),
        np.full(n_layers, np.nan),
    )


def _absolute(
    estimator: DirectionEstimator,
    grid: Float64 | None,
    system: RidgeSystem,
    shrinkage: Callable[[str], float],
) -> Float64:
    """Absolute ridges: of the grid, or the estimator's own, which `shrinkage` finds where it is a name."""
    wanted = estimator.ridge if grid is None else grid
    if isinstance(wanted, str):
        return np.atleast_1d(shrinkage(wanted) * estimator.ridge_unit(system))
    unit = estimator.ridge_unit(system) if estimator.ridge_scale == "relative" else 1.0
    return np.atleast_1d(np.asarray(wanted)) * unit


def _fill(
    path: RidgePath,
    layer: int,
    estimator: DirectionEstimator,
    means: dict[str, Float64],
    system: RidgeSystem | None,
    ridges: Float64,
) -> None:
    """One layer of a path: directions to unit length, offset, cosines with the harmful contrast."""
    path.offset[layer] = means["offset"]
    difference = means["refused"] - means["answered"]
    size = np.linalg.norm(difference)
    if size <= ROUNDING * np.linalg.norm(means["answered"]):
        return
    directions = estimator.direct(means, system, ridges)
    lengths = np.linalg.norm(directions, axis=1)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        return
    path.ridges[:, layer] = ridges
    path.directions[:, layer] = directions / lengths[:, None]
    if "harmful" in means and "benign" in means:
        harm = means["harmful"] - means["benign"]
        harm_size = np.linalg.norm(harm)
        if harm_size > 0:
            path.harm_cosine[:, layer] = path.directions[:, layer] @ harm / harm_size
            path.contrast_cosine[layer] = difference @ harm / (harm_size * size)
