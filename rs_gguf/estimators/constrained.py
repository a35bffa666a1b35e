"""Directions that answer to sensitive refusals and not to harmful ones.

Activations [N, L, D], confidence [N] and the kind of each sample enter; directions [L, D] leave that separate
refused sensitive from answered prompts while their response to refused harmful minus answered benign prompts
is zero (`SafeRidge`), residualised (`ResidualRidge`) or pushed into the negative class (`ContrastRidge`).
These go beyond García-Ferrero et al. (arXiv 2512.16602), whose search has no term for safety. The closed form
is that of minimum-variance beamforming under linear constraints (Frost 1972) in the metric Σ_N + λI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rs_gguf.errors import InputError
from rs_gguf.estimators.estimator import DirectionEstimator, Means
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import RidgePath, solve_paths
from rs_gguf.estimators.ridge import RidgeSystem

CONSTRAINTS = ("harm", "groups", "benign")

# Of the response to the class difference: what keeps a smaller share of it is rounding. Length would not
# tell, since M⁻¹ magnifies rounding in quiet dimensions.
_ROUNDING = 1e-10


@dataclass(kw_only=True)
class SensitiveRidge(DirectionEstimator):
    """WRMD of sensitive refused minus answered sensitive or benign: what the safe variants start from.

    Harmful prompts are in neither class, answered or refused. `kinds` are required.
    """

    name = "sensitive-wrmd"
    by_confidence = True

    def masks(self, labels: Labels) -> dict[str, Mask]:
        return {
            "refused": labels.kind("sensitive") & labels.refused(self.neutral),
            "answered": ~labels.kind("harmful") & labels.answered(self.neutral),
        }


@dataclass(kw_only=True)
class ContrastRidge(SensitiveRidge):
    """RMD of sensitive refused minus (benign answered ∪ harmful refused), |c|-weighted.

    The covariance of the negative class holds the gap between its two halves, so the ridge metric itself
    makes responding to harm expensive.
    """

    name = "contrast-wrmd"

    def masks(self, labels: Labels) -> dict[str, Mask]:
        benign = labels.kind("benign") & labels.answered(self.neutral)
        harmful = labels.kind("harmful") & labels.refused(self.neutral)
        return {**super().masks(labels), "answered": benign | harmful}


@dataclass(kw_only=True)
class SafeRidge(SensitiveRidge):
    """argmin aᵀ(Σ_N + λI)a + κ‖Hᵀa‖² subject to (μ_P − μ_N)ᵀa = 1; κ → ∞ makes Hᵀa = 0 exactly.

    P, N as in `SensitiveRidge`. The columns of H are what the direction must stay quiet on:

    "harm": mean of refused harmful minus mean of answered benign samples;
    "groups": the same within each group of `groups` (topics, languages, forms, …) with 4 or more refused
        harmful samples; a group without answered benign samples is compared with all of them;
    "benign": mean of answered benign samples minus μ_N, so that general capability is no refusal either.

    penalty: κ > 0, without unit, or infinity for the hard form. Linearly dependent columns are allowed.
    With M = Σ_N + λI and δ = μ_P − μ_N, a ∝ M⁻¹δ − M⁻¹H (HᵀM⁻¹H + I/κ)⁻¹ HᵀM⁻¹δ.
    """

    constraints: Sequence[Literal["harm", "groups", "benign"]] = ("harm",)
    penalty: float = math.inf

    name = "safe-wrmd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.constraints or not set(self.constraints) <= set(CONSTRAINTS):
            raise InputError(
                f"constraints {self.constraints!r}: some of {', '.join(CONSTRAINTS)} are accepted"
            )
        if not self.penalty > 0:
            raise InputError(f"penalty {self.penalty!r}: a positive number or math.inf is accepted")

    def classes(self, labels: Labels) -> dict[str, Float64]:
        weights = _with_harm_contrast(self, super().classes(labels))
        if "groups" in self.constraints:
            harmful, benign = weights["harmful"], weights["benign"]
            for column, names in enumerate(labels.groups.T):
                for group in sorted({str(name) for name in names[harmful > 0]} - {""}):
                    inside = names == group
                    if np.count_nonzero(harmful[inside]) < MIN_SAMPLES:
                        continue
                    quiet = np.where(inside, benign, 0.0)
                    weights[f"harmful {column} {group}"] = np.where(inside, harmful, 0.0)
                    weights[f"benign {column} {group}"] = quiet if quiet.any() else benign
        return weights

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Float64) -> Float64:
        assert system is not None  # uses_covariance
        difference, quiet = means["refused"] - means["answered"], self._quiet(means)
        solved = system.solve(np.column_stack([difference, quiet]), ridges)
        free, pulls = solved[:, :, 0], solved[:, :, 1:]
        metric = quiet.T @ pulls  # HᵀM⁻¹H, one a ridge
        response = free @ quiet  # HᵀM⁻¹δ
        directions = np.empty_like(free)
        for index in range(len(ridges)):
            amount = _solve_symmetric(metric[index], response[index], 1 / self.penalty)
            directions[index] = free[index] - pulls[index] @ amount
        # The harmful contrasts may span the sensitive one.
        directions[directions @ difference < _ROUNDING * (free @ difference)] = 0.0
        return directions

    def _quiet(self, means: Means) -> Float64:
        """H [D, K]."""
        columns = []
        if "harm" in self.constraints:
            columns.append(means["harmful"] - means["benign"])
        if "benign" in self.constraints:
            columns.append(means["benign"] - means["answered"])
        for name in means:
            if name.startswith("harmful "):
                columns.append(means[name] - means[name.replace("harmful", "benign", 1)])
        if not columns:
            raise InputError(
                f"{self.name}: constraints {self.constraints!r} name no group with {MIN_SAMPLES} refused "
                "harmful samples; pass groups=[…], or add 'harm'"
            )
        return np.column_stack(columns)


@dataclass(kw_only=True)
class ResidualRidge(SensitiveRidge):
    """`SensitiveRidge` with what another direction explains of it taken out; see `residualise`.

    against: "benign" is the mean activation of answered benign samples; "harmful" the ridge direction
        (Σ_N + λI)⁻¹(μ_H − μ_B) of refused harmful minus answered benign ones.
    residual_ridge: 0 is the orthogonal projection; larger values take out less.
    """

    against: Literal["benign", "harmful"] = "harmful"
    residual_ridge: float = 0.0

    name = "residual-wrmd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against not in ("benign", "harmful"):
            raise InputError(f"against {self.against!r}: 'benign' or 'harmful' is accepted")

    def classes(self, labels: Labels) -> dict[str, Float64]:
        return _with_harm_contrast(self, super().classes(labels))

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Float64) -> Float64:
        assert system is not None  # uses_covariance
        difference = means["refused"] - means["answered"]
        harm = means["harmful"] - means["benign"]
        solved = system.solve(np.column_stack([difference, harm]), ridges)
        against = solved[:, :, 1] if self.against == "harmful" else np.tile(means["benign"], (len(ridges), 1))
        free = solved[:, :, 0]
        pairs = zip(free, against, strict=True)
        directions = np.stack([residualise(v, other[None], self.residual_ridge) for v, other in pairs])
        # Taking a part away can turn the rest round: keep refused above answered. It can also take all.
        left = directions @ difference
        signs: Float64 = np.where(np.abs(left) < _ROUNDING * (free @ difference), 0.0, np.sign(left))
        return directions * signs[:, None]


def _with_harm_contrast(estimator: DirectionEstimator, weights: dict[str, Float64]) -> dict[str, Float64]:
    """`weights`, checked to hold both sides of the harmful contrast."""
    for kind, verdict in (("harmful", "refused"), ("benign", "answered")):
        if not weights[kind].any():
            raise InputError(
                f"{estimator.name}: no {verdict} sample of kind '{kind}', which it must not respond to; "
                "add some"
            )
    return weights


def residualise(direction: Float64, against: Float64, ridge: float = 0.0) -> Float64:
    """`direction` [D] less its ridge regression on the rows of `against` [K, D].

    v − Ĥᵀ(ĤĤᵀ + ridge·I)⁻¹Ĥv, Ĥ the rows at unit length, so that `ridge` has no unit. 0 leaves what is
    orthogonal to all rows (projection orthogonal to the benign mean, as in norm-preserving ablation).
    """
    if not ridge >= 0:
        raise InputError(f"residual ridge {ridge!r}: a number ≥ 0 is accepted")
    lengths = np.linalg.norm(against, axis=1)
    rows = against[lengths > 0] / lengths[lengths > 0, None]
    explained: Float64 = rows.T @ _solve_symmetric(rows @ rows.T, rows @ direction, ridge)
    return direction - explained


def topic_directions(
    estimator: DirectionEstimator,
    activations: Any,
    confidence: npt.ArrayLike,
    topics: npt.ArrayLike,
    *,
    ridges: npt.ArrayLike | None = None,
    kinds: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
) -> dict[str, RidgePath]:
    """The path of `estimator` for each topic: refused samples of that topic against all answered samples.

    topics: [N] names, '' for none. All topics share one factorisation a layer. Topics without a sample in
    the refused class are left out; the other arguments and the errors are those of `fit_paths`.
    """
    labels = Labels.of(confidence, kinds, groups, sample_weight)
    names = np.asarray(topics, dtype=np.str_)
    if names.shape != labels.confidence.shape:
        raise InputError(f"topics of shape {names.shape}: {len(labels.confidence)} names are accepted")
    pool = estimator.masks(labels)["refused"]
    # Only the refused class is narrowed; harmful samples outside it stay, for the harmful contrast.
    inside = {t: labels.reweighted(np.where(pool & (names != t), 0.0, labels.weights)) for t in names[pool]}
    chosen = [str(topic) for topic in sorted(inside) if topic]
    if not chosen:
        return {}
    jobs = [(estimator, inside[topic]) for topic in chosen]
    return dict(zip(chosen, solve_paths(activations, jobs, ridges=ridges), strict=True))


def _solve_symmetric(matrix: Float64, right: Float64, ridge: float) -> Float64:
    """(matrix + ridge·I)⁻¹ right, the matrix small and positive semi-definite; its null space is left out."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-12 * values.max(initial=0.0)
    vectors = vectors[:, kept]
    solution: Float64 = vectors @ ((vectors.T @ right) / (values[kept] + ridge))
    return solution
