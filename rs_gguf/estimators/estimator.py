"""Fit refusal directions with MD, WMD, RMD or WRMD: one unit vector per layer, for one ridge or several.

Activations [N, L, D] and refusal confidence [N] go in; directions [L, D] and offsets [L, D] come out. Method
§3, after García-Ferrero et al. (arXiv 2512.16602); WMD is from Cyberey and Evans (arXiv 2504.17130). Each
estimator names its classes as weight vectors. It turns their means into a direction, with a `RidgeSystem` if
it uses a covariance. `rs_gguf.estimators.path` does the rest, in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.errors import InputError
from rs_gguf.estimators.device import check_device
from rs_gguf.estimators.labels import Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import RidgePath, solve_paths
from rs_gguf.estimators.ridge import RidgeSystem, check_ridges
from rs_gguf.machine import ALONE, Device, Processes
from rs_gguf.records.conversation import NEUTRAL

Means = Mapping[str, Tensor]

MIN_NEUTRAL = 8
"""A neutral band of less total weight gives an offset that is mostly noise; the midpoint replaces it."""


@dataclass(kw_only=True)
class DirectionEstimator:
    """Base class of all estimators, with their common parameters and fitted attributes.

    ridge: λ > 0. MD and WMD have no ridge and ignore it.
    ridge_scale: "relative" multiplies λ by tr(Σ)/D, which makes it comparable between models and layers.
        "absolute" uses λ unchanged, as the paper does (0.01).
    neutral: samples with |c| up to this value are neither refused nor answered.
    offset: the point from which projections are measured. It is the mean of the "neutral" band, the mean of
        "benign" answered samples (needs kinds), or the "midpoint" of the two class means. "auto" is the
        neutral mean if that band has a total weight of 8 or more, else the midpoint. WMD alone depends on it.
    device: where the fit computes, "cpu" or "cuda"; "auto" is CUDA if present.

    `fit` sets `directions_` [L, D], float64 unit rows on which refused samples project higher than answered
    ones. A row is zero if its layer has no direction. `fit` also sets `offset_` [L, D], `ridges_` [L]
    (absolute), `harm_cosine_` [L] and `contrast_cosine_` [L], as in `RidgePath`.
    """

    ridge: float = 1.0
    ridge_scale: Literal["relative", "absolute"] = "relative"
    neutral: float = NEUTRAL
    offset: Literal["auto", "neutral", "benign", "midpoint"] = "auto"
    device: Device = "auto"
    directions_: Float64 = field(init=False, repr=False, compare=False)
    offset_: Float64 = field(init=False, repr=False, compare=False)
    ridges_: Float64 = field(init=False, repr=False, compare=False)
    harm_cosine_: Float64 = field(init=False, repr=False, compare=False)
    contrast_cosine_: Float64 = field(init=False, repr=False, compare=False)

    name: ClassVar[str]
    by_confidence: ClassVar[bool] = False
    uses_covariance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ridges(self.ridge)
        check_device(self.device)
        if self.ridge_scale not in ("relative", "absolute"):
            raise InputError(f"ridge_scale {self.ridge_scale!r}: 'relative' or 'absolute' is accepted")
        if self.offset not in ("auto", "neutral", "benign", "midpoint"):
            raise InputError(f"offset {self.offset!r}: 'auto', 'neutral', 'benign' or 'midpoint' is accepted")
        if not 0 <= self.neutral < 1:
            raise InputError(f"neutral {self.neutral!r}: a number from 0 to below 1 is accepted")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name, as scikit-learn's `clone` needs them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def fit(
        self,
        activations: Any,
        confidence: npt.ArrayLike,
        *,
        kinds: npt.ArrayLike | None = None,
        sample_weight: npt.ArrayLike | None = None,
        processes: Processes = ALONE,
    ) -> Self:
        """Fit every layer; arguments and errors as in `fit_paths`."""
        path = fit_paths(
            activations,
            confidence,
            [self],
            kinds=kinds,
            sample_weight=sample_weight,
            device=self.device,
            processes=processes,
        )[0]
        self.directions_, self.offset_, self.ridges_ = path.directions[0], path.offset, path.ridges[0]
        self.harm_cosine_, self.contrast_cosine_ = path.harm_cosine[0], path.contrast_cosine
        return self

    def masks(self, labels: Labels) -> dict[str, Mask]:
        """Return the members of each class: "refused" (P) and "answered" (N, whose covariance is used)."""
        return {"refused": labels.refused(self.neutral), "answered": labels.answered(self.neutral)}

    def classes(self, labels: Labels) -> dict[str, Float64]:
        """Return the weights [N] of each class.

        Beside "refused" and "answered" there may be "offset", and "harmful" and "benign" if kinds are known.

        Raises:
            InputError: a required class has no sample with a weight.
        """
        masks = self.masks(labels)
        if labels.kinds is not None:
            masks["harmful"] = labels.kind("harmful") & labels.refused(self.neutral)
            masks["benign"] = labels.kind("benign") & labels.answered(self.neutral)
        weights = {k: labels.weighted(m, by_confidence=self.by_confidence) for k, m in masks.items()}
        undecided = labels.weighted(labels.undecided(self.neutral), by_confidence=False)
        if self.offset == "benign":
            labels.kind("benign")  # raises the error that asks for kinds
            weights["offset"] = weights["benign"]
        elif self.offset == "neutral" or (self.offset == "auto" and undecided.sum() >= MIN_NEUTRAL):
            weights["offset"] = undecided
        for required in ("refused", "answered", "offset"):
            if required in weights and not weights[required].any():
                raise InputError(
                    f"{self.name}: no sample with a weight is in the class '{required}' (refused: c > "
                    f"{self.neutral}, answered: c < -{self.neutral}). Add such samples or change `neutral`"
                )
        return weights

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        """Return directions [R, D] of one layer for R ridges, not normalised: (Σ + λI)⁻¹ (μ_P − μ_N).

        means: [D] of each class that `classes` names, and of "offset".
        system: factorised covariance; None for estimators without one, which override this method.
        ridges: [R], absolute.
        """
        assert system is not None  # uses_covariance
        return system.solve((means["refused"] - means["answered"])[:, None], ridges)[:, :, 0]

    def ridge_unit(self, system: RidgeSystem) -> float:
        """Return the λ of a relative ridge of 1: tr/D of the matrix to invert, or 1 if that is 0."""
        return system.trace / len(system.mean) or 1.0


@dataclass(kw_only=True)
class MeanDifference(DirectionEstimator):
    """MD: μ_P − μ_N."""

    name = "md"
    uses_covariance = False

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        return (means["refused"] - means["answered"]).expand(len(ridges), -1)


@dataclass(kw_only=True)
class WeightedMeanDifference(DirectionEstimator):
    """WMD: m₊/‖m₊‖ − m₋/‖m₋‖, where m± are the |c|-weighted class means minus the offset."""

    name = "wmd"
    by_confidence = True
    uses_covariance = False

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        shifts = [means[name] - means["offset"] for name in ("refused", "answered")]
        lengths = [float(shift.norm()) for shift in shifts]
        # If the mean of a class is the offset itself, its shift is zero and adds nothing.
        plus, minus = (s / n if n > 0 else s for s, n in zip(shifts, lengths, strict=True))
        return (plus - minus).expand(len(ridges), -1)


@dataclass(kw_only=True)
class RidgeMeanDifference(DirectionEstimator):
    """RMD: (Σ_N + λI)⁻¹ (μ_P − μ_N), where Σ_N is the covariance of the answered class about its mean."""

    name = "rmd"


@dataclass(kw_only=True)
class WeightedRidgeMeanDifference(RidgeMeanDifference):
    """WRMD: RMD with |c|-weighted means and covariance."""

    name = "wrmd"
    by_confidence = True


@dataclass(kw_only=True)
class UncentredWeightedRidgeMeanDifference(RidgeMeanDifference):
    """WRMD as the paper's Eq. 4 prints it: Σ_N about zero instead of about the mean, which is Σ + μμᵀ.

    Its result is almost orthogonal to μ_N; the result of WRMD is not. It is kept for comparison with
    published numbers. Sherman and Morrison's formula computes it from the factorisation of Σ.
    """

    name = "wrmd-uncentred"
    by_confidence = True

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        assert system is not None  # uses_covariance
        mean = system.mean
        both = system.solve(torch.stack([means["refused"] - means["answered"], mean], dim=1), ridges)
        difference, centre = both[:, :, 0], both[:, :, 1]
        return difference - centre * ((difference @ mean) / (1 + centre @ mean))[:, None]

    def ridge_unit(self, system: RidgeSystem) -> float:
        return float(system.trace + system.mean @ system.mean) / len(system.mean) or 1.0


def fit_paths(
    activations: Any,
    confidence: npt.ArrayLike,
    estimators: Sequence[DirectionEstimator],
    *,
    ridges: npt.ArrayLike | None = None,
    kinds: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    device: Device = "auto",
    processes: Processes = ALONE,
) -> list[RidgePath]:
    """Return the `RidgePath` of each estimator over `ridges` [R], or over its own ridge if they are None.

    Layers are fitted in parallel, each on one thread. The same input therefore gives the same bytes on one
    machine for any number of threads.

    Args:
        activations: [N, L, D] array, memory map or tensor of any float type, or `Activations`. They are read
            layer by layer, some samples at a time.
        confidence: [N] in [-1, 1].
        kinds: [N] of "sensitive", "harmful", "benign".
        sample_weight: [N] ≥ 0.
        device: where the fit computes; means, covariances and solutions are float64.
        processes: the processes that share the samples (torchrun). The other arguments are the share of this
            process. All processes must make the same call; each gets the result that one process would get.
            If one process raises an error, such as NaN in its share, the others wait: end them all.

    Raises:
        InputError: shapes or values are wrong, a class is empty, a layer holds NaN or Inf, or an estimator
            has no direction at any layer.
    """
    labels = Labels.of(confidence, kinds, sample_weight=sample_weight, processes=processes)
    jobs = [(estimator, labels) for estimator in estimators]
    return solve_paths(activations, jobs, ridges=ridges, device=device, processes=processes)
