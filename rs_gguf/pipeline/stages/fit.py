"""The fit stage: fit each method on the captured activations and judged answers.

`Samples` of the fit split go in. `directions.safetensors` (a unit direction and its calibration per layer,
estimator and ridge), `gated_adapter.safetensors` (gate vectors and contrast), `fit.json` and `figures/` come
out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.capture import captured
from rs_gguf.activations.store import DamagedStoreError
from rs_gguf.engines.engine import Can
from rs_gguf.errors import InputError
from rs_gguf.machine import ALONE, Processes, layers_at_once
from rs_gguf.methods import METHODS, suited_methods
from rs_gguf.methods.gate_vectors import HARMFUL_TARGET_RATIO
from rs_gguf.methods.gates import OFF_TARGET_WEIGHT, TOPIC_SAMPLES
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline.costs import Cost, Costs
from rs_gguf.pipeline.speed import cholesky, factorisation
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.answers import judged
from rs_gguf.pipeline.stages.capture import matrices_of, store_of
from rs_gguf.pipeline.stages.refit import refit
from rs_gguf.prompts.contexts import Context
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.metrics import Effect
from rs_gguf.records.rows import write_json

_REFUSAL_ASKED = "refusal asked"  # topic of sensitive prompts whose system prompt asks for a refusal

# Costs of a fit besides its products and factorisations.
_NUMBER = 1500  # operations to read, convert and weight one number
_FIGURES = 2.0  # seconds for the figures, on one core
_CLASS = 2 / 3  # share of the samples in the class whose covariance is used
_COVARIANCES = 4  # of the nine default estimators, which share them
_FOLDS = 5 * 0.8  # the estimator that is drawn is fitted again on four fifths for each of 5 folds


class Fit(Stage):
    """The stage that fits directions, and gate vectors if the engine can capture inputs of matrices."""

    info = STAGES["fit"]
    shared = True

    def inputs(self, run: Run) -> list[Any]:
        return [
            run.recipe.effect,
            run.recipe.fit.model_dump(exclude={"device"}),  # float64 everywhere: a fit may change the machine
            # Topics and forms are inputs: gate vectors weight by them, and the search samples by them.
            [p.to_row() for p in run.prompts["fit"] + run.gate_only + run.prompts["tune"]],
            # A fit of a version with other constants is done again.
            [HARMFUL_TARGET_RATIO, OFF_TARGET_WEIGHT, TOPIC_SAMPLES],
        ]

    def work(self, run: Run, key: str) -> None:
        options, n_layer, refits = run.recipe.fit_options, run.model.n_layer, run.recipe.fit.gate_refits
        if refits and run.processes.count > 1:
            raise InputError(
                "fit.gate_refits: several processes cannot refit. Start one process, or set it to 0."
            )
        suited = suited_methods(run.model.can, options.effect)
        again = [name for name in suited if METHODS[name].can_refit] * refits
        total = sum(METHODS[name].steps(options, n_layer) for name in (*suited, *again))
        with run.progress.stage(self.info.name, total) as advance:
            found, folder = samples(run), run.folder.path
            fit(found, options, folder, suited, processes=run.processes, advance=advance)
            order = np.concatenate(sample_order(run))
            for name in again:
                fitted = METHODS[name].load(folder, options)
                if fitted is not None:
                    fitted = refit(run, name, fitted, found, order, options, advance=advance)
                    METHODS[name].save(fitted, folder)

    def cost(self, costs: Costs) -> Cost:
        """Return the cost on the CPU, with layers in parallel.

        Each layer needs an eigendecomposition per covariance and fold, and a Cholesky factor per output
        matrix.
        """
        n, model, choices = costs.count("fit"), costs.model, costs.recipe.fit
        widths = model.output_matrices
        estimators = len(costs.recipe.estimators)
        rows = n + costs.gate_only + costs.other_tokens() + costs.prefix
        decompositions = min(estimators, _COVARIANCES) + _FOLDS
        operations = decompositions * (
            factorisation(n * _CLASS, model.width) + n * _CLASS * model.width * _NUMBER
        )
        refits = (costs.files - 1) * choices.gate_refits  # of all methods except the control vector
        total = model.n_layer * operations + (costs.files - 1 + refits) * sum(
            len(layers) * (cholesky(rows, widths[matrix]) + rows * widths[matrix] * _NUMBER)
            for matrix, layers in model.searched_matrices.items()
        )
        seconds = total / costs.speed.algebra + _FIGURES
        limit = costs.recipe.answers.fit_tokens  # a refit also answers and judges the prompts
        seconds += refits * (costs.answers(n, limit) + costs.judgements(n, limit))
        # A layer holds two float64 copies of its samples and two of their product while it is fitted.
        widest = max([model.width, *widths.values()])
        layer = 8 * (2 * rows * widest + 2 * min(rows, widest) ** 2)
        arrays = 8 * estimators * len(choices.ridges) * model.n_layer * model.width
        arrays += 2 * 4 * len(choices.gate_ridges) * costs.inputs
        return Cost(seconds, costs.memory() + min(layers_at_once(widest), model.n_layer) * layer, arrays)


def fit(
    samples: Samples,
    options: FitOptions,
    folder: Path,
    suited: Sequence[str] = tuple(METHODS),
    *,
    processes: Processes = ALONE,
    advance: Callable[[int], None],
) -> None:
    """Fit and draw the `suited` methods, and write the files of the stage. `advance` counts their steps.

    Several `processes` call this together, each with all samples. They share the sums over samples; rank 0
    does the rest and writes.

    Raises:
        InputError: a class has no sample, or the samples cannot be fitted.
    """
    samples.check_classes(options.effect)
    fitted = {
        name: METHODS[name].fit(samples, options, processes=processes, advance=advance) for name in suited
    }
    if processes.rank > 0:
        return
    for stale in ("adapters", "figures"):  # of an earlier search, and of estimators of an earlier fit
        shutil.rmtree(folder / stale, ignore_errors=True)
    record: dict[str, Any] = {}
    for name, method in METHODS.items():
        fit_of_method = fitted.get(name)
        if fit_of_method is None:
            (folder / method.artefact).unlink(missing_ok=True)
            continue
        record |= method.save(fit_of_method, folder)
        method.draw(fit_of_method, samples, options, folder / "figures")
    counts = {kind: samples.counts(kind) for kind in KINDS}
    write_json(folder / "fit.json", {"samples": counts, **record})


def load(folder: Path, options: FitOptions) -> dict[str, Any]:
    """Return the fit of each method by its name, without methods that were not fitted."""
    loaded = {name: method.load(folder, options) for name, method in METHODS.items()}
    return {name: fitted for name, fitted in loaded.items() if fitted is not None}


def samples(run: Run) -> Samples:
    """Return the fit prompts with their captured activations; prompts with a judged answer come first.

    Raises:
        InputError: no answer could be judged.
        DamagedStoreError: the captured activations were changed, or belong to another recipe or version.
    """
    prompts = [(p, "") for p in run.prompts["fit"]]  # with the name of the context
    prompts += [(fitted_as(p, context, run.recipe.effect), context.name) for p, context in run.in_contexts]
    judgements = judged(run.folder)
    judged_indices, other_indices = sample_order(run)
    if not judged_indices.size:
        raise InputError(
            f"fit: none of the {len(run.prompts['fit'])} answers could be judged; at least one is needed. "
            "judgements.jsonl gives the reasons. If answers end within a thinking trace, raise "
            "answers.fit_tokens."
        )
    key, reads = run.key("capture"), Can.MATRIX_INPUTS in run.model.can
    try:
        store = store_of(run.folder, key)
        activations, inputs = captured(store, len(prompts), inputs=reads, matrices=matrices_of(run))
    except DamagedStoreError:
        # A store of another recipe or version is not damaged: only a store of this key is captured again.
        if run.folder.is_done("capture", key):
            run.folder.forget("capture")
        raise
    return Samples(
        [prompts[i][0] for i in judged_indices],
        activations.take(judged_indices),
        np.array([judgements[prompts[i][0].id]["confidence"] for i in judged_indices]),
        {name: rows.of(np.concatenate([judged_indices, other_indices])) for name, rows in inputs.items()},
        run.folder.path,
        [prompts[i][0] for i in other_indices],
        [judgements[prompts[i][0].id]["category"] for i in judged_indices],
        [prompts[i][1] for i in other_indices],
        run.model_path if Can.LLAMA_CPP in run.model.can else None,
    )


def fitted_as(prompt: Prompt, context: Context, effect: Effect) -> Prompt:
    """Return a gate-only prompt, as a harmful one where its context asks for a refusal, which should stay."""
    if effect == "remove" and context.refusals_asked and prompt.kind == "sensitive":
        return replace(prompt, kind="harmful", topic=_REFUSAL_ASKED, form="")
    return prompt


def sample_order(run: Run) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices, into all captured prompts, of those with a judged answer and of the others."""
    judgements = judged(run.folder)
    prompts = [*run.prompts["fit"], *(p for p, _ in run.in_contexts)]
    is_judged = np.array([p.id in judgements for p in prompts])
    return np.flatnonzero(is_judged), np.flatnonzero(~is_judged)
