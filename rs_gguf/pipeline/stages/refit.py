"""Fit the gates again with their own file in force.

A run with a first fit goes in; fits of the same methods come out. A file changes the inputs of all later
layers, and it opens answers that the unsteered model never writes. So the fit prompts are answered and judged
once more under the file, and the inputs are read there. The answers that are not refusals are among the
tokens at which the gate must stay closed. The contrast stays unsteered.

The file in force is the first candidate of the method's space: the search, which knows a better one, comes
after the fit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.activations import MatrixInputs
from rs_gguf.activations.capture import capture_all, captured, conversations
from rs_gguf.activations.store import ActivationStore
from rs_gguf.engines.engine import Steering
from rs_gguf.evaluation.condition import Condition, answer_condition
from rs_gguf.evaluation.outcomes import outcome_of
from rs_gguf.methods import METHODS
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages.capture import matrices_of

_FOLDER = "activations-refit"


def refit(
    run: Run,
    name: str,
    fitted: Any,
    samples: Samples,
    order: NDArray[np.intp],
    options: FitOptions,
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Any:
    """Return the fit of the method `name`, made again with a file of `fitted` in force.

    samples: what `fitted` was fitted on.
    order: the samples, as indices into the fit prompts and the gate-only prompts after them.

    Raises:
        InputError: the disk is full.
    """
    method, folder = METHODS[name], run.folder / _FOLDER
    candidate = method.space(fitted, run.model.n_layer, options.effect).start[0]
    shutil.rmtree(folder, ignore_errors=True)  # of a refit that was killed
    try:
        steering = method.steering(fitted, candidate, run.model.architecture, folder)
        inputs = {matrix: rows.of(order) for matrix, rows in _inputs(run, steering, folder).items()}
        return method.fit(replace(samples, inputs=inputs), options, advance=advance)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inputs(run: Run, steering: Steering, folder: Path) -> dict[str, MatrixInputs]:
    """Return the inputs of the output matrices under a steering, at the fit prompts and their answers.

    folder: where they are stored.
    """
    prompts, system = run.prompts["fit"], run.recipe.prompts.system
    asking = run.recipe.asking(run.recipe.answers.fit_tokens)
    judged = answer_condition(run.model, run.judge, Condition("refit", steering, system), prompts, asking)
    answers = {p.id: a.tokens for p, a in zip(prompts, judged.answers, strict=True)}
    refused = {
        prompt.id
        for prompt, answer, judgement in zip(prompts, judged.answers, judged.judgements, strict=True)
        if (judgement.confidence or 0) > 0 and outcome_of(answer, judgement) != "fails"
    }
    read, prefix = conversations(run.model, prompts, system, answers, refused, run.in_contexts)
    ids = [p.id for p in prompts] + [p.id for p, _ in run.in_contexts]
    store = ActivationStore(folder, "refit")
    matrices = matrices_of(run)
    with run.model.steered(steering):
        capture_all(run.model, ids, read, prefix, store, matrices=matrices)
    return captured(store, len(ids), inputs=True, matrices=matrices)[1]
