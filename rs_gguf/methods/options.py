"""The options of the fit, as a recipe sets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rs_gguf.machine import Device
from rs_gguf.records.metrics import Effect


@dataclass(frozen=True)
class FitOptions:
    """What to fit, and where.

    estimators: names in `ESTIMATORS`, for the control vector.
    ridges: λ of these estimators, relative to the mean variance.
    gate_ridges: λ of the gated adapter, relative to the mean diagonal of its metric.
    """

    effect: Effect
    estimators: Sequence[str]
    ridges: Sequence[float]
    gate_ridges: Sequence[float]
    device: Device = "auto"
