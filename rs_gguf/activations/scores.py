"""Which layers to steer, and how strongly each: scores, choice, profiles, calibration.

Projections [N, L] of all layers (p = ⟨h − o, v⟩, one batched call of `projection.project`) and
confidence [N] enter, or what `project_statistics` found of many directions at once; scores [L], layer
indices, weights [L] and calibration scales [L] leave. Scores and choice are those of method §6, calibration
of §5, after García-Ferrero et al. (arXiv 2512.16602). A layer is the 0-based block index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_gguf.activations.fallback import Float64
from rs_gguf.activations.projection import ProjectionStatistics
from rs_gguf.errors import InputError
from rs_gguf.machine import one_thread
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.conversation import NEUTRAL

_HIGH = 0.95  # quantile of calibration, project_statistics' own


def layer_scores(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> Float64:
    """Pearson(p, c) less the root mean square of p − c over the samples whose signs of p and c differ: [L].

    projections: [N, L], in activation units, as they are. A layer whose p, or a set whose c, is constant has
    the correlation 0; without a sample of differing sign there is nothing to subtract.
    """
    p, c = _checked(projections, confidence)
    centred, score = p - p.mean(axis=0), c - c.mean()
    size = np.sqrt((centred**2).sum(axis=0) * (score**2).sum())
    # Rounding leaves a constant column with a size near, but not at, zero.
    constant = (np.ptp(p, axis=0) == 0) | (np.ptp(c) == 0)
    correlation = np.divide(score @ centred, size, out=np.zeros(p.shape[1]), where=~constant & (size > 0))
    wrong = np.sign(p) != np.sign(c)[:, None]
    squares = np.where(wrong, (p - c[:, None]) ** 2, 0.0).sum(axis=0)
    return np.asarray(correlation - np.sqrt(squares / np.maximum(wrong.sum(axis=0), 1)))


def scores_of(figures: ProjectionStatistics) -> Float64:
    """`layer_scores` of every direction, [L, K], from what one pass over the activations found."""
    return np.asarray(np.where(np.isnan(figures.pearson), 0.0, figures.pearson) - figures.disagreement)


def layer_auroc(
    projections: npt.ArrayLike, confidence: npt.ArrayLike, *, neutral: float = NEUTRAL
) -> Float64:
    """Area under the ROC curve of p for refused (c > neutral) against answered (c < −neutral): [L]."""
    from scipy.stats import rankdata  # slow to import, and most users of this module need none of it

    p, c = _checked(projections, confidence)
    refused, answered = _both_classes(c, neutral)
    used = refused | answered
    ranks = rankdata(p[used], axis=0)[refused[used]].sum(axis=0)
    positive, negative = int(refused.sum()), int(answered.sum())
    return np.asarray((ranks - positive * (positive + 1) / 2) / (positive * negative))


def score_bands(
    projections: npt.ArrayLike,
    confidence: npt.ArrayLike,
    score: Callable[[Any, Any], Float64] = layer_scores,
    *,
    seed: int = 0,
    resamples: int = 200,
    level: float = 0.95,
) -> tuple[Float64, Float64]:
    """Lower and upper bound [L] of the percentile-bootstrap interval of `score`, over resampled samples."""
    p, c = _checked(projections, confidence)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(c), (resamples, len(c)))
    draws = np.stack([score(p[pick], c[pick]) for pick in picks])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def choose_layers(scores: npt.ArrayLike, k: int, *, drop_deepest: float = 0.05) -> list[int]:
    """The `k` best-scoring layers in ascending order; ties go to the shallower layer.

    scores: [L]. The deepest `drop_deepest` of the layers, at least one unless it is 0, and block 0 are out.
    `InputError` when fewer than `k` layers are left.
    """
    values = _finite_scores(scores)
    if not 0 <= drop_deepest < 1:
        raise InputError(f"drop_deepest {drop_deepest!r}: a share from 0 to below 1 is accepted")
    dropped = max(1, int(len(values) * drop_deepest)) if drop_deepest > 0 else 0
    usable = np.arange(FIRST_STEERABLE, len(values) - dropped)
    if not 1 <= k <= len(usable):
        raise InputError(f"k = {k}: 1 to {len(usable)} of this model's {len(values)} layers can be chosen")
    order = np.argsort(-values[usable], kind="stable")
    return sorted(int(layer) for layer in usable[order[:k]])


def flat_profile(scores: npt.ArrayLike, k: int, *, drop_deepest: float = 0.05) -> Float64:
    """Weight 1 on the layers of `choose_layers`, 0 elsewhere: [L]."""
    weights = np.zeros(len(_finite_scores(scores)))
    weights[choose_layers(scores, k, drop_deepest=drop_deepest)] = 1.0
    return weights


def band_profile(n_layers: int, first: int, last: int) -> Float64:
    """Weight 1 on the blocks `first` to `last`, both included, 0 elsewhere: [L]."""
    if not FIRST_STEERABLE <= first <= last < n_layers:
        raise InputError(
            f"band {first} to {last}: {FIRST_STEERABLE} ≤ first ≤ last ≤ {n_layers - 1} is needed in a "
            f"model of {n_layers} blocks"
        )
    weights = np.zeros(n_layers)
    weights[first : last + 1] = 1.0
    return weights


def calibration_scales(projections: npt.ArrayLike, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    """(s⁺, s⁻), each [L]: activation units for one unit of refusal confidence, to induce and to remove it.

    s⁺ = |Q₀.₉₅(p)/Q₀.₉₅(c)| over samples with c > 0, s⁻ = |Q₀.₀₅(p)/Q₀.₀₅(c)| over c < 0. 1 where a side has
    no sample or its quotient is 0.
    """
    p, c = _checked(projections, confidence)
    upper, lower = (
        np.quantile(p[side], quantile, axis=0) if side.any() else np.full(p.shape[1], np.nan)
        for side, quantile in ((c > 0, _HIGH), (c < 0, 1 - _HIGH))
    )
    return _scales(upper, lower, c)


def scales_of(figures: ProjectionStatistics, confidence: npt.ArrayLike) -> tuple[Float64, Float64]:
    """`calibration_scales` of every direction, each [L, K]. figures: of these samples, at quantile 0.95."""
    return _scales(figures.upper, figures.lower, np.asarray(confidence, dtype=np.float64))


def _scales(upper: Float64, lower: Float64, c: Float64) -> tuple[Float64, Float64]:
    """|Q(p)/Q(c)| of both sides, where Q(p) is `upper` and `lower`."""
    scales = []
    for side, quantile, of_p in ((c > 0, _HIGH, upper), (c < 0, 1 - _HIGH, lower)):
        scale = np.ones(of_p.shape)
        if side.any():
            quotient = np.abs(of_p / np.quantile(c[side], quantile))
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
        raise InputError("confidence holds NaN or Inf; leave out samples that the judge could not score")
    bad = np.flatnonzero(~np.isfinite(p).all(axis=0))
    if len(bad):
        raise InputError(f"projections of layer {bad[0]} hold NaN or Inf; check its activations")
    return p, c


def _both_classes(c: Float64, neutral: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    refused, answered = c > neutral, c < -neutral
    if not refused.any() or not answered.any():
        raise InputError(
            f"{refused.sum()} refused (c > {neutral}) and {answered.sum()} answered (c < -{neutral}): at "
            "least one sample of each is needed"
        )
    return refused, answered


def _finite_scores(scores: npt.ArrayLike) -> Float64:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"scores of shape {values.shape}: one finite number a layer is accepted")
    return values


def principal_components(rows: Float64) -> tuple[Float64, Float64]:
    """Scores [N, 2] and shares of variance [2] of `rows` [N, D], from the smaller Gram matrix.

    Raises:
        InputError: the rows do not vary.
    """
    import torch  # of a fit, which has it loaded; scores alone need none

    centred = rows - rows.mean(axis=0)
    wide = rows.shape[1] > rows.shape[0]
    with one_thread():
        gram = centred @ centred.T if wide else centred.T @ centred
    if len(gram) < 2 or not np.trace(gram) > 0:
        raise InputError(
            f"a PCA of {rows.shape[0]} × {rows.shape[1]} activations that do not vary cannot be drawn"
        )
    with one_thread():
        found = torch.linalg.eigh(torch.from_numpy(gram))
    values = np.maximum(found.eigenvalues.numpy()[:-3:-1], 0)
    vectors = found.eigenvectors.numpy()[:, :-3:-1]
    with one_thread():
        scores = vectors * np.sqrt(values) if wide else centred @ vectors
    # Eigenvectors have no sign of their own; the largest score is made positive.
    signs = np.sign(scores[np.argmax(np.abs(scores), axis=0), [0, 1]])
    return np.asarray(scores * np.where(signs == 0, 1.0, signs)), np.asarray(values / np.trace(gram))
