"""The control vector: directions of the estimators, calibrated, as llama.cpp adds them to blocks.

`Samples` of the fit split enter. One unit direction and calibration a layer leave for each estimator and
ridge (`directions.safetensors`). A candidate of the search becomes a vector. The search begins at the paper's
prior (method §7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.projection import project, project_statistics
from rs_gguf.activations.scores import band_profile, scales_of, scores_of
from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.estimators import ESTIMATORS, fit_paths
from rs_gguf.estimators.path import RidgePath
from rs_gguf.evaluation.acceptance import Effect
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import figures
from rs_gguf.methods.method import Space
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.conversation import NEUTRAL
from rs_gguf.records.files import load_arrays, save_arrays
from rs_gguf.records.rows import finite
from rs_gguf.records.trials import Candidate
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.vector import SteeringVector


@dataclass(frozen=True)
class Directions:
    """Unit directions of one estimator and ridge, towards refusal, and their calibration, one row a layer.

    `scales` [L]: activation units for one unit of confidence, s⁻ of method §5 to remove, s⁺ to induce.
    `sign`: 1 for a vector that removes refusals, -1 for one that induces them.
    `offset` [L, D], from which projections are measured, and `record`, the row of `fit.json`, are known when
    they were just fitted, and not when they were read.
    """

    unit: NDArray[np.float64]  # [L, D], rows of zeros where there is no direction
    scales: NDArray[np.float64]  # [L]
    sign: int = 1
    offset: NDArray[np.float64] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def steering(self, candidate: Candidate) -> dict[int, NDArray[np.float32]]:
        """What is added to each block: α·s_l·v_l over the band, α = −sign · strength / number of blocks.

        Blocks that the fit found no direction for are left out, and do not count.
        """
        profile = band_profile(len(self.unit), candidate.first, candidate.last) * self.unit.any(axis=1)
        alpha = -self.sign * candidate.strength / max(1, profile.sum())
        rows = (alpha * profile * self.scales)[:, np.newaxis] * self.unit
        return {int(layer): rows[layer].astype(np.float32) for layer in np.flatnonzero(profile)}


Fitted = Mapping[tuple[str, float], Directions]
"""By estimator and ridge; a ridge of 0 stands for none."""


class ControlVector:
    """Directions that are added to the outputs of blocks, whatever the prompt."""

    name: ClassVar[str] = "vector"
    word: ClassVar[str] = "control vector"
    suffixes: ClassVar[tuple[str, ...]] = (".gguf",)
    artefact: ClassVar[str] = "directions.safetensors"

    def suits(self, engine: Engine) -> bool:
        return True

    def steps(self, options: FitOptions, n_layer: int) -> int:
        return len(options.estimators)

    def fit(
        self,
        samples: Samples,
        options: FitOptions,
        *,
        processes: Processes = ALONE,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Fitted:
        """Fit and calibrate all estimators and ridges that the options name."""
        mine, names = samples.share(processes), options.estimators
        paths = fit_paths(  # all in one call: estimators with the same classes share a factorisation
            mine.activations,
            mine.confidence,
            [ESTIMATORS[name]() for name in names],
            ridges=options.ridges,
            kinds=mine.kinds,
            device=options.device,
            processes=processes,
        )
        if processes.rank > 0:
            return {}
        rows = samples.rows_on(options.device)
        found: dict[tuple[str, float], Directions] = {}
        for name, path in zip(names, paths, strict=True):
            found |= _calibrated(name, path, rows, samples.confidence, options)
        return found

    def draw(
        self,
        fitted: Fitted,
        samples: Samples,
        options: FitOptions,
        folder: Path,
        *,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Draw each estimator at its ridge of the best AUROC. `advance` counts estimators."""
        rows = samples.rows_on(options.device)
        shown: dict[str, NDArray[np.float64]] = {}
        for name in options.estimators:
            own = [(ridge, found) for (other, ridge), found in fitted.items() if other == name]
            auroc = np.array([found.record["auroc"] for _, found in own])
            best, layer = (int(index) for index in np.unravel_index(auroc.argmax(), auroc.shape))
            ridge, found = own[best]
            shown[f"{name}@{ridge:g}"] = found.unit
            projected = project(rows, found.unit[:, np.newaxis], found.offset)[:, :, 0]
            figures.save_estimator(samples, name, projected, found.unit, layer, options, folder)
            if len(shown) == 1:
                figures.save_pca(folder / "pca.svg", samples.rows, layer, samples.confidence)
            advance(1)
        figures.save_cosines(folder / "cosines.svg", shown)

    def save(self, fitted: Fitted, folder: Path) -> dict[str, Any]:
        arrays: dict[str, NDArray[Any]] = {}
        for (name, ridge), found in fitted.items():
            arrays |= {f"{name}@{ridge:g}/unit": found.unit, f"{name}@{ridge:g}/scales": found.scales}
        save_arrays(folder / self.artefact, arrays)
        return {"directions": [found.record for found in fitted.values()]}

    def load(self, folder: Path, options: FitOptions) -> Fitted:
        arrays = load_arrays(folder / self.artefact)
        return {
            (name, ridge): Directions(
                arrays[f"{name}@{ridge:g}/unit"], arrays[f"{name}@{ridge:g}/scales"], _sign(options.effect)
            )
            for name in options.estimators
            for ridge in _ridges(name, options)
        }

    def space(self, fitted: Fitted, n_layer: int, effect: Effect) -> Space:
        return space_of(sorted(fitted), n_layer)

    def steering(self, fitted: Fitted, candidate: Candidate, architecture: str, scratch: Path) -> Steering:
        return Steering(fitted[candidate.estimator, candidate.ridge].steering(candidate))

    def files(
        self,
        fitted: Fitted,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> tuple[SteeringVector]:
        directions = fitted[candidate.estimator, candidate.ridge].steering(candidate)
        return (SteeringVector(directions, facts, architecture),)


def space_of(directions: Sequence[tuple[str, float]], n_layer: int) -> Space:
    """Middle blocks, begun at the low end of the paper's prior for k·|α|, 2 to 4; bands take turns."""
    firsts = [max(FIRST_STEERABLE, n_layer * sixths // 6) for sixths in (2, 3, 4)]
    start = [
        Candidate(
            ControlVector.name,
            estimator,
            ridge,
            first,
            max(first, min(first + n_layer // 3 - 1, n_layer - 2)),
            2.0,
        )
        for k, (estimator, ridge) in enumerate(directions)
        for first in [firsts[k % len(firsts)]]
    ]
    return Space(
        ControlVector.name,
        directions,
        first=(max(FIRST_STEERABLE, n_layer // 5), max(FIRST_STEERABLE, n_layer * 2 // 3)),
        length=(1, max(1, n_layer // 2)),
        strength=(0.02, 12.0),
        start=start,
    )


def _calibrated(
    name: str, path: RidgePath, rows: Any, confidence: NDArray[np.float64], options: FitOptions
) -> dict[tuple[str, float], Directions]:
    """The directions of one estimator by (name, ridge): calibration, and what they tell of the samples."""
    # All ridges at once: the activations are read but once, and no projections are kept.
    ridges = _ridges(name, options)
    directions = path.directions[: len(ridges)].swapaxes(0, 1)
    merit = project_statistics(rows, directions, confidence, path.offset, neutral=NEUTRAL)
    scores, auroc = scores_of(merit).T, merit.auroc.T  # [ridges, L]
    to_induce, to_remove = scales_of(merit, confidence)
    scales = (to_remove if options.effect == "remove" else to_induce).T
    return {
        (name, ridge): Directions(
            path.directions[k],
            scales[k],
            _sign(options.effect),
            path.offset,
            {
                "estimator": name,
                "ridge": ridge,
                "score": scores[k].tolist(),
                "auroc": auroc[k].tolist(),
                "mean_refused": merit.mean_refused[:, k].tolist(),
                "mean_answered": merit.mean_answered[:, k].tolist(),
                "harm_cosine": [finite(cosine) for cosine in path.harm_cosine[k]],
                "contrast_cosine": [finite(cosine) for cosine in path.contrast_cosine],
            },
        )
        for k, ridge in enumerate(ridges)
    }


def _ridges(name: str, options: FitOptions) -> Sequence[float]:
    """Return the ridges to fit: without a covariance there is none, for which 0 stands."""
    return options.ridges if ESTIMATORS[name].uses_covariance else [0.0]


def _sign(effect: Effect) -> int:
    return 1 if effect == "remove" else -1
