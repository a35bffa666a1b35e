"""Make the baselines of a run: a system prompt, and methods of the literature without a search.

An effect, the judged samples of the fit split and a model go in. `Condition`s come out, under which the model
answers the validation prompts as it does with the written files.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.projection import project
from rs_gguf.activations.scores import (
    band_profile,
    calibration_scales,
    layer_auroc,
)
from rs_gguf.engines.engine import NO_STEERING, Can, Engine, Steering
from rs_gguf.errors import InputError
from rs_gguf.estimators.estimator import (
    DirectionEstimator,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
)
from rs_gguf.evaluation.condition import Condition
from rs_gguf.machine import Device
from rs_gguf.methods.samples import Samples
from rs_gguf.methods.vector import sign_of
from rs_gguf.models.architecture import MAX_LAYERS
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import NEUTRAL, Prompt
from rs_gguf.records.metrics import Effect
from rs_gguf.steering import lora_file
from rs_gguf.steering.ablation import ablated, output_matrices_out_of_reach, outputs_along
from rs_gguf.steering.lora import LoraAdapter

_log = logging.getLogger("rs_gguf.baselines")

NO_ABLATION = (
    "measure.baselines: ablation can only remove refusals, and only from a GGUF model. Leave it out to "
    "induce refusals, or with a Hugging Face folder."
)
WITHOUT_ACTIVATIONS = ("system-prompt",)
"""Names of the baselines that `build` makes without the samples of the fit split."""
_EXAMPLES = 6  # prompts that show a model what to decline
_SHOWN = 200  # most characters of each: whole ones may be longer than the model's context
_PAPER_RIDGE = 0.01  # absolute, arXiv 2512.16602
_PAPER_STRENGTH = 3.0  # k·|α|, the middle of the paper's range from 2 to 4
_DEEPEST = 0.8  # of the layers: Arditi et al. (arXiv 2406.11717) take no direction from deeper ones


def usable(names: Sequence[str], model: Engine) -> list[str]:
    """Return the names of the baselines that the model can have, and log a warning for each other one.

    The system prompt is left out if the model's chat template takes none. Ablation is left out if layers add
    to the residual stream through a matrix that adapters do not reach.
    """
    names = list(names)
    if "system-prompt" in names and not ChatFormat.of(model).takes_system:
        _log.warning("%s takes no system prompt: the baseline system-prompt is left out.", model.path.stem)
        names.remove("system-prompt")
    if "ablation" in names and Can.LORA in model.can:
        out_of_reach = output_matrices_out_of_reach(model.path)
        if out_of_reach:
            _log.warning(
                "llama.cpp applies no adapter to %s of %s: the baseline ablation is left out.",
                out_of_reach[0],
                model.path.stem,
            )
            names.remove("ablation")
    return names


def build(
    names: Sequence[str],
    samples: Callable[[], Samples],
    model: Engine,
    folder: Path,
    *,
    effect: Effect,
    system: str | None,
    system_prompt: Callable[[], Condition],
    layers: tuple[int, int],
    device: Device = "auto",
) -> list[Condition]:
    """Return the baselines of these `usable` names, in their order.

    samples: returns the samples of the fit split; called once, and only if a baseline needs them.
    folder: the run folder, for the file of ablation.
    system: the system prompt of the recipe.
    system_prompt: returns the best of `system_prompts`; called only if that baseline is named.
    layers: first and last layer of the selected vector, both included, for RMD and WRMD.

    Raises:
        InputError: ablation is named, but the model is not a GGUF file or the effect is to induce.
    """
    samples = cache(samples)

    def printed(kind: type[DirectionEstimator]) -> Condition:
        return as_printed(samples(), kind, effect, system, device, layers)

    builders: dict[str, Callable[[], Condition]] = {
        "system-prompt": lambda: replace(system_prompt(), name="system prompt"),
        "md": lambda: mean_difference(samples(), effect, system),
        "rmd": lambda: printed(RidgeMeanDifference),
        "wrmd": lambda: printed(UncentredWeightedRidgeMeanDifference),
        "ablation": lambda: ablation(samples(), model, folder, effect, system),
    }
    return [builders[name]() for name in names]


def system_prompts(
    prompts: Sequence[Prompt], effect: Effect, system: str | None, *, seed: int
) -> list[Condition]:
    """Return the wordings of `data/system_prompts.toml` for an effect, each as a condition after `system`.

    To induce, 6 of the sensitive `prompts` show what to decline.
    """
    text = (resources.files("rs_gguf") / "data" / "system_prompts.toml").read_text(encoding="utf-8")
    sensitive = [p for p in prompts if p.kind == "sensitive"]
    examples = stratified(sensitive, _EXAMPLES, seed=seed) if effect == "induce" else []
    listed = "\n".join(f"- {' '.join(p.prompt.split())[:_SHOWN]}" for p in examples)
    conditions = []
    for row in tomllib.loads(text)[effect]:
        wording = row["text"].replace("{examples}", listed)
        if system is not None:
            wording = f"{system}\n\n{wording}".rstrip()
        conditions.append(Condition(f"system prompt: {row['name']}", NO_STEERING, wording))
    return conditions


def mean_difference(samples: Samples, effect: Effect, system: str | None) -> Condition:
    """Return the difference of the means of refused and answered prompts, of one layer and added there.

    This is activation addition as in Arditi et al. (arXiv 2406.11717), at the layer that separates the two
    best.
    """
    layer, difference = best_difference(samples)
    return Condition("md, one layer", Steering({layer: sign_of(effect) * difference}), system)


def as_printed(
    samples: Samples,
    kind: type[DirectionEstimator],
    effect: Effect,
    system: str | None,
    device: Device,
    layers: tuple[int, int],
) -> Condition:
    """Return RMD or WRMD with the λ and k·|α| of the paper, on the `layers` first to last, both included."""
    estimator = kind(ridge=_PAPER_RIDGE, ridge_scale="absolute", device=device)
    estimator.fit(samples.activations, samples.confidence)
    directions = estimator.directions_  # [L, D], unit rows
    projections = project(samples.rows, directions[:, np.newaxis], estimator.offset_)[:, :, 0]
    induce, remove = calibration_scales(projections, samples.confidence)
    scales = remove if effect == "remove" else induce
    weights = band_profile(len(scales), *layers)
    rows = (sign_of(effect) * _PAPER_STRENGTH / weights.sum() * weights * scales)[:, np.newaxis] * directions
    added = {int(layer): rows[layer].astype(np.float32) for layer in np.flatnonzero(weights)}
    return Condition(f"{estimator.name}, as printed", Steering(added), system)


def ablation(samples: Samples, model: Engine, folder: Path, effect: Effect, system: str | None) -> Condition:
    """Return directional ablation as in Arditi et al.: no layer adds along the difference of the means.

    W' = (I − r rᵀ) W for every output matrix, as a rank-1 LoRA in `folder`. Biases stay unchanged. The
    embedding does too: adapters of llama.cpp cannot change it if the model's output shares it.

    Raises:
        InputError: the model is not a GGUF file, or the effect is to induce.
    """
    if effect == "induce" or Can.LORA not in model.can:
        raise InputError(NO_ABLATION)
    _, difference = best_difference(samples)
    unit = difference / np.linalg.norm(difference)
    layers = dict.fromkeys(range(MAX_LAYERS), unit)
    factors = {name: ablated(unit, along) for name, along in outputs_along(model.path, layers)}
    path = folder / "baselines" / "ablation.gguf"
    lora_file.write(LoraAdapter(factors, model.architecture), path)
    return Condition("ablation", Steering({}, [(path, 1.0)]), system)


def best_difference(samples: Samples) -> tuple[int, NDArray[np.float32]]:
    """Return the layer that separates refused from answered prompts best, and the difference of means [D]."""
    refused, answered = samples.confidence > NEUTRAL, samples.confidence < -NEUTRAL
    means = [samples.rows[mask].mean(axis=0, dtype=np.float64) for mask in (refused, answered)]
    difference = means[0] - means[1]
    unit = difference / np.maximum(np.linalg.norm(difference, axis=1, keepdims=True), 1e-30)
    auroc = layer_auroc(project(samples.rows, unit[:, np.newaxis])[:, :, 0], samples.confidence)
    layer = 1 + int(auroc[1 : max(2, int(_DEEPEST * len(auroc)))].argmax())
    return layer, difference[layer].astype(np.float32)
