"""The write stage: a chosen trial as a file that llama.cpp loads, and the proof that the file has its effect.

The trial, what the fit left and facts of the run go in; `remove.gguf`, `remove-adapter.gguf` (or `induce…`)
and what was observed come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rs_gguf.engines.engine import Can, Engine
from rs_gguf.errors import GateError
from rs_gguf.methods import METHODS
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.records.rows import finite
from rs_gguf.records.trials import Trial
from rs_gguf.steering import file as steering_file
from rs_gguf.version import __version__


def write(
    paths: Sequence[Path],
    trial: Trial,
    recipe: Recipe,
    folder: Path,
    architecture: str,
    facts: Mapping[str, Any],
) -> None:
    """Write the files of a trial at scale 1.0, with their provenance.

    What they are made of is what the fit left in `folder`; `facts` are those of the run.
    """
    candidate, method = trial.candidate, METHODS[trial.candidate.method]
    fitted = method.load(folder, recipe.fit_options)
    found = method.files(fitted, candidate, architecture, _provenance(trial, facts))
    for path, file in zip(paths, found, strict=True):
        steering_file.write(file, path)


def proven(paths: Sequence[Path], model: Engine) -> dict[str, Any]:
    """What running each of the files of a trial on the model showed, as JSON.

    Raises:
        GateError: the effect of one was not observed.
    """
    if Can.LLAMA_CPP not in model.can:
        reason = "fitted on a Hugging Face folder; run `rs-export check --model` on its GGUF"
        return {
            "effect_observed": None, "largest_relative_error": None, "kl_mean": None, "reasons": [reason],
        }  # fmt: skip
    shown = []
    for path in paths:
        found = steering_file.prove(path, model)
        if not found.effect_observed:
            raise GateError(f"{path}: " + " ".join(found.reasons))
        shown.append(found)
    farthest = max(shown, key=lambda found: found.largest_relative_error)
    return {
        "effect_observed": True,
        "largest_relative_error": finite(farthest.largest_relative_error),
        "kl_mean": farthest.kl_mean,
        "reasons": list(farthest.reasons),
    }


def _provenance(trial: Trial, facts: Mapping[str, Any]) -> dict[str, Any]:
    place = trial.candidate
    return {
        "tool": f"rs-gguf {__version__}",
        "method": "Refusal Steering, arXiv 2512.16602",
        **facts,
        "estimator": place.recorded,
        **({"ridge.relative": place.ridge} if place.ridge else {}),  # 0: of an estimator that has none
        "layers": [place.first, place.last],
        "strength": place.strength,
        "margin": place.margin,
        "calibration": "scale 1.0 is the strength chosen on the tune split",
        "measured": False,
    }
