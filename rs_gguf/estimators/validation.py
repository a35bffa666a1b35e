"""Choose the ridge λ of an estimator by K-fold validation.

Activations [N, L, D], confidence [N] and R ridges go in; scores [R, L] on held-out samples and the best ridge
come out. García-Ferrero et al. (arXiv 2512.16602) fix λ = 0.01. The effect of that value depends
on the model, so it is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_gguf.activations.activations import Activations
from rs_gguf.activations.scores import layer_auroc
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import resolve_device, workers
from rs_gguf.estimators.estimator import DirectionEstimator
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import solve_paths
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.machine import Device, on_all_cores


@dataclass(frozen=True)
class RidgeChoice:
    """The held-out scores of a grid of ridges, and the best ridge.

    ridges: [R], ascending, in the `ridge_scale` of the estimator.
    scores: [R, L], AUROC on held-out samples.
    best: the ridge with the highest mean score over layers; of equal ones the largest, which varies least.
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
    """Score each of `ridges` [R] by the AUROC of held-out projections on the estimator's own classes.

    Raises:
        InputError: as in `fit_paths`, or a class has fewer samples than folds.
    """
    labels = Labels.of(confidence, kinds)
    grid = np.sort(check_ridges(ridges))
    masks = estimator.masks(labels)
    # +1 for refused, −1 for answered samples, 0 for samples outside both classes.
    signs = masks["refused"].astype(np.float64) - masks["answered"]
    samples = Activations.of(activations)
    scores: Float64 = np.mean(
        [
            _fold_scores(samples, labels, held_out, grid, estimator, signs, device)
            for held_out in _folds(signs, folds, seed)
        ],
        axis=0,
    )
    mean = scores.mean(axis=1)
    return RidgeChoice(grid, scores, float(grid[np.flatnonzero(mean >= mean.max() - 1e-12)[-1]]))


def _folds(signs: Float64, folds: int, seed: int) -> list[npt.NDArray[np.intp]]:
    """Return the indices of the held-out samples of each fold; both classes are spread evenly over folds."""
    smallest = int(min((signs > 0).sum(), (signs < 0).sum()))
    if not 2 <= folds <= smallest:
        raise InputError(f"folds = {folds}: 2 to {smallest}, the size of the smaller class, are accepted")
    rng = np.random.default_rng(seed)
    fold = np.empty(len(signs), dtype=np.intp)
    for sign in (-1, 0, 1):
        members = np.flatnonzero(signs == sign)
        fold[rng.permutation(members)] = np.arange(len(members)) % folds
    return [np.flatnonzero(fold == index) for index in range(folds)]


def _fold_scores(
    activations: Activations,
    labels: Labels,
    held_out: npt.NDArray[np.intp],
    grid: Float64,
    estimator: DirectionEstimator,
    signs: Float64,
    device: Device,
) -> Float64:
    """Return the AUROC [R, L] on the `held_out` samples of directions that are fitted on the others."""
    weights = labels.weights.copy()
    weights[held_out] = 0.0
    jobs = [(estimator, labels.reweighted(weights))]
    path = solve_paths(activations, jobs, ridges=grid, device=device)[0]
    members = held_out[signs[held_out] != 0]

    def score(layer: int) -> Float64:
        projections = activations.layer_rows(layer, members).numpy() @ path.directions[:, layer].T
        return layer_auroc(projections, signs[members])

    layers = range(path.directions.shape[1])
    cores = workers(resolve_device(device), path.directions.shape[2])
    return np.stack(list(on_all_cores(score, layers, workers=cores)), axis=1)
