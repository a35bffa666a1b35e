"""Directions that answer to sensitive refusals and not to harmful ones.

Activations [N, L, D], confidence [N] and the kind of each sample enter; directions [L, D] leave that separate
refused sensitive from answered prompts while their response to refused harmful minus answered benign prompts
is zero (`SafeRidge`), residualised (`ResidualRidge`) or pushed into the negative class (`ContrastRidge`).
These go beyond García-Ferrero et al. (arXiv 2512.16602), whose search has no term for safety. The closed form
is that of minimum-variance beamforming under linear constraints (Frost 1972) in the metric Σ_N + λI.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rs_gguf.errors import InputError
from rs_gguf.estimators.estimator import DirectionEstimator, Means
from rs_gguf.estimators.labels import Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.ridge import RidgeSystem

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
    """argmin aᵀ(Σ_N + λI)a subject to (μ_P − μ_N)ᵀa = 1 and hᵀa = 0.

    P, N as in `SensitiveRidge`; h is the harmful contrast, the mean of refused harmful minus the mean of
    answered benign samples. With M = Σ_N + λI and δ = μ_P − μ_N, a ∝ M⁻¹δ − M⁻¹h (hᵀM⁻¹δ)/(hᵀM⁻¹h).
    """

    name = "safe-wrmd"

    def classes(self, labels: Labels) -> dict[str, Float64]:
        return _with_harm_contrast(self, super().classes(labels))

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        difference, harm, free, pull = _free_and_pull(means, system, ridges)
        # Where h is zero there is nothing to be quiet on.
        amount = (free @ harm) / torch.where(harm.any(), pull @ harm, 1.0)
        directions = free - pull * amount[:, None]
        # The harmful contrast may span the sensitive one.
        lost = directions @ difference < _ROUNDING * (free @ difference)
        return torch.where(lost[:, None], 0.0, directions)


@dataclass(kw_only=True)
class ResidualRidge(SensitiveRidge):
    """`SensitiveRidge` less its projection on the ridge direction (Σ_N + λI)⁻¹h of the harmful contrast h."""

    name = "residual-wrmd"

    def classes(self, labels: Labels) -> dict[str, Float64]:
        return _with_harm_contrast(self, super().classes(labels))

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        difference, _, free, pull = _free_and_pull(means, system, ridges)
        lengths = pull.norm(dim=1, keepdim=True)
        unit = pull / torch.where(lengths > 0, lengths, 1.0)
        directions = free - unit * (free * unit).sum(dim=1, keepdim=True)
        # Taking a part away can turn the rest round: keep refused above answered. It can also take all.
        left = directions @ difference
        signs = torch.where(left.abs() < _ROUNDING * (free @ difference), 0.0, left.sign())
        return directions * signs[:, None]


def _free_and_pull(
    means: Means, system: RidgeSystem | None, ridges: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return δ [D] and h [D], and for each ridge M⁻¹δ and M⁻¹h, each [R, D]."""
    assert system is not None  # uses_covariance
    difference, harm = means["refused"] - means["answered"], means["harmful"] - means["benign"]
    free, pull = system.solve(torch.stack([difference, harm], dim=1), ridges).unbind(dim=2)
    return difference, harm, free, pull


def _with_harm_contrast(estimator: DirectionEstimator, weights: dict[str, Float64]) -> dict[str, Float64]:
    """Return `weights`, checked to hold both sides of the harmful contrast."""
    for kind, verdict in (("harmful", "refused"), ("benign", "answered")):
        if not weights[kind].any():
            raise InputError(
                f"{estimator.name}: no {verdict} sample of kind '{kind}', which it must not respond to; "
                "add some"
            )
    return weights
