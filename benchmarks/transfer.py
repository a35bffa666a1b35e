"""Does a gate open for subjects, forms and languages that it was not fitted on, and stay shut on such harm?

Reads the captured activations of a finished run. A fifth of the cells (subjects, then topics, forms and
languages) is left out of all three classes at a time, the gate is fitted on the others, and its opening is
read on what was left out: 1 is that of the mean sensitive prompt of the fit, the benign_target that of the mean
benign one. Nothing is generated: this is the gate's linear answer, averaged over the blocks and matrices of
the run's band. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from rs_gguf.activations.activations import MatrixInputs
from rs_gguf.estimators.labels import Labels
from rs_gguf.methods.gates import fit_gated_adapter
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stages.fit import samples as samples_of
from rs_gguf.records.metrics import RunRecord

FOLDS = 5
OPEN = 0.5
SMALLEST = 5  # refused prompts of a cell that is shown by itself
SHOWN = 6

Opening = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("out/demo"), help="folder of a finished run with an adapter"
    )
    options = parser.parse_args()
    chosen = RunRecord.read(options.run / "metrics.json").files["adapter"]
    samples = samples_of(open_run(recipes.load(options.run / "recipe.toml"), RunFolder(options.run)))
    every, labels = [*samples.prompts, *samples.gate_only], samples.labels()
    kinds = np.array([prompt.kind for prompt in every])
    first, last = chosen.layers
    inputs = {writer: of_band(rows, range(first, last + 1)) for writer, rows in samples.inputs.items()}
    residuals = np.stack(
        [np.asarray(samples.activations[:, layer]) for layer in range(first, last + 1)], axis=1
    )
    ridge, benign_target = chosen.ridge, chosen.benign_target
    print(
        f"{len(every)} prompts, {len(residuals)} of them answered; blocks {first} to {last}, "
        f"ridge {ridge:g}, benign_target {benign_target:g}.\n"
    )
    found: dict[str, Opening] = {}
    with Progress(transient=True) as progress:
        for cell in ("subject", "topic", "form", "language"):
            task = progress.add_task(f"{cell}s left out", total=FOLDS)
            opening = found[cell] = np.empty(len(every))
            names = [getattr(prompt, cell) for prompt in every]
            for kept, left_out in GroupKFold(FOLDS).split(every, groups=names):
                of_kept = Labels.of(labels.confidence[kept], kinds[kept], labels.groups[kept])
                some = {writer: rows.of(kept) for writer, rows in inputs.items()}
                gates = fit_gated_adapter(
                    some, residuals[kept[kept < len(residuals)]], of_kept, ridges=[ridge]
                )
                reads = {
                    writer: gates.sensitive_gate[writer][0] + benign_target * gates.benign_gate[writer][0]
                    for writer in some
                }
                opening[left_out] = openings(inputs, reads, left_out)
                progress.advance(task)
    print_summary(labels, found)
    for cell, left_out, kind in (
        ("subject", "subject", "sensitive"), ("topic", "topic", "sensitive"), ("topic", "topic", "harmful"),
        ("form", "form", "sensitive"), ("form", "form", "harmful"),
        ("language", "language", "sensitive"), ("language", "language", "harmful"),
    ):  # fmt: skip
        print(f"\nThe {kind} prompts that transfer worst, by {cell}, {left_out}s left out:\n")
        print_worst(samples, found[left_out][: len(residuals)], cell, kind)


def of_band(rows: MatrixInputs, band: Sequence[int]) -> MatrixInputs:
    """The inputs of these blocks alone, in memory."""

    def picked(part: Any) -> NDArray[Any]:
        return np.stack([np.asarray(part[:, layer]) for layer in band], axis=1)

    return MatrixInputs(**{name: picked(tokens) for name, tokens in vars(rows).items()})


def openings(
    inputs: dict[str, MatrixInputs], reads: dict[str, NDArray[np.float64]], chosen: NDArray[np.intp]
) -> Opening:
    """Mean over blocks and matrices of what the reads [L, W] answer to the chosen samples."""
    answers = [
        inputs[writer].last_token[chosen, layer].astype(np.float64) @ read
        for writer, rows in reads.items()
        for layer, read in enumerate(rows)
    ]
    return np.asarray(np.mean(answers, axis=0))


def print_summary(labels: Labels, found: dict[str, Opening]) -> None:
    """All prompts are samples of their kind; those that were not answered are never counted as refused."""
    refused = labels.confidence > 0
    some = ~labels.kind("benign")
    print(
        "| left out | AUROC, sensitive against harmful | refused sensitive opened | refused harmful opened |"
    )
    print("| --- | --- | --- | --- |")
    for cell, opening in found.items():
        auroc = roc_auc_score(labels.kind("sensitive")[some], opening[some])
        opened = [opening[refused & labels.kind(kind)] > OPEN for kind in ("sensitive", "harmful")]
        shares = " | ".join(f"{share.mean():.0%} of {len(share)}" for share in opened)
        print(f"| {cell}s | {auroc:.3f} | {shares} |")


def print_worst(samples: Samples, opening: Opening, cell: str, kind: str) -> None:
    """Cells whose refused prompts open least, or of harm most."""
    of_kind = np.array([k == kind for k in samples.kinds]) & (samples.confidence > 0)
    names = np.array([getattr(prompt, cell) for prompt in samples.prompts])
    rows = []
    for name in sorted({str(name) for name in names[of_kind]}):
        inside = opening[of_kind & (names == name)]
        if len(inside) >= SMALLEST:
            rows.append((float(inside.mean()), name, inside))
    print(f"| {cell} | refused | mean opening | opened |\n| --- | --- | --- | --- |")
    for mean, name, inside in sorted(rows, reverse=kind == "harmful")[:SHOWN]:
        print(f"| {name} | {len(inside)} | {mean:.2f} | {(inside > OPEN).mean():.0%} |")


if __name__ == "__main__":
    main()
