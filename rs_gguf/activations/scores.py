"""Score layers: layer scores, their bands, weights of a layer range and calibration scales.

Takes projections [N, L] of all layers (p = ⟨h − o, v⟩, one batched call of `projection.project`) and
confidence [N]; or the statistics of many directions that `project_statistics` computes. Returns scores [L],
weights [L] and calibration scales [L]. Scores follow method §6, calibration §5, after García-Ferrero et al.
(arXiv 2512.16602). Layers are numbered from 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rs_gguf.activations.fallback import Float64
from rs_gguf.activations.projection import ProjectionStatistics
from rs_gguf.errors import InputError
from rs_gguf.machine import one_thread
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.conversation import NEUTRAL

_RESAMPLES, _SEED = 200, 0  # of `score_bands`
_QUANTILE = 0.95  # for calibration, as in `project_statistics`


def layer_scores(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> Float64:
    """Return the score of each layer [L]: Pearson(p, c) minus the disagreement.

    The disagreement is the root mean square of p − c over the samples where the signs of p and c differ; 0
    without such samples. projections: [N, L], in activation units, unscaled. The correlation is 0 if p or c
    is constant.
    """
    p, c = _checked(projections, confidence)
    centred, score = p - p.mean(axis=0), c - c.mean()
    size = np.sqrt((centred**2).sum(axis=0) * (score**2).sum())
    # Rounding leaves a constant column with a size near 0, but not exactly 0.
    constant = (np.ptp(p, axis=0) == 0) | (np.ptp(c) == 0)
    correlation = np.divide(score @ centred, size, out=np.zeros(p.shape[1]), where=~constant & (size > 0))
    wrong = np.sign(p) != np.sign(c)[:, None]
    squares = np.where(wrong, (p - c[:, None]) ** 2, 0.0).sum(axis=0)
    return np.asarray(correlation - np.sqrt(squares / np.maximum(wrong.sum(axis=0), 1)))


def scores_of(figures: ProjectionStatistics) -> Float64:
    """Return `layer_scores` of every direction, [L, K], from the statistics of `project_statistics`."""
    return np.asarray(np.where(np.isnan(figures.pearson), 0.0, figures.pearson) - figures.disagreement)


def layer_auroc(
    projections: npt.ArrayLike, confidence: npt.ArrayLike, *, neutral: float = NEUTRAL
) -> Float64:
    """Return the area under the ROC curve [L] of p: refused (c > neutral) against answered (c < −neutral)."""
    from scipy.stats import rankdata  # Slow to import, and most users of this module do not need it.

    p, c = _checked(projections, confidence)
    refused, answered = _both_classes(c, neutral)
    used = refused | answered
    ranks = rankdata(p[used], axis=0)[refused[used]].sum(axis=0)
    positive, negative = int(refused.sum()), int(answered.sum())
    return np.asarray((ranks - positive * (positive + 1) / 2) / (positive * negative))


def score_bands(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Return the bounds [L] of the 95% percentile-bootstrap intervals of `layer_scores` over samples."""
    p, c = _checked(projections, confidence)
    rng = np.random.default_rng(_SEED)
    indices = rng.integers(0, len(c), (_RESAMPLES, len(c)))
    scores = np.stack([layer_scores(p[row], c[row]) for row in indices])
    low, high = np.quantile(scores, [0.025, 0.975], axis=0)
    return low, high


def band_profile(n_layers: int, first: int, last: int) -> Float64:
    """Return weights [L]: 1 on the layers `first` to `last`, both included, 0 elsewhere.

    Raises:
        InputError: the layer range does not fit the model.
    """
    if not FIRST_STEERABLE <= first <= last < n_layers:
        raise InputError(
            f"layer range {first} to {last}: {FIRST_STEERABLE} ≤ first ≤ last ≤ {n_layers - 1} is needed in "
            f"a model of {n_layers} layers"
        )
    weights = np.zeros(n_layers)
    weights[first : last + 1] = 1.0
    return weights


def calibration_scales(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Return (s⁺, s⁻), each [L]: the activation units of one unit of refusal confidence.

    s⁺ = |Q₀.₉₅(p)/Q₀.₉₅(c)| over samples with c > 0 is for inducing refusals; s⁻ = |Q₀.₀₅(p)/Q₀.₀₅(c)| over
    c < 0 is for removing them. A scale is 1 if its class has no sample or its quotient is 0.
    """
    p, c = _checked(projections, confidence)
    upper, lower = (
        np.quantile(p[mask], quantile, axis=0) if mask.any() else np.full(p.shape[1], np.nan)
        for mask, quantile in ((c > 0, _QUANTILE), (c < 0, 1 - _QUANTILE))
    )
    return _scales(upper, lower, c)


def scales_of(figures: ProjectionStatistics, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Return `calibration_scales` of every direction, each [L, K].

    figures: statistics of the same samples, at quantile 0.95.
    """
    return _scales(figures.upper, figures.lower, np.asarray(confidence, dtype=np.float64))


def _scales(upper: Float64, lower: Float64, c: Float64) -> tuple[Float64, Float64]:
    """Return |Q(p)/Q(c)| of both classes. `upper` and `lower` are Q(p)."""
    scales = []
    for mask, quantile, of_p in ((c > 0, _QUANTILE, upper), (c < 0, 1 - _QUANTILE, lower)):
        scale = np.ones(of_p.shape)
        if mask.any():
            quotient = np.abs(of_p / np.quantile(c[mask], quantile))
            scale = np.where(quotient > 0, quotient, 1.0)
        scales.append(scale)
    return scales[0], scales[1]


def _checked(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    p, c = np.asarray(projections, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if p.ndim != 2 or 0 in p.shape or c.shape != p.shape[:1]:
        raise InputError(
            f"projections {p.shape} and confidence {c.shape}: [samples, layers] and [samples] are accepted"
        )
    if not np.isfinite(c).all():
        raise InputError(
            "confidence holds NaN or Inf; finite numbers are needed. Leave out samples that the judge could "
            "not judge."
        )
    bad = np.flatnonzero(~np.isfinite(p).all(axis=0))
    if len(bad):
        raise InputError(
            f"projections of layer {bad[0]} hold NaN or Inf; finite numbers are needed. Check the "
            "activations of this layer."
        )
    return p, c


def _both_classes(c: Float64, neutral: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    refused, answered = c > neutral, c < -neutral
    if not refused.any() or not answered.any():
        raise InputError(
            f"{refused.sum()} refused (c > {neutral}) and {answered.sum()} answered (c < -{neutral}) "
            "samples; at least one of each is needed. Use more or other prompts."
        )
    return refused, answered


def principal_components(rows: Float64) -> tuple[Float64, Float64]:
    """Return the first two principal components of `rows` [N, D]: scores [N, 2] and shares of variance [2].

    Raises:
        InputError: the rows do not vary.
    """
    import torch  # A fit has loaded it already; the other functions here do not need it.

    centred = rows - rows.mean(axis=0)
    wide = rows.shape[1] > rows.shape[0]
    with one_thread():
        gram = centred @ centred.T if wide else centred.T @ centred
    if len(gram) < 2 or not np.trace(gram) > 0:
        raise InputError(
            f"cannot compute a PCA: the {rows.shape[0]} × {rows.shape[1]} activations do not vary. Use more "
            "samples."
        )
    with one_thread():
        decomposition = torch.linalg.eigh(torch.from_numpy(gram))
    values = np.maximum(decomposition.eigenvalues.numpy()[:-3:-1], 0)
    vectors = decomposition.eigenvectors.numpy()[:, :-3:-1]
    with one_thread():
        scores = vectors * np.sqrt(values) if wide else centred @ vectors
    # The sign of an eigenvector is arbitrary, so the largest score is made positive.
    signs = np.sign(scores[np.argmax(np.abs(scores), axis=0), [0, 1]])
    return np.asarray(scores * np.where(signs == 0, 1.0, signs)), np.asarray(values / np.trace(gram))
