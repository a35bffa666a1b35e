"""The write stage: write the selected trial of each method as a file that llama.cpp loads; check its effect.

The trials, the fit and facts of the run go in; `remove.gguf`, `remove-adapter.gguf` (or `induce…`) and
`effect_check.json` come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rs_gguf.engines.engine import Can, Engine
from rs_gguf.errors import VerificationError
from rs_gguf.methods import METHODS
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.costs import Cost, Costs
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.tune import chosen
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.rows import finite, write_json
from rs_gguf.records.trials import Trial
from rs_gguf.steering import file as steering_file
from rs_gguf.version import __version__


class Write(Stage):
    """The stage that writes the files, loads each again and checks its effect on the model."""

    info = STAGES["write"]

    def inputs(self, run: Run) -> list[Any]:
        return []

    def work(self, run: Run, key: str) -> None:
        trials = chosen(run.folder)
        checks: dict[str, Any] = {}
        with run.progress.stage(self.info.name, len(trials)) as advance:
            for name, trial in trials.items():
                write_file(run, name, trial)
                checks[name] = effect_of(path_of(run, name), run.model)
                advance(1)
        write_json(run.folder / "effect_check.json", checks)

    def cost(self, costs: Costs) -> Cost:
        """Return the cost of the files and of their effect checks.

        A check runs whole passes, and passes that end at the observed layer: half of the layers on average.
        """
        n_layer, file = costs.model.n_layer, 2 * (costs.prefix + 4 * costs.prompt)
        read = costs.files * file + (n_layer / 3 + 1) * (costs.prefix + 2 * costs.prompt) / 2
        if costs.model.output_matrices:
            read += 6 * file / 2  # six matrices, steered and unsteered
        vector = 4 * n_layer / 3 * costs.model.width
        return Cost(costs.reading(read), costs.memory(logits=True), vector + costs.adapter(), read)


def path_of(run: Run, name: str) -> Path:
    """Return the path of the file of a method."""
    return run.folder / f"{run.recipe.effect}{METHODS[name].suffix}"


def write_file(run: Run, name: str, trial: Trial) -> None:
    """Write the file of the selected trial of a method."""
    recipe = run.recipe
    facts = {
        "effect": recipe.effect,
        "model.name": models.name_of(recipe.model, run.model_path),
        "model.sha256": run.model_hash,
    }
    write(path_of(run, name), trial, recipe, run.folder.path, run.model.architecture, facts)


def write(
    path: Path,
    trial: Trial,
    recipe: Recipe,
    folder: Path,
    architecture: str,
    facts: Mapping[str, Any],
) -> None:
    """Write the file of a trial for scale 1.0, with its provenance.

    folder: the run folder with the fit.
    facts: facts of the run, for the provenance.
    """
    candidate, method = trial.candidate, METHODS[trial.candidate.method]
    fitted = method.load(folder, recipe.fit_options)
    file = method.file(fitted, candidate, architecture, _provenance(trial, facts))
    steering_file.write(file, path)


def effect_of(path: Path, model: Engine) -> dict[str, Any]:
    """Check the effect of a file on the model; return the result as JSON values.

    The values are None with a Hugging Face folder, which does not load the file.

    Raises:
        VerificationError: the effect was not observed.
    """
    if Can.LLAMA_CPP not in model.can:
        reason = "fitted on a Hugging Face folder; run `rs-export check --model` on its GGUF"
        return {
            "effect_observed": None, "largest_relative_error": None, "kl_mean": None, "reasons": [reason],
        }  # fmt: skip
    check = steering_file.check_effect(path, model)
    if not check.effect_observed:
        raise VerificationError(f"{path}: " + " ".join(check.reasons))
    return {
        "effect_observed": True,
        "largest_relative_error": finite(check.largest_relative_error),
        "kl_mean": check.kl_mean,
        "reasons": list(check.reasons),
    }


def _provenance(trial: Trial, facts: Mapping[str, Any]) -> dict[str, Any]:
    candidate = trial.candidate
    return {
        "tool": f"rs-gguf {__version__}",
        "method": METHODS[candidate.method].source,
        **facts,
        "estimator": candidate.recorded,
        **({"ridge.relative": candidate.ridge} if candidate.ridge else {}),  # 0: the estimator has no ridge
        "layers": [candidate.first, candidate.last],
        "strength": candidate.strength,
        "benign_target": candidate.benign_target,
        "calibration": "scale 1.0 is the strength chosen on the tune split",
        "measured": False,
    }
