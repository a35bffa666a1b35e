"""Fit directions that respond to sensitive refusals and not to harmful ones.

Activations [N, L, D], confidence [N] and the kind of each sample go in; directions [L, D] come out. They
separate refused sensitive prompts from answered ones. The *harmful contrast* is the mean of refused harmful
minus the mean of answered benign prompts. `SafeRidge` makes the response to it zero, `ResidualRidge` removes
its ridge direction, and `ContrastRidge` puts refused harmful prompts into the negative class.
These estimators go beyond García-Ferrero et al. (arXiv 2512.16602), whose search has no term for safety. The
closed form is minimum-variance beamforming under linear constraints (Frost 1972) in the metric Σ_N + λI.
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

# A direction that keeps a smaller share of the response to the class difference consists of rounding errors.
# Its length would not show this, since M⁻¹ magnifies rounding in dimensions of low variance.
_ROUNDING = 1e-10


@dataclass(kw_only=True)
class SensitiveRidge(DirectionEstimator):
    """WRMD of refused sensitive prompts minus answered sensitive and benign ones; base of the safe variants.

    Harmful prompts are in neither class, whether answered or refused. `kinds` are required.
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
    """RMD of refused sensitive minus (answered benign ∪ refused harmful) prompts, |c|-weighted.

    The covariance of the negative class includes the gap between its two halves. The ridge metric therefore
    makes a response to refused harmful prompts expensive.
    """

    name = "contrast-wrmd"

    def masks(self, labels: Labels) -> dict[str, Mask]:
        benign = labels.kind("benign") & labels.answered(self.neutral)
        harmful = labels.kind("harmful") & labels.refused(self.neutral)
        return {**super().masks(labels), "answered": benign | harmful}


@dataclass(kw_only=True)
class SafeRidge(SensitiveRidge):
    """argmin aᵀ(Σ_N + λI)a subject to (μ_P − μ_N)ᵀa = 1 and hᵀa = 0.

    P and N are the classes of `SensitiveRidge`; h is the harmful contrast.
    With M = Σ_N + λI and δ = μ_P − μ_N, a ∝ M⁻¹δ − M⁻¹h (hᵀM⁻¹δ)/(hᵀM⁻¹h).
    """

    name = "safe-wrmd"

    def classes(self, labels: Labels) -> dict[str, Float64]:
        return _with_harm_contrast(self, super().classes(labels))

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        difference, harm, free, pull = _free_and_pull(means, system, ridges)
        # If h is zero, both products are zero: dividing by 1 then subtracts nothing.
        amount = (free @ harm) / torch.where(harm.any(), pull @ harm, 1.0)
        directions = free - pull * amount[:, None]
        # The harmful contrast may span the sensitive one; nothing but rounding is left then.
        is_rounding = directions @ difference < _ROUNDING * (free @ difference)
        return torch.where(is_rounding[:, None], 0.0, directions)


@dataclass(kw_only=True)
class ResidualRidge(SensitiveRidge):
    """`SensitiveRidge` minus its projection on (Σ_N + λI)⁻¹h, where h is the harmful contrast."""

    name = "residual-wrmd"

    def classes(self, labels: Labels) -> dict[str, Float64]:
        return _with_harm_contrast(self, super().classes(labels))

    def direct(self, means: Means, system: RidgeSystem | None, ridges: Tensor) -> Tensor:
        difference, _, free, pull = _free_and_pull(means, system, ridges)
        lengths = pull.norm(dim=1, keepdim=True)
        unit = pull / torch.where(lengths > 0, lengths, 1.0)
        directions = free - unit * (free * unit).sum(dim=1, keepdim=True)
        # The subtraction can reverse a direction: the sign keeps refused above answered samples. It can also
        # leave nothing but rounding: such a direction becomes zero.
        response = directions @ difference
        signs = torch.where(response.abs() < _ROUNDING * (free @ difference), 0.0, response.sign())
        return directions * signs[:, None]


def _free_and_pull(
    means: Means, system: RidgeSystem | None, ridges: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return δ [D] and h [D], and M⁻¹δ [R, D] and M⁻¹h [R, D] for R ridges."""
    assert system is not None  # uses_covariance
    difference, harm = means["refused"] - means["answered"], means["harmful"] - means["benign"]
    free, pull = system.solve(torch.stack([difference, harm], dim=1), ridges).unbind(dim=2)
    return difference, harm, free, pull


def _with_harm_contrast(estimator: DirectionEstimator, weights: dict[str, Float64]) -> dict[str, Float64]:
    """Return `weights`; raise `InputError` if a class of the harmful contrast has no sample."""
    for kind, verdict in (("harmful", "refused"), ("benign", "answered")):
        if not weights[kind].any():
            raise InputError(
                f"{estimator.name}: no sample of kind '{kind}' is {verdict}; at least one is needed for the "
                "harmful contrast. Add such samples or use an estimator without it"
            )
    return weights
