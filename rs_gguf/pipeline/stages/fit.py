"""The fit stage: from captured arrays and judged answers to what each method fits, as files of a run folder.

`Samples` of the fit split enter; `directions.safetensors` (one unit direction and calibration a layer, for
each estimator and ridge), `gated_adapter.safetensors` (the adapter's reads and writes), `fit.json` and `figures/`
leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.activations.capture import captured
from rs_gguf.activations.store import DamagedStoreError
from rs_gguf.engines.engine import Can
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import resolve_device
from rs_gguf.machine import ALONE, Processes, usable_cores
from rs_gguf.methods import METHODS
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline.costs import Cost, Costs
from rs_gguf.pipeline.speed import cholesky, factorisation
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.answers import judged
from rs_gguf.pipeline.stages.capture import store_of
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.rows import write_json

# What a fit costs besides its products and factorisations.
_NUMBER = 1500  # operations of the fit's speed to read a number, convert and weight it
_FIGURES = 1.5  # seconds for the figures of an estimator, on one core
_CLASS = 2 / 3  # share of the samples in the class whose covariance is used
_FITS = 1 + 5 * 0.8  # of an estimator: on all samples, and on four fifths of them for each fold


class Fit(Stage):
    """Directions of all estimators, and gates where the engine can read what they need."""

    info = STAGES["fit"]
    shared = True

    def inputs(self, run: Run) -> list[Any]:
        recipe, device = run.recipe, resolve_device(run.recipe.fit.device).type
        fit = recipe.fit.model_dump(exclude={"device"})
        return [
            recipe.effect,
            # Runs from before there was a device were fitted on the CPU: they are still done.
            fit if device == "cpu" else {**fit, "device": device},
            # Subjects, topics and forms count: a gate weighs by them, and a search samples by them.
            [p.to_row() for p in run.prompts["fit"] + run.gate_only + run.prompts["tune"]],
        ]

    def work(self, run: Run, key: str) -> None:
        options, n_layer = run.recipe.fit_options, run.model.n_layer
        suited = [method for method in METHODS.values() if method.suits(run.model)]
        total = sum(method.steps(options, n_layer) for method in suited)
        with run.progress.stage(self.info.name, total) as advance:
            fit(samples(run), options, run.folder.path, processes=run.processes, advance=advance)

    def cost(self, costs: Costs) -> Cost:
        """Return the cost of all layers, in parallel: an eigendecomposition for each estimator and fold,
        and a Cholesky factor for each matrix that a gate reads, on the CPU.
        """
        n, model, choices = costs.count("fit"), costs.model, costs.recipe.fit
        estimators = len(costs.recipe.estimators)
        rows = n + costs.gate_only + costs.other_tokens() + costs.prefix
        operations = (
            estimators * _FITS * (factorisation(n * _CLASS, model.width) + n * _CLASS * model.width * _NUMBER)
        )
        operations += sum(
            cholesky(rows, width) + rows * width * _NUMBER for width in model.output_matrices.values()
        )
        seconds = model.n_layer * operations / costs.speed.algebra + estimators * _FIGURES
        # Every core has the samples of a layer's matrix in float64 twice, and so its product.
        widest = max([model.width, *model.output_matrices.values()])
        layer = 8 * (2 * rows * widest + 2 * min(rows, widest) ** 2)
        arrays = 8 * estimators * len(choices.ridges) * model.n_layer * model.width
        arrays += 2 * 4 * len(choices.gate_ridges) * costs.inputs
        return Cost(seconds, costs.memory() + min(usable_cores(), model.n_layer) * layer, arrays)


def fit(
    samples: Samples,
    options: FitOptions,
    folder: Path,
    *,
    processes: Processes = ALONE,
    advance: Callable[[int], None],
) -> None:
    """Fit and draw all that the options name, write the files. `advance` counts steps of the methods.

    Several `processes` call this together, each with all samples. They share the moments; rank 0 does the
    rest and writes.
    """
    samples.check_classes(options.effect)
    fitted = {
        name: method.fit(samples, options, processes=processes, advance=advance)
        for name, method in METHODS.items()
    }
    if processes.rank > 0:
        return
    for stale in ("adapters", "figures"):  # of a search, or of estimators, that are no more
        shutil.rmtree(folder / stale, ignore_errors=True)
    record: dict[str, Any] = {}
    for name, method in METHODS.items():
        found = fitted[name]
        if found is None:
            (folder / method.artefact).unlink(missing_ok=True)
            continue
        record |= method.save(found, folder)
        method.draw(found, samples, options, folder / "figures", advance=advance)
    counts = {kind: samples.counts(kind) for kind in KINDS}
    read = {kind: sum(prompt.kind == kind for prompt in samples.others) for kind in KINDS}
    write_json(folder / "fit.json", {"samples": counts, "others": read, **record})


def load(folder: Path, options: FitOptions) -> dict[str, Any]:
    """Return what each method fitted, by its name; a method that was not fitted is left out."""
    loaded = {name: method.load(folder, options) for name, method in METHODS.items()}
    return {name: found for name, found in loaded.items() if found is not None}


def samples(run: Run) -> Samples:
    """Return the fit prompts with what was captured of them, those first whose answers could be judged.

    Raises:
        InputError: no answer could be judged.
        DamagedStoreError: what was captured was changed, or belongs to another recipe or version.
    """
    asked, scores = [(p, "") for p in run.prompts["fit"]], judged(run.folder)
    asked += [(p, context.name) for p, context in run.in_contexts]
    known = np.array([p.id in scores for p, _ in asked])
    those_judged, others = np.flatnonzero(known), np.flatnonzero(~known)
    if not those_judged.size:
        raise InputError(
            f"fit: none of the {len(run.prompts['fit'])} answers could be judged; judgements.jsonl says "
            "why. Answers that end within a thinking trace need more room: raise answers.tokens."
        )
    key = run.key("capture")
    try:
        activations, inputs = captured(
            store_of(run.folder, key), len(asked), inputs=Can.MATRIX_INPUTS in run.model.can
        )
    except DamagedStoreError:
        # Not that of another recipe or version: what is there is whole for it.
        if run.folder.is_done("capture", key):
            run.folder.forget("capture")
        raise
    return Samples(
        [asked[i][0] for i in those_judged],
        activations.take(those_judged),
        np.array([scores[asked[i][0].id]["confidence"] for i in those_judged]),
        {name: rows.of(np.concatenate([those_judged, others])) for name, rows in inputs.items()},
        run.folder.path,
        [asked[i][0] for i in others],
        [scores[asked[i][0].id]["category"] for i in those_judged],
        [asked[i][1] for i in others],
    )
