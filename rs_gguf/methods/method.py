"""What a search looks among, and what it found: candidates, the space they come from, measured trials.

Directions of the fit and numbers of blocks go in; `Candidate`s and, as rows of JSON, `Trial`s come out. The
starting points are the paper's prior for vectors (method §7), and long bands for gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.scores import band_profile
from rs_gguf.methods.gates import Gates
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.trials import GATE, Candidate
from rs_gguf.steering.lora import Factors


@dataclass(frozen=True)
class Directions:
    """What `fit` leaves for the search: unit directions and calibration, one row a layer.

    `scales` [L]: activation units for one unit of confidence, s⁻ of method §5 to remove, s⁺ to induce.
    """

    unit: NDArray[np.float64]  # [L, D], rows of zeros where there is no direction
    scales: NDArray[np.float64]  # [L]

    def steering(self, candidate: Candidate) -> dict[int, NDArray[np.float32]]:
        """What is added to each block: α·s_l·v_l over the band, α = −strength / number of blocks.

        Blocks that the fit found no direction for are left out, and do not count.
        """
        profile = band_profile(len(self.unit), candidate.first, candidate.last) * self.unit.any(axis=1)
        alpha = -candidate.strength / max(1, profile.sum())
        rows = (alpha * profile * self.scales)[:, np.newaxis] * self.unit
        return {int(layer): rows[layer].astype(np.float32) for layer in np.flatnonzero(profile)}


def factors(gates: Gates, candidate: Candidate) -> dict[str, Factors]:
    """Return the LoRA factors of the gated adapter that a candidate stands for."""
    return gates.factors(
        candidate.ridge, candidate.first, candidate.last, candidate.strength, candidate.margin
    )


@dataclass(frozen=True)
class Space:
    """Where a search looks: the pairs of estimator and ridge, and inclusive ranges of the rest.

    `first` and `length` are in blocks; all have the same `margin`. The points of `start` are tried before all
    others. A candidate answers first with a strength of `least` at least, and never with more than `most`.
    """

    directions: Sequence[tuple[str, float]]
    first: tuple[int, int]
    length: tuple[int, int]
    strength: tuple[float, float]
    start: Sequence[Candidate]
    margin: float = 0.0
    least: float = 0.0
    most: float = math.inf

    def holds(self, candidate: Candidate) -> bool:
        """Whether the candidate is one of this space's kind: vectors and gates are searched apart."""
        return (candidate.estimator, candidate.ridge) in self.directions

    @classmethod
    def of_vectors(cls, directions: Sequence[tuple[str, float]], n_layer: int) -> Space:
        """Middle blocks, begun at the low end of the paper's prior for k·|α|, 2 to 4; bands take turns."""
        firsts = [max(FIRST_STEERABLE, n_layer * sixths // 6) for sixths in (2, 3, 4)]
        start = [
            Candidate(estimator, ridge, first, max(first, min(first + n_layer // 3 - 1, n_layer - 2)), 2.0)
            for k, (estimator, ridge) in enumerate(directions)
            for first in [firsts[k % len(firsts)]]
        ]
        return cls(
            directions,
            first=(max(FIRST_STEERABLE, n_layer // 5), max(FIRST_STEERABLE, n_layer * 2 // 3)),
            length=(1, max(1, n_layer // 2)),
            strength=(0.02, 12.0),
            start=start,
        )

    @classmethod
    def of_gates(cls, ridges: Sequence[float], n_layer: int, *, induce: bool = False) -> Space:
        """Long bands, since a gate opens a little in each block and four blocks alone remove little.

        The first third is left alone at first: a change there reaches everything that follows.
        """
        first, last = max(FIRST_STEERABLE, n_layer // 3), max(FIRST_STEERABLE, n_layer - 2)
        # With less, more benign prompts are refused than before; to induce, fewer harmful ones.
        margin = -0.4 if induce else 0.4
        # Half of the contrast is halfway from the mean of one side to that of the other, and less turns few
        # verdicts over. The whole takes a refused prompt all the way: far beyond it short answers still get
        # better, and full ones break.
        least = 0.5
        most = 2.5 if induce else 1.5
        strength = 1.25 if induce else least
        start = [Candidate(GATE, ridge, first, last, strength, margin) for ridge in ridges]
        return cls(
            [(GATE, ridge) for ridge in ridges],
            first=(max(FIRST_STEERABLE, n_layer // 5), max(FIRST_STEERABLE, n_layer // 2)),
            length=(max(1, n_layer // 3), max(1, n_layer * 5 // 6)),
            strength=(0.1, most),
            start=start,
            margin=margin,
            least=least,
            most=most,
        )
