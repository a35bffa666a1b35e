"""The ridge λ chosen by K-fold validation, for any estimator.

Activations [N, L, D], confidence [N] and a grid of ridges enter; scores [R, L] on held-out samples and the
best ridge leave. García-Ferrero et al. (arXiv 2512.16602) fix λ = 0.01; what that means depends on the model,
so it is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_gguf.activations.activations import Activations
from rs_gguf.activations.scores import layer_auroc
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import Device, resolve_device, workers
from rs_gguf.estimators.estimator import DirectionEstimator
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import solve_paths
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.machine import on_all_cores


@dataclass(frozen=True)
class RidgeChoice:
    """`best` is the ridge with the highest mean AUROC over layers.

    `scores` [R, L] belong to `ridges` [R], in the estimator's own `ridge_scale`. Equal scores go to the
    larger ridge, the calmer direction.
    """

    ridges: Float64
    scores: Float64
    best: float


def choose_ridge(
    activations: Any,
    confidence: npt.ArrayLike,
    ridges: npt.ArrayLike,
    estimator: DirectionEstimator,
    *,
    folds: int = 5,
    seed: int = 0,
    kinds: npt.ArrayLike | None = None,
    device: Device = "auto",
) -> RidgeChoice:
    """Score each of `ridges` [R] by the AUROC of held-out projections, on the estimator's own classes.

    Raises:
        InputError: as `fit_paths`, or a class with fewer samples than folds.
    """
    labels = Labels.of(confidence, kinds)
    grid = np.sort(check_ridges(ridges))
    masks = estimator.masks(labels)
    # +1 and −1 for the estimator's classes, 0 for the samples outside them.
    side = masks["refused"].astype(np.float64) - masks["answered"]
    samples = Activations.of(activations)
    scores: Float64 = np.mean(
        [
            _fold_scores(samples, labels, part, grid, estimator, side, device)
            for part in _folds(side, folds, seed)
        ],
        axis=0,
    )
    mean = scores.mean(axis=1)
    return RidgeChoice(grid, scores, float(grid[np.flatnonzero(mean >= mean.max() - 1e-12)[-1]]))


def _folds(side: Float64, folds: int, seed: int) -> list[npt.NDArray[np.intp]]:
    """Return the held-out samples of each fold, both classes spread evenly over the folds."""
    smallest = int(min((side > 0).sum(), (side < 0).sum()))
    if not 2 <= folds <= smallest:
        raise InputError(f"folds = {folds}: 2 to {smallest}, the size of the smaller class, are accepted")
    rng = np.random.default_rng(seed)
    fold = np.empty(len(side), dtype=np.intp)
    for value in (-1, 0, 1):
        members = np.flatnonzero(side == value)
        fold[rng.permutation(members)] = np.arange(len(members)) % folds
    return [np.flatnonzero(fold == index) for index in range(folds)]


def _fold_scores(
    activations: Activations,
    labels: Labels,
    part: npt.NDArray[np.intp],
    grid: Float64,
    estimator: DirectionEstimator,
    side: Float64,
    device: Device,
) -> Float64:
    """Return the AUROC [R, L] on the held-out `part` of directions that are fitted on the rest."""
    weights = labels.weights.copy()
    weights[part] = 0.0
    jobs = [(estimator, labels.reweighted(weights))]
    path = solve_paths(activations, jobs, ridges=grid, device=device)[0]
    told = part[side[part] != 0]

    def score(layer: int) -> Float64:
        projections = activations.layer_rows(layer, told).numpy() @ path.directions[:, layer].T
        return layer_auroc(projections, side[told])

    layers = range(path.directions.shape[1])
    cores = workers(resolve_device(device), path.directions.shape[2])
    return np.stack(list(on_all_cores(score, layers, workers=cores)), axis=1)
