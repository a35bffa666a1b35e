"""What the search's evaluator are worth: the same gates probed, answering briefly, and answering in full.

Takes a finished run with an adapter: its tune split, its judge, its lengths of answers. The chosen band and
its second half are measured at each strength on every fidelity. Prints a row a gate in Markdown, and Spearman's
rank correlation of each fidelity with the next, of what is left of sensitive refusals and of harmful ones.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from rich.progress import track

from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.choice import spearman

RUNGS = ("logprob", "answers", "full")


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
        evaluator = tuning.evaluator(run)
        candidates = gates(tuning.chosen(folder)["adapter"].candidate, options.strengths)
        rows = [
            {fidelity: evaluator.measure(fidelity, number, gate) for fidelity in RUNGS}
            for number, gate in enumerate(track(candidates, "Measuring"))
        ]
    print_rows(rows)
    print(f"\nSpearman's rank correlation, {len(rows)} gates:\n")
    print("| evaluator | sensitive | harmful |\n| --- | --- | --- |")
    for before, after in pairwise(RUNGS):
        found = (
            spearman(
                [getattr(row[before], name) for row in rows], [getattr(row[after], name) for row in rows]
            )
            for name in ("sensitive", "harmful_retention")
        )
        print(f"| {before}, {after} | " + " | ".join("–" if r is None else f"{r:.2f}" for r in found) + " |")


def gates(chosen: Candidate, strengths: list[float]) -> list[Candidate]:
    """The chosen band and its second half, at every strength."""
    half = replace(chosen, first=(chosen.first + chosen.last + 1) // 2)
    return [replace(band, strength=strength) for band in (chosen, half) for strength in strengths]


def print_rows(rows: list[dict[str, Trial]]) -> None:
    heads = [f"{what}: {', '.join(RUNGS)}" for what in ("sensitive left", "harmful kept")]
    print(f"| blocks | strength | {heads[0]} | {heads[1]} |\n| --- | --- | --- | --- |")
    for row in rows:
        gate = row["logprob"].candidate
        left, kept = (
            ", ".join(f"{getattr(row[fidelity], name):.0%}" for fidelity in RUNGS)
            for name in ("sensitive", "harmful_retention")
        )
        print(f"| {gate.first} to {gate.last} | {gate.strength:g} | {left} | {kept} |")


if __name__ == "__main__":
    main()
