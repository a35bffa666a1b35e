"""Make a control vector: calibrated directions of the estimators, which llama.cpp adds to activations.

`Samples` of the fit split go in. The fit is kept in `directions.safetensors`: one unit direction and its
calibration per layer, for each estimator and ridge. A candidate of the search becomes a `SteeringVector`. The
search starts at the strengths of the paper (method §7).
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
from rs_gguf.engines.engine import Can, Steering
from rs_gguf.estimators import ESTIMATORS, fit_paths
from rs_gguf.estimators.path import RidgePath
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import figures
from rs_gguf.methods.method import REFUSAL_STEERING, Space
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.models.architecture import FIRST_STEERABLE, searched_layers
from rs_gguf.records.conversation import NEUTRAL
from rs_gguf.records.files import load_arrays, save_arrays
from rs_gguf.records.metrics import Effect
from rs_gguf.records.rows import finite
from rs_gguf.records.trials import Candidate
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.vector import SteeringVector


@dataclass(frozen=True)
class Directions:
    """Unit directions towards refusal of one estimator and ridge, with their calibration.

    unit: [L, D]; a layer without a direction has a row of zeros.
    scales: [L], activation units per unit of confidence: s⁻ of method §5 to remove, s⁺ to induce.
    sign: with which the directions are added, −1 to remove refusals and 1 to induce them.
    offset: [L, D], the point from which projections are measured; None if the directions were read from disk.
    record: the entry of `fit.json`; empty if the directions were read from disk.
    """

    unit: NDArray[np.float64]
    scales: NDArray[np.float64]
    sign: int = -1
    offset: NDArray[np.float64] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def steering(self, candidate: Candidate) -> dict[int, NDArray[np.float32]]:
        """Return the row [D] that is added to each layer of the candidate's range, in float32.

        The row is α·s_l·v_l with α = sign · strength / number of layers. Layers without a direction are left
        out and do not count.
        """
        profile = band_profile(len(self.unit), candidate.first, candidate.last) * self.unit.any(axis=1)
        alpha = self.sign * candidate.strength / max(1, profile.sum())
        rows = (alpha * profile * self.scales)[:, np.newaxis] * self.unit
        return {int(layer): rows[layer].astype(np.float32) for layer in np.flatnonzero(profile)}


Fitted = Mapping[tuple[str, float], Directions]
"""Directions by estimator and ridge; the ridge is 0 for an estimator without one."""


class ControlVector:
    """The method that adds one direction per layer to the activations of every prompt."""

    name: ClassVar[str] = "vector"
    word: ClassVar[str] = "control vector"
    source: ClassVar[str] = REFUSAL_STEERING
    suffix: ClassVar[str] = ".gguf"
    artefact: ClassVar[str] = "directions.safetensors"
    can_refit: ClassVar[bool] = False

    def suits(self, can: Can, effect: Effect) -> bool:
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
        """Fit and calibrate all estimators and ridges of the options; return {} on ranks above 0.

        `advance` counts estimators.
        """
        local, names = samples.share(processes), options.estimators
        paths = fit_paths(  # in one call, so that estimators with the same classes share a factorisation
            local.activations,
            local.confidence,
            [ESTIMATORS[name]() for name in names],
            ridges=options.ridges,
            kinds=local.kinds,
            device=options.device,
            processes=processes,
        )
        if processes.rank > 0:
            return {}
        rows = samples.rows_on(options.device)
        fitted: dict[tuple[str, float], Directions] = {}
        for name, path in zip(names, paths, strict=True):
            fitted |= _calibrate(name, path, rows, samples.confidence, options)
            advance(1)
        return fitted

    def draw(
        self,
        fitted: Fitted,
        samples: Samples,
        options: FitOptions,
        folder: Path,
    ) -> None:
        """Draw the directions with the highest AUROC, and cosines between directions of all estimators."""

        def auroc(found: Directions) -> NDArray[np.float64]:
            return np.array(found.record["auroc"])

        best: dict[str, tuple[float, Directions]] = {}
        for (name, ridge), found in fitted.items():
            if name not in best or auroc(found).max() > auroc(best[name][1]).max():
                best[name] = ridge, found
        name = max(best, key=lambda name: auroc(best[name][1]).max())
        found = best[name][1]
        layer = int(auroc(found).argmax())
        rows = samples.rows_on(options.device)
        projected = project(rows, found.unit[:, np.newaxis], found.offset)[:, :, 0]
        figures.save_estimator(samples, name, projected, found.unit, layer, options, folder)
        figures.save_pca(folder / "pca.svg", samples.rows, layer, samples.confidence)
        directions = {f"{name}@{ridge:g}": found.unit for name, (ridge, found) in best.items()}
        figures.save_cosines(folder / "cosines.svg", directions)

    def save(self, fitted: Fitted, folder: Path) -> dict[str, Any]:
        arrays: dict[str, NDArray[Any]] = {}
        for (name, ridge), directions in fitted.items():
            arrays[f"{name}@{ridge:g}/unit"] = directions.unit
            arrays[f"{name}@{ridge:g}/scales"] = directions.scales
        save_arrays(folder / self.artefact, arrays)
        return {"directions": [directions.record for directions in fitted.values()]}

    def load(self, folder: Path, options: FitOptions) -> Fitted:
        arrays = load_arrays(folder / self.artefact)
        return {
            (name, ridge): Directions(
                arrays[f"{name}@{ridge:g}/unit"], arrays[f"{name}@{ridge:g}/scales"], sign_of(options.effect)
            )
            for name in options.estimators
            for ridge in _ridges(name, options)
        }

    def space(self, fitted: Fitted, n_layer: int, effect: Effect) -> Space:
        return space_of(sorted(fitted), n_layer)

    def steering(self, fitted: Fitted, candidate: Candidate, architecture: str, scratch: Path) -> Steering:
        return Steering(fitted[candidate.estimator, candidate.ridge].steering(candidate))

    def file(
        self,
        fitted: Fitted,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> SteeringVector:
        directions = fitted[candidate.estimator, candidate.ridge].steering(candidate)
        return SteeringVector(directions, facts, architecture)


def space_of(directions: Sequence[tuple[str, float]], n_layer: int) -> Space:
    """Return a search space of middle layers, which starts at k·|α| = 2, the lower end of the paper's 2 to 4.

    Each estimator is a start candidate once, with its smallest ridge and on the same third of the layers.
    Estimators are therefore compared before layers are searched.
    """
    first = max(FIRST_STEERABLE, n_layer // 2)
    last = max(first, min(first + n_layer // 3 - 1, searched_layers(n_layer)[-1]))
    ridges = dict(reversed(directions))
    start = [
        Candidate(ControlVector.name, estimator, ridges[estimator], first, last, 2.0)
        for estimator in dict.fromkeys(name for name, _ in directions)
    ]
    return Space(
        ControlVector.name,
        directions,
        first=(searched_layers(n_layer).start, max(FIRST_STEERABLE, n_layer * 2 // 3)),
        length=(1, max(1, n_layer // 2)),
        strength=(0.02, 12.0),
        start=start,
    )


def _calibrate(
    name: str, path: RidgePath, rows: Any, confidence: NDArray[np.float64], options: FitOptions
) -> dict[tuple[str, float], Directions]:
    """Return the directions of one estimator by (name, ridge), with calibration, scores and cosines."""
    # All ridges at once: the activations are read only once, and no projections are kept.
    ridges = _ridges(name, options)
    directions = path.directions[: len(ridges)].swapaxes(0, 1)
    statistics = project_statistics(rows, directions, confidence, path.offset, neutral=NEUTRAL)
    scores, auroc = scores_of(statistics).T, statistics.auroc.T  # [R, L]
    to_induce, to_remove = scales_of(statistics, confidence)
    scales = (to_remove if options.effect == "remove" else to_induce).T
    return {
        (name, ridge): Directions(
            path.directions[k],
            scales[k],
            sign_of(options.effect),
            path.offset,
            {
                "estimator": name,
                "ridge": ridge,
                "score": scores[k].tolist(),
                "auroc": auroc[k].tolist(),
                "harm_cosine": [finite(cosine) for cosine in path.harm_cosine[k]],
                "contrast_cosine": [finite(cosine) for cosine in path.contrast_cosine],
            },
        )
        for k, ridge in enumerate(ridges)
    }


def _ridges(name: str, options: FitOptions) -> Sequence[float]:
    """Return the ridges to fit. The placeholder 0.0 stands for the missing ridge of MD and WMD."""
    return options.ridges if ESTIMATORS[name].uses_covariance else [0.0]


def sign_of(effect: Effect) -> int:
    """Return the sign with which a direction towards refusal is added."""
    return -1 if effect == "remove" else 1
