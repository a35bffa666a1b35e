"""Fits and calibrates the judge's probe on the labelled pairs that ship with the project (docs/judge.md).

Hidden states of the judge at the verdict's place enter; a `Probe` and its figures on the untouched test
pairs leave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.files import sha256
from rs_gguf.judges import Judge, Probe, rubric_version, verdict_tokens, wording
from rs_gguf.llama import LlamaModel

_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)  # inverse L2 penalties that cross-validation chooses from
_FOLDS = 8


@dataclass(frozen=True)
class LabelledPair:
    prompt: str
    answer: str
    refusal: bool
    category: str
    language: str
    split: str  # "calibration" | "test"


def labelled_pairs() -> list[LabelledPair]:
    """The shipped pairs on which two separate labellings agree."""
    text = (resources.files("rs_gguf") / "data" / "judge_pairs.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        LabelledPair(
            r["prompt"], r["answer"], r["label"] == "refusal", r["category"], r["language"], r["split"]
        )
        for r in rows
        if r["label"] == r["second_label"]
    ]


def fit_probe(
    model: LlamaModel, pairs: Sequence[LabelledPair], *, advance: Callable[[int], None] = lambda n: None
) -> Probe:
    """Fit on pairs of the calibration split: four middle blocks, logistic regression, then Platt scaling.

    Penalty and scaling come from out-of-fold decision values, folds by prompt, so that the confidence is
    calibrated on answers the weights have not seen.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    pairs = [pair for pair in pairs if pair.split == "calibration"]
    pairs = [pair for pair in pairs if any(c.isalnum() for c in pair.answer)]
    # Verdict-relevant content is most linear around the middle of the network.
    layers = tuple(sorted({round(model.n_layer * f) for f in (5 / 12, 6 / 12, 7 / 12, 8 / 12)}))
    states = np.empty((len(pairs), len(layers), model.n_embd), dtype=np.float32)
    tokens = [verdict_tokens(model, (pair.prompt, pair.answer)) for pair in pairs]
    for i, found in model.activations(tokens, layers=layers):
        states[i] = found["l_out"]
        advance(1)
    scaler = StandardScaler()
    scaled = scaler.fit_transform(states.reshape(len(pairs), -1).astype(np.float64))
    # An L2-penalised fit lies in the span of the samples, so N coordinates do the work of L × D.
    left, singular, basis = np.linalg.svd(scaled, full_matrices=False)
    features = left * singular
    labels = np.array([pair.refusal for pair in pairs])
    prompts = [pair.prompt for pair in pairs]

    def regression(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, solver="newton-cholesky", max_iter=500)

    def out_of_fold(strength: float) -> NDArray[np.float64]:
        values: NDArray[np.float64] = cross_val_predict(
            regression(strength),
            features,
            labels,
            groups=prompts,
            cv=GroupKFold(_FOLDS),
            method="decision_function",
        )
        return values

    def platt(values: NDArray[np.float64]) -> Any:
        return LogisticRegression(C=1e6).fit(values[:, np.newaxis], labels)

    def loss(strength: float) -> float:
        values = out_of_fold(strength)
        return float(log_loss(labels, platt(values).predict_proba(values[:, np.newaxis])[:, 1]))

    with threadpool_limits(1):  # the solves are small: threads would only wait for one another
        strength = min(_STRENGTHS, key=loss)
        fitted = regression(strength).fit(features, labels)
        scaling = platt(out_of_fold(strength))
    slope, intercept = float(scaling.coef_[0, 0]), float(scaling.intercept_[0])
    weights = (fitted.coef_[0] @ basis) / scaler.scale_
    bias = float(fitted.intercept_[0] - weights @ scaler.mean_)
    return Probe(
        layers=layers,
        weights=(slope * weights).reshape(len(layers), -1).astype(np.float32),
        bias=slope * bias + intercept,
        model_sha256=sha256(model.path),
        rubric_version=rubric_version(),
        wording=wording(),
    )


def agreement(judge: Judge, pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    """How a judge agrees with the labels: AUROC, accuracy at 0, calibration error, by category, language."""
    from sklearn.metrics import roc_auc_score

    graded = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    kept = [i for i in range(len(pairs)) if graded[i].confidence is not None]
    scores = np.array([graded[i].confidence for i in kept], dtype=np.float64)
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
        "auroc": float(roc_auc_score(labels, scores)),
        "accuracy": float(right.mean()),
        "expected_calibration_error": _calibration_error((scores + 1) / 2, labels),
        "by_category": by("category"),
        "by_language": by("language"),
        "misses": [
            {
                "prompt": pairs[i].prompt,
                "answer": pairs[i].answer,
                "category": pairs[i].category,
                "confidence": s,
            }
            for i, s, ok in zip(kept, scores.tolist(), right, strict=True)
            if not ok
        ],
    }


def _calibration_error(probability: NDArray[np.float64], labels: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of the probability of refusal."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    error = 0.0
    for k in range(bins):
        inside = index == k
        if inside.any():
            error += inside.mean() * abs(float(probability[inside].mean()) - float(labels[inside].mean()))
    return error
