"""The ridge λ chosen by validation: leave-one-out in closed form, or K-fold for any estimator.

Activations [N, L, D], confidence [N] and a grid of ridges enter; held-out projections of every sample, scores
[R, L] and the best ridge leave. García-Ferrero et al. (arXiv 2512.16602) fix λ = 0.01; what that means
depends on the model, so it is measured here. Analytic shrinkage needs no grid: `ridge="oas"` or
`ridge="ledoit-wolf"` in any estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rs_gguf.activations.scores import layer_auroc, layer_margin
from rs_gguf.errors import InputError
from rs_gguf.estimators.estimator import (
    DirectionEstimator,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
)
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.moments import (
    CHUNK_SAMPLES,
    Float64,
    check_activations,
    chunks,
    layer_means,
    read_rows,
)
from rs_gguf.estimators.path import solve_paths
from rs_gguf.estimators.ridge import check_ridges, layer_system

Metric = Literal["auroc", "margin"]
_METRICS: dict[str, Callable[..., Float64]] = {"auroc": layer_auroc, "margin": layer_margin}


@dataclass(frozen=True)
class RidgeChoice:
    """`best` is the ridge with the highest mean score over layers, `best_by_layer` [L] that of each layer.

    `scores` [R, L] belong to `ridges` [R], in the estimator's own `ridge_scale`. Equal scores go to the
    larger ridge, the calmer direction.
    """

    ridges: Float64
    scores: Float64
    best: float
    best_by_layer: Float64


def choose_ridge(
    activations: Any,
    confidence: npt.ArrayLike,
    ridges: npt.ArrayLike,
    estimator: DirectionEstimator,
    *,
    method: Literal["loo", "kfold"] = "kfold",
    metric: Metric = "auroc",
    folds: int = 5,
    seed: int = 0,
    kinds: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
) -> RidgeChoice:
    """Score each of `ridges` [R] on held-out projections, by `layer_auroc` or `layer_margin`.

    The scored classes are the estimator's own (`DirectionEstimator.masks`). "loo" is for RMD and WRMD, one
    factorisation a layer; "kfold" for all, one a fold and layer.
    `InputError` as in `fit_paths`, and for an unknown method or metric.
    """
    if metric not in _METRICS:
        raise InputError(f"metric {metric!r}: {', '.join(_METRICS)} are accepted")
    labels = Labels.of(confidence, kinds, groups)
    grid = np.sort(check_ridges(ridges))
    masks = estimator.masks(labels)
    # +1 and −1 for the estimator's classes, 0 for the samples outside them.
    side = masks["refused"].astype(np.float64) - masks["answered"]
    if method == "loo":
        held_out = leave_one_out(activations, confidence, grid, estimator)
        scores = _scores(held_out, side, metric)
    elif method == "kfold":
        parts = _folds(side, folds, seed)
        scores = np.mean(
            [_fold_scores(activations, labels, part, grid, estimator, side, metric) for part in parts], 0
        )
    else:
        raise InputError(f"method {method!r}: 'loo' or 'kfold' is accepted")

    def best(column: Float64) -> float:
        return float(grid[np.flatnonzero(column >= column.max() - 1e-12)[-1]])

    return RidgeChoice(grid, scores, best(scores.mean(axis=1)), np.array([best(s) for s in scores.T]))


def leave_one_out(
    activations: Any, confidence: npt.ArrayLike, ridges: npt.ArrayLike, estimator: DirectionEstimator
) -> Float64:
    """Projection [R, N, L] of each sample on the direction, and from the answered mean, fitted without it.

    Closed form: leaving sample i out of P moves μ_P only; out of N it moves μ_N and takes a rank-one term
    from Σ_N (Sherman and Morrison). With d = h_i − μ_N, M = Σ_N + λI, g = dᵀM⁻¹(μ_P − μ_N), q = dᵀM⁻¹d and
    γ = w_i over its class's remaining weight: g − γ(q − g) in P, (g + γq)/(1 − γq) in N, g outside both.
    The direction is (Σ + λI)⁻¹δ, not scaled to unit length. λ is that of the whole sample, times W/(W − w_i)
    where one is left out of N: the penalty stays what it was beside the scatter.
    `InputError`: other estimators.
    """
    if not isinstance(estimator, RidgeMeanDifference) or isinstance(
        estimator, UncentredWeightedRidgeMeanDifference
    ):
        raise InputError(f"leave-one-out in closed form is for rmd and wrmd, not {estimator.name}; use kfold")
    count, n_layers, _ = check_activations(activations)
    labels = Labels.of(confidence)
    weights = estimator.classes(labels)
    plus, minus = weights["refused"], weights["answered"]
    grid = check_ridges(ridges)
    if min(np.count_nonzero(plus), np.count_nonzero(minus)) < 2:
        raise InputError("leave-one-out needs two or more samples in each class")
    share = plus / (plus.sum() - plus) + minus / (minus.sum() - minus)
    held_out = np.empty((len(grid), count, n_layers))
    with threadpool_limits(1):
        for layer in range(n_layers):
            (mean_plus, mean_minus), _ = layer_means(activations, layer, np.stack([plus, minus]))
            system = layer_system(activations, layer, minus, labels.local)
            unit = estimator.ridge_unit(system) if estimator.ridge_scale == "relative" else 1.0
            direction = system.solve((mean_plus - mean_minus)[:, None], grid * unit)[:, :, 0]
            for part, rows in chunks(activations, layer):
                rows -= mean_minus
                g, q = direction @ rows.T, system.quadratic(rows.T, grid * unit)
                gamma = share[part]
                out = np.where(plus[part] > 0, g - gamma * (q - g), g)
                out = np.where(minus[part] > 0, (g + gamma * q) / (1 - gamma * q), out)
                held_out[:, part, layer] = out
    return held_out


def _folds(side: Float64, folds: int, seed: int) -> list[npt.NDArray[np.intp]]:
    """Held-out sample indices of each fold, both classes spread evenly over the folds."""
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
    activations: Any,
    labels: Labels,
    part: npt.NDArray[np.intp],
    grid: Float64,
    estimator: DirectionEstimator,
    side: Float64,
    metric: Metric,
) -> Float64:
    """Scores [R, L] on the held-out `part` of directions fitted on the rest."""
    weights = labels.weights.copy()
    weights[part] = 0.0
    path = solve_paths(activations, [(estimator, labels.reweighted(weights))], ridges=grid)[0]
    n_layers = path.directions.shape[1]
    held_out = np.empty((len(grid), len(part), n_layers))
    with threadpool_limits(1):
        for layer in range(n_layers):
            for start in range(0, len(part), CHUNK_SAMPLES):
                rows = read_rows(activations, part[start : start + CHUNK_SAMPLES], layer)
                held_out[:, start : start + len(rows), layer] = path.directions[:, layer] @ rows.T
    return _scores(held_out, side[part], metric)


def _scores(held_out: Float64, side: Float64, metric: Metric) -> Float64:
    return np.stack([_METRICS[metric](projections, side) for projections in held_out])
