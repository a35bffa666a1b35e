"""Measure how well the cheap fidelity levels of the search predict the expensive ones.

Takes a finished run with an adapter: its tune split, judge and answer lengths. The selected layer range and
its second half are evaluated at each strength on every fidelity level. Prints one row per adapter in
Markdown, and Spearman's rank correlation of each level with the next, for the remaining sensitive refusals
and for harmful retention.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from rich.progress import track
from scipy.stats import spearmanr

from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.stopping import Answering

LEVELS = ("logprob", "short", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("out/demo"), help="folder of a finished run with an adapter"
    )
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.8, 1.2])
    options = parser.parse_args()
    recipe = recipes.load(options.run / "recipe.toml")
    folder = RunFolder(options.run)
    with folder.locked(), open_run(recipe, folder) as run:
        evaluator = tuning.evaluator(run, Answering.WHOLE)
        candidates = adapters(tuning.chosen(folder)["adapter"].candidate, options.strengths)
        rows = [
            {fidelity: evaluator.measure(fidelity, number, candidate) for fidelity in LEVELS}
            for number, candidate in enumerate(track(candidates, "Measuring"))
        ]
    print_rows(rows)
    print(f"\nSpearman's rank correlation, {len(rows)} adapters:\n")
    print("| fidelity levels | sensitive | harmful |\n| --- | --- | --- |")
    for before, after in pairwise(LEVELS):
        correlations = (
            spearmanr(
                [getattr(row[before], name) for row in rows], [getattr(row[after], name) for row in rows]
            ).statistic
            for name in ("sensitive_remaining", "harmful_retention")
        )
        print(
            f"| {before}, {after} | "
            + " | ".join("–" if math.isnan(r) else f"{r:.2f}" for r in correlations)
            + " |"
        )


def adapters(selected: Candidate, strengths: list[float]) -> list[Candidate]:
    """Return the selected layer range and its second half, each at every strength."""
    half = replace(selected, first=(selected.first + selected.last + 1) // 2)
    return [replace(layers, strength=strength) for layers in (selected, half) for strength in strengths]


def print_rows(rows: list[dict[str, Trial]]) -> None:
    heads = [f"{title}: {', '.join(LEVELS)}" for title in ("sensitive remaining", "harmful retention")]
    print(f"| layers | strength | {heads[0]} | {heads[1]} |\n| --- | --- | --- | --- |")
    for row in rows:
        candidate = row["logprob"].candidate
        remaining, retention = (
            ", ".join(f"{getattr(row[fidelity], name):.0%}" for fidelity in LEVELS)
            for name in ("sensitive_remaining", "harmful_retention")
        )
        layers = f"{candidate.first} to {candidate.last}"
        print(f"| {layers} | {candidate.strength:g} | {remaining} | {retention} |")


if __name__ == "__main__":
    main()
