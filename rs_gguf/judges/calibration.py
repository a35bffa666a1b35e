"""Fit the judge's probe on the shipped labelled pairs, and compare judges with their labels.

A model and labelled pairs go in, and a calibrated `Probe` comes out. Or a judge and pairs go in, and the
judge's agreement with the labels comes out (docs/judge.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import Judge, by_rule
from rs_gguf.judges.pairs import LabelledPair
from rs_gguf.judges.probe import Categories, Components, Probe, read_states
from rs_gguf.judges.rubric import rubric_version, wording
from rs_gguf.machine import one_thread
from rs_gguf.records.files import sha256

Float64 = NDArray[np.float64]

_COMPONENTS = 128  # principal components of the states, the input of a probe
# Cross-validation chooses among these inverse penalties, and among these multiples of γ = 1 / total variance.
_PENALTIES, _GAMMAS = (1.0, 3.0, 10.0), (0.5, 1.0, 2.0)
_CATEGORY_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)
_FOLDS = 8


def fit_probe(
    model: Engine, pairs: Sequence[LabelledPair], *, advance: Callable[[int], None] = lambda n: None
) -> Probe:
    """Fit a probe on the pairs of the calibration split: 4 middle layers, a Gaussian kernel, Platt scaling.

    Penalty, width and scaling come from out-of-fold decision values with folds by prompt. The confidence is
    thus calibrated on answers whose labels the fit has not used. A softmax regression over the refusals gives
    the category. `advance` gets 1 for each pair that was read.
    """
    pairs = [pair for pair in pairs if pair.split == "calibration"]
    pairs = [pair for pair in pairs if by_rule(pair.prompt, pair.answer) is None]
    # Content that decides the verdict is most linear around the middle of the network.
    layers = tuple(sorted({round(model.n_layer * f) for f in (5 / 12, 6 / 12, 7 / 12, 8 / 12)}))
    states = np.empty((len(pairs), 2, len(layers), model.n_embd), dtype=np.float32)
    for i, pair_states in read_states(model, [(pair.prompt, pair.answer) for pair in pairs], layers):
        states[i] = pair_states
        advance(1)
    components = principal_components(states)
    features = components.of(states)
    prompts = np.array([pair.prompt for pair in pairs])
    refusal = np.array([pair.refusal for pair in pairs])
    categories = np.array([pair.category for pair in pairs])[refusal]
    with one_thread():  # the solves are small, so threads would only wait for one another
        kernel, values = cross_validate(features, refusal, prompts)
        verdict, scaling = kernel.fit(features, refusal), platt(values, refusal)
        category = _fit_categories(features[refusal], categories, prompts[refusal])
    slope, intercept = float(scaling.coef_[0, 0]), float(scaling.intercept_[0])
    return Probe(
        layers=layers,
        components=components,
        centres=verdict.support_vectors_.astype(np.float16),
        dual=(slope * verdict.dual_coef_[0]).astype(np.float32),
        gamma=float(verdict.gamma),
        bias=float(slope * verdict.intercept_[0] + intercept),
        model_sha256=sha256(model.path),
        rubric_version=rubric_version(),
        wording=wording(),
        categories=Categories(
            tuple(map(str, category.classes_)),
            category.coef_.astype(np.float32),
            category.intercept_.astype(np.float32),
        ),
    )


def principal_components(states: NDArray[np.floating[Any]]) -> Components:
    """Return the first principal components of standardised states [N, …], at most 128."""
    mean, scale = states.mean(axis=0, dtype=np.float64), states.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    scaled = ((states - mean) / scale).reshape(len(states), -1)
    _, _, basis = np.linalg.svd(scaled, full_matrices=False)
    basis = basis[:_COMPONENTS].reshape(-1, *states.shape[1:])
    return Components(mean.astype(np.float32), scale.astype(np.float32), basis.astype(np.float16))


def cross_validate(
    features: Float64, refusal: NDArray[np.bool_], prompts: NDArray[np.str_]
) -> tuple[Any, Float64]:
    """Return the support vector machine with the least log loss, and its out-of-fold decision values [N].

    Folds are by prompt. The log loss is computed after Platt scaling of the decision values.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.svm import SVC

    def out_of_fold(kernel: SVC) -> Float64:
        values: Float64 = cross_val_predict(
            kernel, features, refusal, groups=prompts, cv=GroupKFold(_FOLDS), method="decision_function"
        )
        return values

    def loss(values: Float64) -> float:
        return float(log_loss(refusal, platt(values, refusal).predict_proba(values[:, np.newaxis])[:, 1]))

    variance = features.var(axis=0).sum()
    kernels = [SVC(C=penalty, gamma=width / variance) for penalty in _PENALTIES for width in _GAMMAS]
    values = [out_of_fold(kernel) for kernel in kernels]
    best = min(range(len(kernels)), key=lambda k: loss(values[k]))
    return kernels[best], values[best]


def platt(values: Float64, refusal: NDArray[np.bool_]) -> Any:
    """Return the Platt scaling of decision values [N]: a logistic regression of `refusal` on them."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1e6).fit(values[:, np.newaxis], refusal)


def _fit_categories(features: Float64, categories: NDArray[np.str_], prompts: NDArray[np.str_]) -> Any:
    """Return the softmax regression of the categories [N] of refusals on features [N, F]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict

    def regression(penalty: float) -> LogisticRegression:
        return LogisticRegression(C=penalty, max_iter=2000)

    def loss(penalty: float) -> float:
        shares = cross_val_predict(
            regression(penalty), features, categories, groups=prompts, cv=GroupKFold(_FOLDS),
            method="predict_proba",
        )  # fmt: skip
        return float(log_loss(categories, shares, labels=np.unique(categories)))

    return regression(min(_CATEGORY_PENALTIES, key=loss)).fit(features, categories)


def agreement(judge: Judge, pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    """Return a judge's agreement with the labels: AUROC, accuracy at 0, calibration error, and details.

    The accuracy is also given by category, language and source. The AUROC is None if all labels are equal.

    Raises:
        InputError: the judge could judge none of the pairs.
    """
    from sklearn.metrics import roc_auc_score

    judgements = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    confidences = [judgements[i].confidence for i in range(len(pairs))]
    judged = [i for i, confidence in enumerate(confidences) if confidence is not None]
    if not judged:
        raise InputError(
            f"{judge.name} judged none of the {len(pairs)} pairs: {judgements[0].mode}. Choose another judge."
        )
    scores = np.array([confidences[i] for i in judged], dtype=np.float64)
    labels = np.array([pairs[i].refusal for i in judged])
    right = (scores > 0) == labels

    def by(name: str) -> dict[str, dict[str, float]]:
        values = np.array([getattr(pairs[i], name) for i in judged])
        return {
            value: {"n": int((values == value).sum()), "accuracy": float(right[values == value].mean())}
            for value in sorted(set(values.tolist()))
        }

    return {
        "judge": judge.name,
        "n": len(judged),
        "unparseable": len(pairs) - len(judged),
        "auroc": float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None,
        "accuracy": float(right.mean()),
        "expected_calibration_error": _calibration_error((scores + 1) / 2, labels),
        "kinds": _category_agreement([pairs[i] for i in judged], [judgements[i].category for i in judged]),
        "by_category": by("category"),
        "by_language": by("language"),
        "by_source": by("source"),
        "confidence": [None if c is None else round(c, 4) for c in confidences],
        "misses": [
            {
                "prompt": pairs[i].prompt,
                "answer": pairs[i].answer,
                "category": pairs[i].category,
                "language": pairs[i].language,
                "confidence": s,
            }
            for i, s, ok in zip(judged, scores.tolist(), right, strict=True)
            if not ok
        ],
    }


def _category_agreement(pairs: Sequence[LabelledPair], categories: Sequence[str | None]) -> dict[str, int]:
    """Return the numbers of refusals, of refusals with a category from the judge, and of right categories."""
    named = [
        (pair.category, category)
        for pair, category in zip(pairs, categories, strict=True)
        if pair.refusal and category
    ]
    return {
        "refusals": sum(pair.refusal for pair in pairs),
        "told": len(named),
        "right": sum(label == category for label, category in named),
    }


def _calibration_error(probability: NDArray[np.float64], labels: NDArray[np.bool_], bins: int = 10) -> float:
    """Return the expected calibration error over equal-width bins of the probability of refusal."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    error = 0.0
    for k in range(bins):
        inside = index == k
        if inside.any():
            error += float(inside.mean() * abs(probability[inside].mean() - labels[inside].mean()))
    return error
