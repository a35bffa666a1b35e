"""The fit stage: from captured arrays and judged answers to directions and gates, as files of a run folder.

`Samples` of the fit split enter; `directions.safetensors` (one unit direction and calibration a layer, for
each estimator and ridge), `gates.safetensors` (the adapter's reads and writes) and `fit.json` leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.adapter import Gates, WriterInputs, fit_gates
from rs_gguf.arrays import load_arrays, save_arrays
from rs_gguf.constrained import ContrastRidge, ResidualRidge, SafeRidge, SensitiveRidge
from rs_gguf.errors import InputError
from rs_gguf.estimators import (
    DirectionEstimator,
    MeanDifference,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)
from rs_gguf.files import write_json
from rs_gguf.judges import NEUTRAL
from rs_gguf.labels import Labels
from rs_gguf.layers import calibration_scales, layer_auroc, layer_scores
from rs_gguf.projection import project
from rs_gguf.prompts import KINDS, Prompt
from rs_gguf.recipe import Recipe
from rs_gguf.tuning import Directions

ESTIMATORS: dict[str, type[DirectionEstimator]] = {
    estimator.name: estimator
    for estimator in (
        MeanDifference,
        WeightedMeanDifference,
        RidgeMeanDifference,
        WeightedRidgeMeanDifference,
        UncentredWeightedRidgeMeanDifference,
        SensitiveRidge,
        ContrastRidge,
        SafeRidge,
        ResidualRidge,
    )
}


_SUITED = {"remove": ("contrast-wrmd", "safe-wrmd", "wrmd"), "induce": ("wrmd", "rmd")}


def estimators(recipe: Recipe) -> Sequence[str]:
    """Names of the estimators that are fitted: the recipe's, or those that suit its effect."""
    return recipe.fit.estimators or _SUITED[recipe.effect]


@dataclass(frozen=True)
class Samples:
    """The judged prompts of the fit split, and what was read of them.

    `activations` [N, L, D]; `confidence` [N]; `inputs` by matrix, empty where the engine cannot read them.
    """

    prompts: Sequence[Prompt]
    activations: NDArray[np.float32]
    confidence: NDArray[np.float64]
    inputs: Mapping[str, WriterInputs]

    @cached_property
    def kinds(self) -> list[str]:
        return [prompt.kind for prompt in self.prompts]

    @cached_property
    def groups(self) -> NDArray[np.str_]:
        """Cells whose means a safe direction or a gate must stay quiet on, [N, 3]."""
        return np.array([[p.topic, p.form, p.language] for p in self.prompts])

    def counts(self, kind: str) -> dict[str, int]:
        """How many of a kind were refused, answered and neither."""
        values = self.confidence[np.array([k == kind for k in self.kinds])]
        return {
            "refused": int((values > NEUTRAL).sum()),
            "answered": int((values < -NEUTRAL).sum()),
            "neutral": int((np.abs(values) <= NEUTRAL).sum()),
        }

    def check_classes(self, effect: str) -> None:
        """Raise `InputError` unless each class that is fitted on has a sample."""
        changed = ("sensitive", "refused" if effect == "remove" else "answered")
        for kind, side in (changed, ("benign", "answered"), ("harmful", "refused")):
            counts = self.counts(kind)
            if counts[side] == 0:
                raise InputError(
                    f"fit: none of the {sum(counts.values())} {kind} prompts was {side}: no class to fit on. "
                    f"Use more or other {kind} prompts (prompts.fit, prompts.{kind}) or another model."
                )


def fit(samples: Samples, recipe: Recipe, folder: Path, *, advance: Callable[[int], None]) -> None:
    """Fit everything the recipe names and write the three files. `advance` counts blocks, then estimators."""
    samples.check_classes(recipe.effect)
    names, ridges = estimators(recipe), recipe.fit.ridges
    shutil.rmtree(folder / "adapters", ignore_errors=True)  # that a search made of earlier gates
    paths = fit_paths(  # all in one call: estimators with the same classes share a factorisation
        samples.activations,
        samples.confidence,
        [ESTIMATORS[name]() for name in names],
        ridges=ridges,
        kinds=samples.kinds,
        groups=samples.groups,
    )
    found: dict[str, NDArray[Any]] = {}
    summary = []
    for name, path in zip(names, paths, strict=True):
        for k, ridge in enumerate(ridges):
            unit = path.directions[k]
            rows = unit[:, np.newaxis].astype(np.float32)
            projected = project(samples.activations, rows, path.offset)[:, :, 0]
            scales = calibration_scales(projected, samples.confidence)[1]
            found |= {f"{name}@{ridge:g}/unit": unit, f"{name}@{ridge:g}/scales": scales}
            summary.append(
                {
                    "estimator": name,
                    "ridge": ridge,
                    "score": layer_scores(projected, samples.confidence).tolist(),
                    "auroc": layer_auroc(projected, samples.confidence).tolist(),
                    "harm_cosine": path.harm_cosine[k].tolist(),
                }
            )
        advance(1)
    save_arrays(folder / "directions.safetensors", found, {})
    if samples.inputs:
        labels = Labels.of(samples.confidence, samples.kinds, samples.groups)
        gates = fit_gates(
            samples.inputs,
            samples.activations,
            labels,
            ridges=recipe.fit.gate_ridges,
            induce=recipe.effect == "induce",
            advance=advance,
        )
        reads = {
            f"{name}/{writer}": rows.astype(np.float32)
            for name, found in (("opens", gates.opens), ("shuts", gates.shuts))
            for writer, rows in found.items()
        }
        arrays = {"ridges": gates.ridges, "contrast": gates.contrast, **reads}
        save_arrays(folder / "gates.safetensors", arrays, {})
    else:
        (folder / "gates.safetensors").unlink(missing_ok=True)
    counts = {kind: samples.counts(kind) for kind in KINDS}
    write_json(folder / "fit.json", {"samples": counts, "directions": summary})


def load_directions(folder: Path, recipe: Recipe) -> dict[tuple[str, float], Directions]:
    """What `fit` wrote, by estimator and ridge: what a vector takes away, so reversed to induce refusals."""
    arrays = load_arrays(folder / "directions.safetensors")
    sign = 1 if recipe.effect == "remove" else -1
    return {
        (name, ridge): Directions(sign * arrays[f"{name}@{ridge:g}/unit"], arrays[f"{name}@{ridge:g}/scales"])
        for name in estimators(recipe)
        for ridge in recipe.fit.ridges
    }


def load_gates(folder: Path) -> Gates | None:
    """The adapter's gates that `fit` wrote, or None where the engine could not read what they need."""
    path = folder / "gates.safetensors"
    if not path.is_file():
        return None
    arrays = load_arrays(path)
    opens, shuts = (
        {name.removeprefix(way): a.astype(np.float64) for name, a in arrays.items() if name.startswith(way)}
        for way in ("opens/", "shuts/")
    )
    return Gates(arrays["ridges"], opens, shuts, arrays["contrast"])
