"""The options of the fit, as a recipe sets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rs_gguf.evaluation.acceptance import Effect
from rs_gguf.machine import Device


@dataclass(frozen=True)
class GateOptions:
    """Variants of the closed form of a gate vector; see `rs_gguf.methods.gate_vectors`.

    intercept: share of the free intercept, from 0 (none) to 1.
    benign_free: leave the gate activation of the mean benign prompt free.
    null_space: share of the eigen-directions of benign and harmful prompts that a gate may use, the lowest
        ones; 0 for constraints on means instead.
    """

    intercept: float = 0.0
    benign_free: bool = False
    null_space: float = 0.0


PLAIN = GateOptions()
"""The closed form without any variant."""


@dataclass(frozen=True)
class FitOptions:
    """What to fit, and where.

    estimators: names in `ESTIMATORS`, for the control vector.
    ridges: λ of these estimators, relative to the mean variance.
    gate_ridges: λ of the gated adapter, relative to the mean diagonal of its metric.
    gate: variants of its gate vectors. With an intercept, the pair is fitted too.
    """

    effect: Effect
    estimators: Sequence[str]
    ridges: Sequence[float]
    gate_ridges: Sequence[float]
    device: Device = "auto"
    gate: GateOptions = PLAIN
