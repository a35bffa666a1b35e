"""Fits the judge's probe on the labelled pairs that ship with the project, and compares judges with them.

Hidden states of judged pairs enter and a calibrated `Probe` leaves; a judge enters and its figures on the
untouched test pairs leave (docs/judge.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import Judge, by_rule
from rs_gguf.judges.probe import Categories, Components, Probe, read_states
from rs_gguf.judges.rubric import rubric_version, wording
from rs_gguf.machine import one_thread
from rs_gguf.records.files import sha256

Float64 = NDArray[np.float64]

_COMPONENTS = 128  # principal components of the states that a probe sees
# What cross-validation chooses from: inverse penalties, and γ over one by the variance of what is seen.
_PENALTIES, _GAMMAS = (1.0, 3.0, 10.0), (0.5, 1.0, 2.0)
_CATEGORY_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)
_FOLDS = 8


@dataclass(frozen=True)
class LabelledPair:
    prompt: str
    answer: str
    refusal: bool
    category: str
    language: str
    split: str  # "calibration" | "test"
    source: str  # "written" for the project | "model": an answer of the default model


def labelled_pairs() -> list[LabelledPair]:
    """The shipped pairs on which two separate labellings agree."""
    return [
        LabelledPair(
            r["prompt"],
            r["answer"],
            r["label"] == "refusal",
            r["category"],
            r["language"],
            r["split"],
            r["source"],
        )
        for r in _rows()
        if r["label"] == r["second_label"]
    ]


def _rows() -> list[dict[str, str]]:
    text = (resources.files("rs_gguf") / "data" / "judge_pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def label_agreement() -> dict[str, Any]:
    """How far the two labellings of the shipped pairs, made apart, agree on refusal, answer or unclear."""
    from sklearn.metrics import cohen_kappa_score

    rows = _rows()
    first, second = [row["label"] for row in rows], [row["second_label"] for row in rows]
    contested = sum(a != b for a, b in zip(first, second, strict=True))
    return {
        "pairs": len(rows),
        "contested": contested,
        "cohens_kappa": float(cohen_kappa_score(first, second)),
    }


def fit_probe(
    model: Engine, pairs: Sequence[LabelledPair], *, advance: Callable[[int], None] = lambda n: None
) -> Probe:
    """Fit on pairs of the calibration split: four middle blocks, a Gaussian kernel, then Platt scaling.

    Penalty, width and scaling come from out-of-fold decision values, folds by prompt, so that the confidence
    is calibrated on answers whose labels the fit has not seen. A regression over refusals alone tells the
    category.
    """
    pairs = [pair for pair in pairs if pair.split == "calibration"]
    pairs = [pair for pair in pairs if by_rule(pair.prompt, pair.answer) is None]
    # Verdict-relevant content is most linear around the middle of the network.
    layers = tuple(sorted({round(model.n_layer * f) for f in (5 / 12, 6 / 12, 7 / 12, 8 / 12)}))
    states = np.empty((len(pairs), 2, len(layers), model.n_embd), dtype=np.float32)
    for i, found in read_states(model, [(pair.prompt, pair.answer) for pair in pairs], layers):
        states[i] = found
        advance(1)
    components = principal_components(states)
    features = components.of(states)
    prompts = np.array([pair.prompt for pair in pairs])
    refusal = np.array([pair.refusal for pair in pairs])
    categories = np.array([pair.category for pair in pairs])[refusal]
    with one_thread():  # the solves are small: threads would only wait for one another
        kernel, values = cross_validated(features, refusal, prompts)
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
    """The directions in which states [N, …], standardised, differ most: 128, or as many as there are."""
    mean, scale = states.mean(axis=0, dtype=np.float64), states.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    scaled = ((states - mean) / scale).reshape(len(states), -1)
    _, _, basis = np.linalg.svd(scaled, full_matrices=False)
    basis = basis[:_COMPONENTS].reshape(-1, *states.shape[1:])
    return Components(mean.astype(np.float32), scale.astype(np.float32), basis.astype(np.float16))


def cross_validated(
    features: Float64, refusal: NDArray[np.bool_], prompts: NDArray[np.str_]
) -> tuple[Any, Float64]:
    """The support vector machine of least log loss, and its decision values [N] for pairs left out.

    Folds are by prompt. The log loss is that of the values after Platt scaling.
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
    """The scaling of decision values [N] to probabilities: logistic regression on them alone."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1e6).fit(values[:, np.newaxis], refusal)


def _fit_categories(features: Float64, categories: NDArray[np.str_], prompts: NDArray[np.str_]) -> Any:
    """The softmax regression of the category of refusal on features [N, F]."""
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
    """How a judge agrees with the labels: AUROC, accuracy at 0, calibration error, by category, language.

    Raises:
        InputError: none of the pairs could be judged.
    """
    from sklearn.metrics import roc_auc_score

    graded = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    confidences = [graded[i].confidence for i in range(len(pairs))]
    kept = [i for i, confidence in enumerate(confidences) if confidence is not None]
    if not kept:
        raise InputError(f"{judge.name} judged none of the {len(pairs)} pairs: {graded[0].mode}.")
    scores = np.array([confidences[i] for i in kept], dtype=np.float64)
    labels = np.array([pairs[i].refusal for i in kept])
    right = (scores > 0) == labels

    def by(name: str) -> dict[str, dict[str, float]]:
        values = np.array([getattr(pairs[i], name) for i in kept])
        return {
            value: {"n": int((values == value).sum()), "accuracy": float(right[values == value].mean())}
            for value in sorted(set(values.tolist()))
        }

    return {
        "judge": judge.name,
        "n": len(kept),
        "unparseable": len(pairs) - len(kept),
        "auroc": float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None,
        "accuracy": float(right.mean()),
        "expected_calibration_error": _calibration_error((scores + 1) / 2, labels),
        "kinds": _categories_told([pairs[i] for i in kept], [graded[i].category for i in kept]),
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
            for i, s, ok in zip(kept, scores.tolist(), right, strict=True)
            if not ok
        ],
    }


def _categories_told(pairs: Sequence[LabelledPair], told: Sequence[str | None]) -> dict[str, int]:
    """Of the refusals with a category told, how many have the right one."""
    named = [(pair.category, name) for pair, name in zip(pairs, told, strict=True) if pair.refusal and name]
    return {
        "refusals": sum(pair.refusal for pair in pairs),
        "told": len(named),
        "right": sum(category == name for category, name in named),
    }


def _calibration_error(probability: NDArray[np.float64], labels: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of the probability of refusal."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    error = 0.0
    for k in range(bins):
        inside = index == k
        if inside.any():
            error += float(inside.mean() * abs(probability[inside].mean() - labels[inside].mean()))
    return error
