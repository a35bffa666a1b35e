"""Layer scores, weights and calibration against loops; ridge selection against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rs_gguf.activations import scores
from rs_gguf.activations.projection import project, project_statistics
from rs_gguf.activations.scores import (
    band_profile,
    calibration_scales,
    layer_auroc,
    layer_scores,
    scales_of,
    score_bands,
    scores_of,
)
from rs_gguf.errors import InputError
from rs_gguf.estimators.constrained import SafeRidge
from rs_gguf.estimators.estimator import (
    DirectionEstimator,
    MeanDifference,
    RidgeMeanDifference,
)
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.validation import choose_ridge


def sample(n: int = 200, n_layers: int = 5, seed: int = 0) -> tuple[Float64, Float64]:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(-1, 1, n)
    return confidence[:, None] * np.linspace(0, 2, n_layers) + rng.normal(size=(n, n_layers)), confidence


def test_layer_scores_equal_the_formula() -> None:
    p, c = sample()
    scores = layer_scores(p.astype(np.float32), c)
    for layer, column in enumerate(p.astype(np.float32).astype(np.float64).T):
        wrong = np.sign(column) != np.sign(c)
        rmse = math.sqrt(((column[wrong] - c[wrong]) ** 2).mean())
        assert scores[layer] == pytest.approx(np.corrcoef(column, c)[0, 1] - rmse, abs=1e-12)
    assert scores.dtype == np.float64


def test_layer_scores_at_the_edges() -> None:
    c = np.array([-1.0, -0.5, 0.5, 1.0])
    np.testing.assert_allclose(layer_scores(np.column_stack([c, -c]), c), [1, -1 - math.sqrt(2.5)])
    np.testing.assert_allclose(layer_scores(np.full((4, 1), 0.1), c), [-math.sqrt((1.1**2 + 0.6**2) / 2)])
    np.testing.assert_allclose(layer_scores(c[:, None], np.full(4, 0.5)), [-math.sqrt((1.5**2 + 1) / 2)])
    with pytest.raises(InputError, match="layer 1"):
        layer_scores(np.array([[0.0, np.nan]]), [1.0])
    with pytest.raises(InputError, match=r"\[samples, layers\]"):
        layer_scores(np.zeros((3, 2)), [1.0])
    with pytest.raises(InputError, match="confidence holds NaN"):
        layer_scores(np.zeros((1, 2)), [np.nan])


def test_auroc_equals_sklearn_with_ties_and_without_neutral_samples() -> None:
    p, c = sample()
    p = np.round(p, 1)
    used = np.abs(c) > 0.3
    for layer, area in enumerate(layer_auroc(p, c, neutral=0.3)):
        assert area == pytest.approx(roc_auc_score(c[used] > 0, p[used, layer]), abs=1e-12)
    with pytest.raises(InputError, match="0 refused"):
        layer_auroc(p, -np.abs(c))


def test_bands_hold_the_score_and_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    p, c = sample(400)
    low, high = score_bands(p, c)
    assert (low < high).all()
    assert ((low < layer_scores(p, c)) & (layer_scores(p, c) < high)).all()
    np.testing.assert_array_equal(score_bands(p, c)[0], low)
    monkeypatch.setattr(scores, "_SEED", 1)
    assert not np.array_equal(score_bands(p, c)[0], low)


def test_a_layer_range_has_weights_and_fits_the_model() -> None:
    np.testing.assert_array_equal(band_profile(6, 2, 4), [0, 0, 1, 1, 1, 0])
    for first, last in ((0, 3), (3, 2), (2, 6)):
        with pytest.raises(InputError, match="layer range"):
            band_profile(6, first, last)


def test_calibration_scales() -> None:
    p, c = sample()
    plus, minus = calibration_scales(p, c)
    for layer in range(5):
        up, down = c > 0, c < 0
        assert plus[layer] == pytest.approx(abs(np.quantile(p[up, layer], 0.95) / np.quantile(c[up], 0.95)))
        assert minus[layer] == pytest.approx(
            abs(np.quantile(p[down, layer], 0.05) / np.quantile(c[down], 0.05))
        )
    plus, minus = calibration_scales(np.zeros((3, 2)), [-1, -0.5, 0])
    np.testing.assert_array_equal([plus, minus], np.ones((2, 2)))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_one_pass_gives_what_the_projections_give(rank: int) -> None:
    rng = np.random.default_rng(rank)
    confidence = rng.uniform(-1, 1, 90)
    h = (rng.normal(size=(90, 3, 33)) + confidence[:, None, None]).astype(np.float16)
    directions, offset = rng.normal(size=(3, rank, 33)), rng.normal(size=(3, 33))
    directions[2, 0] = 0  # projections that are constant
    p = project(h, directions, offset)
    for c in (confidence, np.abs(confidence), np.full(90, 0.5)):
        figures = project_statistics(h, directions, c, offset)
        scores, (plus, minus) = scores_of(figures), scales_of(figures, c)
        for k in range(rank):
            np.testing.assert_allclose(scores[:, k], layer_scores(p[:, :, k], c), rtol=1e-12, atol=1e-12)
            expected = calibration_scales(p[:, :, k], c)
            np.testing.assert_allclose([plus[:, k], minus[:, k]], expected, rtol=1e-12)
            if (c < -0.15).any():
                np.testing.assert_allclose(figures.auroc[:, k], layer_auroc(p[:, :, k], c), atol=1e-12)


# --- ridge selection -------------------------------------------------------------------------------------


def activations_and_confidence(n: int = 40, width: int = 6) -> tuple[Float64, Float64]:
    rng = np.random.default_rng(3)
    confidence = rng.choice([-1, 1], n) * rng.uniform(0.2, 1, n)
    confidence[:3] = 0.05
    activations = rng.normal(size=(n, 2, width)) @ np.diag(np.linspace(0.3, 3, width))
    return activations + confidence[:, None, None] * rng.normal(size=(2, width)), confidence


@pytest.mark.parametrize("kind", [RidgeMeanDifference, SafeRidge])
def test_kfold_scores_equal_refitting_each_fold(kind: type[DirectionEstimator]) -> None:
    """Ridges are compared on the classes of the estimator; for safe ones harmful prompts are in no class."""
    activations, confidence = activations_and_confidence(90, width=30)
    from rs_gguf.estimators.validation import _folds

    kinds = np.tile(["sensitive", "harmful", "benign"], 30)
    side = np.sign(confidence) * (np.abs(confidence) > 0.15)
    if kind is SafeRidge:
        side[(kinds == "harmful") | ((kinds == "benign") & (confidence > 0))] = 0
    choice = choose_ridge(activations, confidence, [3.0, 0.1], kind(), folds=3, seed=5, kinds=kinds)
    np.testing.assert_array_equal(choice.ridges, [0.1, 3.0])
    for index, ridge in enumerate(choice.ridges):
        folds = []
        for part in _folds(side, 3, 5):
            rest = np.setdiff1d(np.arange(len(side)), part)
            v = kind(ridge=ridge).fit(activations[rest], confidence[rest], kinds=kinds[rest]).directions_
            folds.append(layer_auroc(np.einsum("nld,ld->nl", activations[part], v), side[part]))
        np.testing.assert_allclose(choice.scores[index], np.mean(folds, axis=0), atol=1e-10)
    assert choice.best == choice.ridges[np.argmax(choice.scores.mean(axis=1))]


def test_folds_share_out_both_classes() -> None:
    from rs_gguf.estimators.validation import _folds

    side = np.repeat([-1.0, 0.0, 1.0], [50, 10, 11])
    parts = _folds(side, 5, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(71))
    assert {int((side[part] > 0).sum()) for part in parts} == {2, 3}
    assert {int((side[part] < 0).sum()) for part in parts} == {10}


def test_selection_prefers_a_ridge_that_generalises() -> None:
    rng = np.random.default_rng(0)
    confidence = np.tile([-1.0, 1.0], 40)
    # The signal lies in the direction with the least variance, so a very small ridge is best.
    activations = rng.normal(size=(80, 1, 20)) * np.r_[0.1, np.full(19, 5.0)]
    activations[:, 0, 0] += 0.1 * confidence
    choice = choose_ridge(activations, confidence, [1e-4, 1e4], RidgeMeanDifference())
    assert choice.best == 1e-4
    assert choice.scores[0, 0] > choice.scores[1, 0] + 0.1
    noise = rng.normal(size=(80, 1, 120)) * np.geomspace(1, 30, 120)
    tied = choose_ridge(noise + 1e3 * confidence[:, None, None], confidence, [0.1, 1], MeanDifference())
    assert tied.best == 1  # For equal scores the larger ridge wins.


def test_selection_errors() -> None:
    activations, confidence = activations_and_confidence()
    rmd = RidgeMeanDifference()
    with pytest.raises(InputError, match="folds"):
        choose_ridge(activations, confidence, [1], rmd, folds=1)
    with pytest.raises(InputError, match="positive finite"):
        choose_ridge(activations, confidence, [], rmd)
