"""What a recipe asks of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rs_gguf.evaluation.acceptance import Effect


@dataclass(frozen=True)
class FitOptions:
    """What is fitted, and where: the effect, names in `ESTIMATORS`, relative ridges of both kinds of file."""

    effect: Effect
    estimators: Sequence[str]
    ridges: Sequence[float]
    gate_ridges: Sequence[float]
    device: Literal["auto", "cpu", "cuda"] = "auto"
