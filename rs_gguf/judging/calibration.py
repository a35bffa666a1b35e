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

from rs_gguf.files import sha256
from rs_gguf.judging.judgement import Judge, by_rule
from rs_gguf.judging.probe import Kinds, Probe, read_states
from rs_gguf.judging.rubric import rubric_version, wording
from rs_gguf.llama import LlamaModel
from rs_gguf.moments import Float64

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
    model: LlamaModel, pairs: Sequence[LabelledPair], *, advance: Callable[[int], None] = lambda n: None
) -> Probe:
    """Fit on pairs of the calibration split: four middle blocks, logistic regression, then Platt scaling.

    Penalty and scaling come from out-of-fold decision values, folds by prompt, so that the confidence is
    calibrated on answers the weights have not seen. A second regression, over refusals alone, tells the kind.
    """
    from threadpoolctl import threadpool_limits

    pairs = [pair for pair in pairs if pair.split == "calibration"]
    pairs = [pair for pair in pairs if by_rule(pair.prompt, pair.answer) is None]
    # Verdict-relevant content is most linear around the middle of the network.
    layers = tuple(sorted({round(model.n_layer * f) for f in (5 / 12, 6 / 12, 7 / 12, 8 / 12)}))
    states = np.empty((len(pairs), 2, len(layers), model.n_embd), dtype=np.float32)
    for i, found in read_states(model, [(pair.prompt, pair.answer) for pair in pairs], layers):
        states[i] = found
        advance(1)
    features, in_states = compressed(states)
    prompts = np.array([pair.prompt for pair in pairs])
    refusal = np.array([pair.refusal for pair in pairs])
    kinds = np.array([pair.category for pair in pairs])[refusal]
    with threadpool_limits(1):  # the solves are small: threads would only wait for one another
        strength, values = cross_validated(features, refusal, prompts)
        verdict, scaling = _regression(strength).fit(features, refusal), platt(values, refusal)
        kind = _fit_kinds(features[refusal], kinds, prompts[refusal])
    slope, intercept = float(scaling.coef_[0, 0]), float(scaling.intercept_[0])
    weights, bias = in_states(verdict.coef_, verdict.intercept_)
    kind_weights, kind_bias = in_states(kind.coef_, kind.intercept_)
    return Probe(
        layers=layers,
        weights=(slope * weights[0]).astype(np.float32),
        bias=float(slope * bias[0] + intercept),
        model_sha256=sha256(model.path),
        rubric_version=rubric_version(),
        wording=wording(),
        kinds=Kinds(
            tuple(map(str, kind.classes_)), kind_weights.astype(np.float32), kind_bias.astype(np.float32)
        ),
    )


def compressed(
    states: NDArray[np.float32],
) -> tuple[Float64, Callable[[Float64, Float64], tuple[Float64, Float64]]]:
    """States [N, …] as standardised features [N, N], and what turns weights on these into weights on states.

    An L2-penalised fit lies in the span of the samples, so N coordinates do the work of all.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    scaled = scaler.fit_transform(states.reshape(len(states), -1).astype(np.float64))
    left, singular, basis = np.linalg.svd(scaled, full_matrices=False)

    def in_states(weights: Float64, bias: Float64) -> tuple[Float64, Float64]:
        """Weights [K, …] and biases [K] on states, from weights [K, N] and biases [K] on features."""
        flat = (weights @ basis) / scaler.scale_
        return flat.reshape(len(flat), *states.shape[1:]), bias - flat @ scaler.mean_

    return left * singular, in_states


def cross_validated(
    features: Float64, refusal: NDArray[np.bool_], prompts: NDArray[np.str_]
) -> tuple[float, Float64]:
    """The inverse penalty of least log loss, and the decision values [N] that it gives to pairs left out.

    Folds are by prompt. The log loss is that of the values after Platt scaling.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict

    def out_of_fold(strength: float) -> Float64:
        values: Float64 = cross_val_predict(
            _regression(strength), features, refusal, groups=prompts, cv=GroupKFold(_FOLDS),
            method="decision_function",
        )  # fmt: skip
        return values

    def loss(values: Float64) -> float:
        return float(log_loss(refusal, platt(values, refusal).predict_proba(values[:, np.newaxis])[:, 1]))

    values = {strength: out_of_fold(strength) for strength in _STRENGTHS}
    best = min(values, key=lambda strength: loss(values[strength]))
    return best, values[best]


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, solver="newton-cholesky", max_iter=500)


def platt(values: Float64, refusal: NDArray[np.bool_]) -> Any:
    """The scaling of decision values [N] to probabilities: logistic regression on them alone."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1e6).fit(values[:, np.newaxis], refusal)


def _fit_kinds(features: Float64, kinds: NDArray[np.str_], prompts: NDArray[np.str_]) -> Any:
    """The softmax regression of the kind of refusal on features [N, F]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict

    def regression(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=2000)

    def loss(strength: float) -> float:
        shares = cross_val_predict(
            regression(strength), features, kinds, groups=prompts, cv=GroupKFold(_FOLDS),
            method="predict_proba",
        )  # fmt: skip
        return float(log_loss(kinds, shares, labels=np.unique(kinds)))

    return regression(min(_STRENGTHS, key=loss)).fit(features, kinds)


def agreement(judge: Judge, pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    """How a judge agrees with the labels: AUROC, accuracy at 0, calibration error, by category, language."""
    from sklearn.metrics import roc_auc_score

    graded = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    confidences = [graded[i].confidence for i in range(len(pairs))]
    kept = [i for i, confidence in enumerate(confidences) if confidence is not None]
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
        "auroc": float(roc_auc_score(labels, scores)),
        "accuracy": float(right.mean()),
        "expected_calibration_error": _calibration_error((scores + 1) / 2, labels),
        "kinds": _kinds_told([pairs[i] for i in kept], [graded[i].category for i in kept]),
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


def _kinds_told(pairs: Sequence[LabelledPair], told: Sequence[str | None]) -> dict[str, int]:
    """Of the refusals with a kind told, how many have the right one."""
    named = [(pair.category, kind) for pair, kind in zip(pairs, told, strict=True) if pair.refusal and kind]
    return {
        "refusals": sum(pair.refusal for pair in pairs),
        "told": len(named),
        "right": sum(category == kind for category, kind in named),
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
