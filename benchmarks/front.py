"""Measure the trade-off of one control vector: sensitive refusals removed against harmful retention.

Takes a fitted run (`rs-export fit`) with the estimators to compare. Forward passes evaluate each direction on
three layer ranges, at the strength where the first tokens of harmful refusals lose a tenth of their
probability. The range with the largest loss for sensitive refusals then answers the tune split at that
strength. The strength is doubled until half of the harmful refusals are gone, and halved if harmful retention
was too low. The gated adapter of the same fit answers too. Prints the trials in Markdown and marks the Pareto
front of the vectors. `--json` stores the trials, and a second call continues from them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from rs_gguf.methods import METHODS, vector
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.records.rows import read_json, write_json
from rs_gguf.records.trials import Candidate, Trial, load_trials
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.stopping import Answering

LEVEL = -math.log(0.9)  # nats that the first tokens of harmful refusals lose
ADAPTER_STRENGTHS = (0.5, 0.8, 1.2)


class Measured:
    """The trials of one run; each is evaluated once and stored in a file."""

    def __init__(self, evaluator: CandidateEvaluator, path: Path | None) -> None:
        self._evaluator, self._path = evaluator, path
        rows = read_json(path)["trials"] if path and path.exists() else []
        self._known = {(trial.fidelity, trial.candidate): trial for trial in load_trials(rows)}

    def __call__(self, fidelity: str, candidate: Candidate) -> Trial:
        if (fidelity, candidate) not in self._known:
            self._known[fidelity, candidate] = self._evaluator.measure(fidelity, len(self._known), candidate)
            if self._path:
                rows = [trial.to_row() for trial in self._known.values()]
                write_json(self._path, {"trials": rows})
        return self._known[fidelity, candidate]


def pareto_front(answered: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in removal, retention and drift together; best first."""

    def costs(trial: Trial) -> tuple[float, float, float]:
        return trial.sensitive_remaining, -trial.harmful_retention, trial.benign_drift or 0.0

    def beaten(trial: Trial) -> bool:
        mine = costs(trial)
        return any(
            costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True))
            for other in answered
        )

    return sorted((trial for trial in answered if not beaten(trial)), key=costs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a fitted run")
    parser.add_argument("--json", type=Path, help="file that stores the trials")
    options = parser.parse_args()
    recipe = recipes.load(options.run / "recipe.toml")
    folder = RunFolder(options.run)
    with folder.locked(), open_run(recipe, folder) as run:
        evaluator = tuning.evaluator(run, Answering.WHOLE)
        measured = Measured(evaluator, options.json)
        directions = sorted(evaluator.fitted["vector"])
        (start, *_), n = vector.space_of(directions, evaluator.model.n_layer).start, evaluator.model.n_layer
        ranges = [
            replace(start, first=first, last=min(first + n // 3 - 1, n - 2))
            for first in (max(FIRST_STEERABLE, n * sixths // 6) for sixths in (2, 3, 4))
        ]
        answered: list[Trial] = []
        for estimator, ridge in track(directions, "Estimators"):
            candidates = [replace(layers, estimator=estimator, ridge=ridge) for layers in ranges]
            levelled = [at_level(measured, candidate) for candidate in candidates]
            best = min(levelled, key=lambda trial: trial.sensitive_remaining).candidate
            answered += along(measured, best, recipe.tune.min_retention)
        if "adapter" in evaluator.fitted:
            space = METHODS["adapter"].space(
                evaluator.fitted["adapter"], evaluator.model.n_layer, recipe.effect
            )
            adapters = [replace(start, strength=s) for start in space.start for s in ADAPTER_STRENGTHS]
            answered += [measured("short", adapter) for adapter in track(adapters, "Adapters")]
    print_table(answered)


def at_level(measured: Measured, candidate: Candidate) -> Trial:
    """Return the forward-pass trial of the candidate at the strength that costs `LEVEL`, to first order."""
    loss = -math.log(min(measured("logprob", candidate).harmful_retention, 0.999))
    return measured("logprob", replace(candidate, strength=round(candidate.strength * LEVEL / loss, 4)))


def along(measured: Measured, candidate: Candidate, min_retention: float) -> Iterator[Trial]:
    """Yield trials at doubled strengths until half of the harmful refusals are lost, and at half strength."""
    first = trial = measured("short", candidate)
    yield trial
    while trial.harmful_retention >= 0.5 and trial.candidate.strength < 4 * candidate.strength:
        trial = measured("short", replace(candidate, strength=2 * trial.candidate.strength))
        yield trial
    if first.harmful_retention < min_retention:
        yield measured("short", replace(candidate, strength=candidate.strength / 2))


def print_table(answered: list[Trial]) -> None:
    best = pareto_front([trial for trial in answered if trial.candidate.method == "vector"])
    halved = [trial for trial in best if trial.sensitive_remaining <= 0.5]
    halves = max(halved, key=lambda trial: trial.harmful_retention, default=None)
    print(
        "| estimator | layers | strength | sensitive remaining | harmful retention | benign closed "
        "| drift, nats/token | degenerate | |"
    )
    print("| --- " * 9 + "|")
    for trial in answered:
        candidate = trial.candidate
        mark = "Pareto front, half removal" if trial is halves else "Pareto front" if trial in best else ""
        print(
            f"| {candidate.recorded} | {candidate.first} to {candidate.last} | {candidate.strength:g} "
            f"| {trial.sensitive_remaining:.0%} | {trial.harmful_retention:.0%} | {trial.benign_closed:+.0%} "
            f"| {trial.benign_drift:.3f} | {trial.degenerate:.1%} | {mark} |"
        )


if __name__ == "__main__":
    main()
