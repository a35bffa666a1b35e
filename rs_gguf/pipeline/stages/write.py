"""The write stage: a chosen trial as a file that llama.cpp loads, and the proof that the file has its effect.

The trial, what the fit left and facts of the run go in; `remove.gguf`, `remove-adapter.gguf` (or `induce…`)
and what was observed come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rs_gguf.engines.engine import Can, Engine
from rs_gguf.errors import GateError
from rs_gguf.methods import fit as fitting
from rs_gguf.methods.method import factors
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.records.rows import finite
from rs_gguf.records.trials import GATE, Trial
from rs_gguf.steering.file import prove
from rs_gguf.steering.file import write as write_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.version import __version__


def write(
    path: Path, trial: Trial, recipe: Recipe, folder: Path, architecture: str, facts: Mapping[str, Any]
) -> None:
    """Write a control vector or a gated adapter at scale 1.0, with its provenance.

    What it is made of is what the fit left in `folder`; `facts` are those of the run.
    """
    candidate, provenance = trial.candidate, _provenance(trial, facts)
    if candidate.estimator == GATE:
        gates = fitting.load_gates(folder)
        assert gates is not None  # a chosen adapter was made of them
        write_file(LoraAdapter(factors(gates, candidate), architecture, provenance), path)
    else:
        directions = fitting.load_directions(folder, recipe.fit_options)[candidate.estimator, candidate.ridge]
        steering = directions.steering(candidate)
        write_file(SteeringVector(steering, provenance, architecture), path)


def proven(path: Path, model: Engine) -> dict[str, Any]:
    """What running the file on the model showed, as JSON.

    Raises:
        GateError: the effect was not observed.
    """
    if Can.LLAMA_CPP not in model.can:
        reason = "fitted on a Hugging Face folder; run `rs-export check --model` on its GGUF"
        return {
            "effect_observed": None, "largest_relative_error": None, "kl_mean": None, "reasons": [reason],
        }  # fmt: skip
    found = prove(path, model)
    if not found.effect_observed:
        raise GateError(f"{path}: " + " ".join(found.reasons))
    return {
        "effect_observed": True,
        "largest_relative_error": finite(found.largest_relative_error),
        "kl_mean": found.kl_mean,
        "reasons": list(found.reasons),
    }


def _provenance(trial: Trial, facts: Mapping[str, Any]) -> dict[str, Any]:
    place = trial.candidate
    return {
        "tool": f"rs-gguf {__version__}",
        "method": "Refusal Steering, arXiv 2512.16602",
        **facts,
        "estimator": place.estimator,
        **({"ridge.relative": place.ridge} if place.ridge else {}),  # 0: of an estimator that has none
        "layers": [place.first, place.last],
        "strength": place.strength,
        "margin": place.margin,
        "calibration": "scale 1.0 is the strength chosen on the tune split",
        "measured": False,
    }
