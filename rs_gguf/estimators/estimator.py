"""The directions of refusal: MD, WMD, RMD, WRMD, one unit vector a layer, and their path over the ridge.

Activations [N, L, D] and refusal confidence [N] enter; directions [L, D] and offsets [L, D] leave. Method §3,
after García-Ferrero et al. (arXiv 2512.16602); WMD is from Cyberey and Evans (arXiv 2504.17130). Each
estimator names its classes as weight vectors and turns their means, and a `RidgeSystem` where it uses a
covariance, into a direction; `rs_gguf.estimators.path` does the rest, in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.errors import InputError
from rs_gguf.estimators.device import Device, check_device
from rs_gguf.estimators.labels import Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import RidgePath, solve_paths
from rs_gguf.estimators.ridge import RidgeSystem, check_ridges
from rs_gguf.machine import ALONE, Processes
from rs_gguf.records.conversation import NEUTRAL

Means = Mapping[str, Tensor]

# A neutral band of less total weight gives an offset that is mostly noise; the midpoint is used instead.
MIN_NEUTRAL = 8


@dataclass(kw_only=True)
class DirectionEstimator:
    """Base of all estimators; parameters and fitted attributes are the same for each.

    ridge: λ > 0; MD and WMD have none and ignore it.
    ridge_scale: "relative" multiplies λ by tr(Σ)/D, so that it means the same in every model and layer;
        "absolute" takes it as it is (the paper: 0.01).
    neutral: |c| up to this is neither refused nor answered.
    offset: what projections are measured from: the mean of the "neutral" band, of "benign" answered samples
        (needs kinds), or the "midpoint" of the two class means; "auto" is neutral if it holds 8 samples of
        weight 1 or more, else midpoint. It changes no direction but WMD's.
    device: where the fit computes, "cpu" or "cuda"; "auto" is CUDA if present.

    After `fit`: `directions_` [L, D] fp64 unit rows on which refused samples project higher than answered
    ones, zeros where there is no direction; `offset_` [L, D], `ridges_` [L] absolute, `harm_cosine_` and
    `contrast_cosine_` [L] (`RidgePath`).
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
        """The constructor's arguments by name; with it scikit-learn's `clone` works."""
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
        """Who is in each class; always "refused" (P) and "answered" (N, whose covariance is used)."""
        return {"refused": labels.refused(self.neutral), "answered": labels.answered(self.neutral)}

    def classes(self, labels: Labels) -> dict[str, Float64]:
        """Weight vectors [N] of the classes, with the harmful contrast and the offset where there are any."""
        masks = self.masks(labels)
        if labels.kinds is not None:
            masks["harmful"] = labels.kind("harmful") & labels.refused(self.neutral)
            masks["benign"] = labels.kind("benign") & labels.answered(self.neutral)
        weights = {k: labels.weighted(m, by_confidence=self.by_confidence) for k, m in masks.items()}
        undecided = labels.weighted(labels.undecided(self.neutral), by_confidence=False)
        if self.offset == "benign":
            labels.kind("benign")  # the error that asks for kinds
            weights["offset"] = weights["benign"]
        elif self.offset == "neutral" or (self.offset == "auto" and undecided.sum() >= MIN_NEUTRAL):
            weights["offset"] = undecided
        for required in ("refused", "answered", "offset"):
            if required in weights and not weights[required].any():
                raise InputError(
                    f"{self.name}: no sample with a weight is in the class '{required}' (refused is c > "
                    f"{self.neutral}, answered is c < -{self.neutral}); add such samples or change `neutral`"
                )
        return weights

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        """Return directions [R, D] of one layer, of any length, from its class means and covariance.

        (Σ + λI)⁻¹ (μ_P − μ_N), the classes being the estimator's own; those without a covariance override it.
        """
        assert system is not None  # uses_covariance
        return system.solve((means["refused"] - means["answered"])[:, None], ridges)[:, :, 0]

    def ridge_unit(self, system: RidgeSystem) -> float:
        """The λ that a relative ridge of 1 means: tr/D of the matrix that is inverted; 1 if that is 0."""
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
    """WMD: m₊/‖m₊‖ − m₋/‖m₋‖, m± the |c|-weighted class means measured from the offset."""

    name = "wmd"
    by_confidence = True
    uses_covariance = False

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        sides = [means[name] - means["offset"] for name in ("refused", "answered")]
        lengths = [float(side.norm()) for side in sides]
        # A class whose mean is the offset itself has no side to point to, so it adds nothing.
        plus, minus = (s / n if n > 0 else s for s, n in zip(sides, lengths, strict=True))
        return (plus - minus).expand(len(ridges), -1)


@dataclass(kw_only=True)
class RidgeMeanDifference(DirectionEstimator):
    """RMD: (Σ_N + λI)⁻¹ (μ_P − μ_N), Σ_N the covariance of the answered class about its mean."""

    name = "rmd"


@dataclass(kw_only=True)
class WeightedRidgeMeanDifference(RidgeMeanDifference):
    """WRMD: RMD with |c|-weighted means and covariance."""

    name = "wrmd"
    by_confidence = True


@dataclass(kw_only=True)
class UncentredWeightedRidgeMeanDifference(RidgeMeanDifference):
    """WRMD as the paper's Eq. 4 prints it: Σ_N about zero instead of the mean, that is Σ + μμᵀ.

    The result is almost orthogonal to μ_N, which WRMD's is not; kept to compare with published numbers.
    Sherman and Morrison's formula gives it from the factorisation of Σ.
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
    """Return the `RidgePath` of each estimator over `ridges` [R], or over its own ridge where they are None.

    Layers are fitted in parallel, each on one thread, so that the same input gives the same bytes on one
    machine whatever the number of threads.

    Args:
        activations: [N, L, D] array, memory map or tensor of any float type, or `Activations`; read a layer
            and some samples at a time.
        confidence: [N] in [-1, 1].
        kinds: [N] of "sensitive", "harmful", "benign".
        sample_weight: [N] ≥ 0.
        device: where the fit computes; moments and solutions are float64 there.
        processes: those that share the samples (torchrun). The other arguments are this process's share.
            Every process must call alike and gets the result that one process would. An error in one, such as
            NaN in its share, leaves the others waiting: end them all.

    Raises:
        InputError: bad shapes or values, an empty class, NaN or Inf (naming the layer), no direction at any
            layer.
    """
    labels = Labels.of(confidence, kinds, sample_weight=sample_weight, processes=processes)
    jobs = [(estimator, labels) for estimator in estimators]
    return solve_paths(activations, jobs, ridges=ridges, device=device, processes=processes)
