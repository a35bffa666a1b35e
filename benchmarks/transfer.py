"""Measure whether a gated adapter separates subjects, forms and languages that it was not fitted on.

Reads the captured activations of a finished run. A fifth of the groups (subjects, then topics, forms and
languages) is left out of all three classes at a time. The adapter is fitted on the other groups, and its gate
activation is computed on those left out. The gate activation is 1 for the mean sensitive prompt of the fit
and the benign target for the mean benign one. No text is generated. The gate activation is linear and
averaged over the layers and matrices of the run's layer range. Prints Markdown.
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
OPEN = 0.5  # a gate counts as open above this activation
MIN_PROMPTS = 5  # refused prompts that a group needs for a row
MAX_ROWS = 6

GateActivation = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("out/demo"), help="folder of a finished run with an adapter"
    )
    options = parser.parse_args()
    adapter = RunRecord.read(options.run / "metrics.json").files["adapter"]
    samples = samples_of(open_run(recipes.load(options.run / "recipe.toml"), RunFolder(options.run)))
    prompts, labels = [*samples.prompts, *samples.gate_only], samples.labels()
    kinds = np.array([prompt.kind for prompt in prompts])
    first, last = adapter.layers
    inputs = {name: of_layers(rows, range(first, last + 1)) for name, rows in samples.inputs.items()}
    residuals = np.stack(
        [np.asarray(samples.activations[:, layer]) for layer in range(first, last + 1)], axis=1
    )
    ridge, benign_target = adapter.ridge, adapter.benign_target
    print(
        f"{len(prompts)} prompts, {len(residuals)} of them answered; layers {first} to {last}, "
        f"ridge {ridge:g}, benign target {benign_target:g}.\n"
    )
    activations: dict[str, GateActivation] = {}
    with Progress(transient=True) as progress:
        for field in ("subject", "topic", "form", "language"):
            task = progress.add_task(f"{field}s left out", total=FOLDS)
            activation = activations[field] = np.empty(len(prompts))
            names = [getattr(prompt, field) for prompt in prompts]
            for kept, left_out in GroupKFold(FOLDS).split(prompts, groups=names):
                kept_labels = Labels.of(labels.confidence[kept], kinds[kept], labels.groups[kept])
                kept_inputs = {name: rows.of(kept) for name, rows in inputs.items()}
                fit = fit_gated_adapter(
                    kept_inputs, residuals[kept[kept < len(residuals)]], kept_labels, ridges=[ridge]
                )
                gate_vectors = {
                    name: fit.sensitive_gate[name][0] + benign_target * fit.benign_gate[name][0]
                    for name in kept_inputs
                }
                activation[left_out] = gate_activations(inputs, gate_vectors, left_out)
                progress.advance(task)
    print_summary(labels, activations)
    for field, left_out, kind in (
        ("subject", "subject", "sensitive"), ("topic", "topic", "sensitive"), ("topic", "topic", "harmful"),
        ("form", "form", "sensitive"), ("form", "form", "harmful"),
        ("language", "language", "sensitive"), ("language", "language", "harmful"),
    ):  # fmt: skip
        print(f"\nThe {kind} prompts that transfer worst, by {field}, {left_out}s left out:\n")
        print_worst(samples, activations[left_out][: len(residuals)], field, kind)


def of_layers(rows: MatrixInputs, layers: Sequence[int]) -> MatrixInputs:
    """Return the inputs of these layers only, in memory."""

    def subset(part: Any) -> NDArray[Any]:
        return np.stack([np.asarray(part[:, layer]) for layer in layers], axis=1)

    return MatrixInputs(**{name: subset(tokens) for name, tokens in vars(rows).items()})


def gate_activations(
    inputs: dict[str, MatrixInputs], gate_vectors: dict[str, NDArray[np.float64]], indices: NDArray[np.intp]
) -> GateActivation:
    """Return the mean activation of the gate vectors [L, W] on these samples, over layers and matrices."""
    values = [
        inputs[name].last_token[indices, layer].astype(np.float64) @ vector
        for name, rows in gate_vectors.items()
        for layer, vector in enumerate(rows)
    ]
    return np.asarray(np.mean(values, axis=0))


def print_summary(labels: Labels, activations: dict[str, GateActivation]) -> None:
    """Print AUROC and open gates by field. Gate-only prompts count for AUROC, but never as refused."""
    refused = labels.confidence > 0
    not_benign = ~labels.kind("benign")
    print(
        "| left out | AUROC, sensitive against harmful | gate open, refused sensitive "
        "| gate open, refused harmful |"
    )
    print("| --- | --- | --- | --- |")
    for field, activation in activations.items():
        auroc = roc_auc_score(labels.kind("sensitive")[not_benign], activation[not_benign])
        is_open = [activation[refused & labels.kind(kind)] > OPEN for kind in ("sensitive", "harmful")]
        shares = " | ".join(f"{share.mean():.0%} of {len(share)}" for share in is_open)
        print(f"| {field}s | {auroc:.3f} | {shares} |")


def print_worst(samples: Samples, activation: GateActivation, field: str, kind: str) -> None:
    """Print the groups with the lowest gate activation of refused prompts; for harmful ones, the highest."""
    of_kind = np.array([k == kind for k in samples.kinds]) & (samples.confidence > 0)
    names = np.array([getattr(prompt, field) for prompt in samples.prompts])
    rows = []
    for name in sorted({str(name) for name in names[of_kind]}):
        group = activation[of_kind & (names == name)]
        if len(group) >= MIN_PROMPTS:
            rows.append((float(group.mean()), name, group))
    print(f"| {field} | refused | mean gate activation | gate open |\n| --- | --- | --- | --- |")
    for mean, name, group in sorted(rows, reverse=kind == "harmful")[:MAX_ROWS]:
        print(f"| {name} | {len(group)} | {mean:.2f} | {(group > OPEN).mean():.0%} |")


if __name__ == "__main__":
    main()
