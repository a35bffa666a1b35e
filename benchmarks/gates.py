"""Compare ridges and refits of a gate: sensitive refusals removed against harmful retention.

Takes a fitted run (`rs-export fit`). Each variant is fitted on what the run captured, and answers the tune
split at several strengths, in the layers of the method's first candidate. A variant is a list such as
`ridge=0.2,refits=1`, of `ridge` (λ of the gates) and `refits` (how often the gates are fitted again under a
file of the fit before). Prints the trials in Markdown and marks the Pareto front of all. `--json` stores the
trials, and a second call continues from them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from front import pareto_front
from rich.progress import track

from rs_gguf.errors import InputError
from rs_gguf.methods import METHODS
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages.answers import unsteered
from rs_gguf.pipeline.stages.fit import sample_order
from rs_gguf.pipeline.stages.fit import samples as samples_of
from rs_gguf.pipeline.stages.refit import refit
from rs_gguf.records.rows import read_json, write_json
from rs_gguf.records.trials import Candidate, Trial, load_trials
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.stopping import Answering

VARIANTS = ("", "ridge=0.2", "refits=1", "refits=2")
TYPES: Mapping[str, type] = {"ridge": float, "refits": int}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a fitted run")
    parser.add_argument("--variant", action="append", help="may be repeated; by default a list of both kinds")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.8, 1.2])
    parser.add_argument("--json", type=Path, help="file that stores the trials")
    options = parser.parse_args()
    variants = {text: parsed(text) for text in options.variant or VARIANTS}
    rows: dict[str, list[Any]] = {}
    if options.json and options.json.exists():
        rows = read_json(options.json)
    folder = RunFolder(options.run)
    with folder.locked(), open_run(recipes.load(options.run / "recipe.toml"), folder) as run:
        samples = samples_of(run)
        for text, values in track(variants.items(), "Variants"):
            known = {trial.candidate.strength: trial for trial in load_trials(rows.get(text, []))}
            if missing := [strength for strength in options.strengths if strength not in known]:
                known |= measured(run, samples, values, missing)
                rows[text] = [trial.to_row() for trial in known.values()]
                if options.json:
                    write_json(options.json, rows)
    print_table({text: load_trials(rows[text]) for text in variants})


def parsed(text: str) -> dict[str, Any]:
    """Return the values of a variant by name.

    Raises:
        InputError: a name is unknown, or a value is not a number.
    """
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: TYPES[name](value) for name, value in pairs}
    except (KeyError, ValueError) as error:
        raise InputError(
            f"variant {text!r}: {error}. Give NAME=NUMBER[,…] with {', '.join(TYPES)}."
        ) from error


def measured(
    run: Run, samples: Samples, values: Mapping[str, Any], strengths: list[float]
) -> dict[float, Trial]:
    """Fit a variant, and return its short trials by strength."""
    name, recipe = "adapter", run.recipe
    method, options = METHODS[name], recipe.fit_options
    if "ridge" in values:
        options = replace(options, gate_ridges=[values["ridge"]])
    fitted = method.fit(samples, options)
    order = np.concatenate(sample_order(run))
    for _ in range(values.get("refits", 0)):
        fitted = refit(run, name, fitted, samples, order, options)
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = CandidateEvaluator(
            run.model, run.judge, unsteered(run.folder, run.prompts["tune"]), {name: fitted}, Path(scratch),
            short=recipe.asking(recipe.answers.tokens), full=recipe.asking(recipe.answers.test_tokens),
            n_full=0, rule=recipe.safety, seed=recipe.seed, answering=Answering.WHOLE,
        )  # fmt: skip
        start: Candidate = method.space(fitted, run.model.n_layer, recipe.effect).start[0]
        candidates = [replace(start, strength=strength) for strength in strengths]
        return {c.strength: evaluator.measure("short", k, c) for k, c in enumerate(candidates)}


def print_table(variants: Mapping[str, list[Trial]]) -> None:
    """Print a row for each trial."""
    front = {id(trial) for trial in pareto_front([t for trials in variants.values() for t in trials])}
    print(
        "| variant | strength | sensitive left | harmful kept | benign closed | drift | degenerate | front |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for text, trials in variants.items():
        for trial in sorted(trials, key=lambda trial: trial.candidate.strength):
            print(
                f"| {text or 'none'} | {trial.candidate.strength:g} | {trial.sensitive_remaining:.3f} "
                f"| {trial.harmful_retention:.3f} | {trial.benign_closed:+.3f} | {trial.benign_drift:.3f} "
                f"| {trial.degenerate:.3f} | {'*' if id(trial) in front else ''} |"
            )


if __name__ == "__main__":
    main()
