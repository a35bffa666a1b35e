"""What one vector can trade: every estimator of a fitted run, from all refusals of harm kept to half of them.

Takes a run that is fitted (`rs-export fit`) with the estimators to compare. Each direction is probed on three
bands, brought to the strength where harm loses a tenth of its openings. The band where sensitive refusals
lose most then answers the tune split: at that strength, doubled until half of harm's refusals are gone, and
halved where harm was not kept. The gate of the same fit answers beside them. Prints the trials in Markdown,
the vectors that no other beats marked; `--json` keeps the trials, and goes on from there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from rs_gguf.methods import METHODS, vector
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.records.rows import read_json, write_json
from rs_gguf.records.trials import Candidate, Trial, load_trials
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.choice import halving, pareto_front

LEVEL = -math.log(0.9)  # nats of harm's openings
GATE_STRENGTHS = (0.5, 0.8, 1.2)


class Measured:
    """Trials of one run, each measured once and kept in a file."""

    def __init__(self, evaluator: CandidateEvaluator, path: Path | None) -> None:
        self._rungs, self._path = evaluator, path
        rows = read_json(path)["trials"] if path and path.exists() else []
        self._known = {(trial.fidelity, trial.candidate): trial for trial in load_trials(rows)}

    def __call__(self, fidelity: str, candidate: Candidate) -> Trial:
        if (fidelity, candidate) not in self._known:
            self._known[fidelity, candidate] = self._rungs.measure(fidelity, len(self._known), candidate)
            if self._path:
                rows = [trial.to_row() for trial in self._known.values()]
                write_json(self._path, {"trials": rows})
        return self._known[fidelity, candidate]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a fitted run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = recipes.load(options.run / "recipe.toml")
    folder = RunFolder(options.run)
    with folder.locked(), open_run(recipe, folder) as run:
        evaluator = tuning.evaluator(run)
        measured = Measured(evaluator, options.json)
        directions = sorted(evaluator.fitted["vector"])
        bands = vector.space_of(directions[:1] * 3, evaluator.model.n_layer).start
        answered: list[Trial] = []
        for estimator, ridge in track(directions, "Estimators"):
            on_bands = [replace(band, estimator=estimator, ridge=ridge) for band in bands]
            levelled = [at_level(measured, candidate) for candidate in on_bands]
            best = min(levelled, key=lambda probe: probe.sensitive_remaining).candidate
            answered += along(measured, best, recipe.tune.min_retention)
        if "adapter" in evaluator.fitted:
            space = METHODS["adapter"].space(
                evaluator.fitted["adapter"], evaluator.model.n_layer, recipe.effect
            )
            gates = [replace(gate, strength=s) for gate in space.start for s in GATE_STRENGTHS]
            answered += [measured("short", gate) for gate in track(gates, "GatedAdapterFit")]
    print_table(answered)


def at_level(measured: Measured, candidate: Candidate) -> Trial:
    """The probe of the candidate at the level, to first order."""
    loss = -math.log(min(measured("logprob", candidate).harmful_retention, 0.999))
    return measured("logprob", replace(candidate, strength=round(candidate.strength * LEVEL / loss, 4)))


def along(measured: Measured, candidate: Candidate, wanted: float) -> Iterator[Trial]:
    """Answers with more and more strength until half of harm's refusals are lost, and with less."""
    first = trial = measured("short", candidate)
    yield trial
    while trial.harmful_retention >= 0.5 and trial.candidate.strength < 4 * candidate.strength:
        trial = measured("short", replace(candidate, strength=2 * trial.candidate.strength))
        yield trial
    if first.harmful_retention < wanted:
        yield measured("short", replace(candidate, strength=candidate.strength / 2))


def print_table(answered: list[Trial]) -> None:
    best = pareto_front([trial for trial in answered if trial.candidate.method == "vector"])
    halves = halving(best)
    print("| estimator | blocks | strength | sensitive left | harmful kept | benign | drift | broken | |")
    print("| --- " * 9 + "|")
    for trial in answered:
        place = trial.candidate
        mark = "front, halves" if trial is halves else "pareto_front" if trial in best else ""
        print(
            f"| {place.recorded} | {place.first} to {place.last} | {place.strength:g} "
            f"| {trial.sensitive_remaining:.0%} | {trial.harmful_retention:.0%} | {trial.benign_closed:+.0%} "
            f"| {trial.benign_drift:.3f} | {trial.degenerate:.1%} | {mark} |"
        )


if __name__ == "__main__":
    main()
