"""Fit a gated adapter in closed form: a rank-1 LoRA whose effect depends on the input (method §8).

Inputs of the output matrices (such as `ffn_down`), activations and judged labels go in; a
`GatedAdapterFit` comes out, which gives ΔW = −s·d·aᵀ for each output matrix. The gate vector a has gate
activation 1 on the mean sensitive prompt and m (the benign target) on the mean benign one. On the mean of
each harmful topic it has −0.6m, elsewhere as little as possible (`rs_gguf.methods.gate_vectors`). The output
vector d is what the layer adds to the refusal contrast. García-Ferrero et al. (arXiv 2512.16602) fit a
vector, which moves every prompt equally.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.device import resolve_device, workers
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.machine import ALONE, Device, Processes, on_all_cores, one_thread
from rs_gguf.methods.gate_vectors import OutputMatrixInputs, SampleWeights, gate_vectors
from rs_gguf.models.architecture import tensor_name
from rs_gguf.steering.lora import Factors

# Harmful samples of a topic from which its mean is a constraint of its own: that of fewer is mostly noise.
TOPIC_SAMPLES = 8
OFF_TARGET_WEIGHT = 2.0  # in the metric, of each sort of other tokens, relative to the samples of the kinds


@dataclass(frozen=True)
class GatedAdapterFit:
    """Gate vectors for R ridges and L layers, and the refusal contrast that gives the output vectors.

    ridges: [R], relative.
    sensitive_gate: [R, L, W] float64 by output matrix. Its activation is 1 on the mean sensitive input and 0
        on the means of the other kinds.
    benign_gate: [R, L, W] float64 by output matrix. Its activation is 1 on the mean benign input,
        `HARMFUL_TARGET_RATIO` on the mean of each harmful topic and 0 on the mean sensitive one.
    contrast: [L, D], activations of refused minus answered sensitive prompts at equal groups; to induce,
        activations of answered minus refused prompts. Benign prompts replace answered sensitive ones if the
        model answers fewer than 4 of them (`MIN_SAMPLES`).

    Both gates are zero where the inputs do not separate the kinds: the adapter leaves out such a matrix.
    """

    ridges: Float64
    sensitive_gate: Mapping[str, Float64]
    benign_gate: Mapping[str, Float64]
    contrast: Float64

    def factors(
        self, ridge: float, first: int, last: int, strength: float, benign_target: float = 0.0
    ) -> dict[str, Factors]:
        """Return LoRA factors by tensor name for the output matrices of the layers `first` to `last`.

        At strength 1 the layers together subtract the whole contrast at the mean sensitive prompt. They
        subtract `benign_target` times the contrast at the mean benign prompt, and `HARMFUL_TARGET_RATIO`
        times that at the mean prompt of each harmful topic. Unseen prompts scatter about these means. With a
        benign target, few harmful prompts are moved towards an answer and few benign ones towards a refusal.
        It is negative to induce refusals. The output matrices of a layer add equal parts.
        """
        index = list(self.ridges).index(ridge)
        factors = {}
        before: Float64 | float = 0.0
        for layer in range(first, last + 1):
            output_matrices = [name for name, rows in self.sensitive_gate.items() if rows[index, layer].any()]
            if not output_matrices:  # the next layer with a gate adds the part of this one too
                continue
            output_vector = (self.contrast[layer] - before) * (-strength / len(output_matrices))
            before = self.contrast[layer]
            for output_matrix in output_matrices:
                sensitive, benign = self.sensitive_gate[output_matrix], self.benign_gate[output_matrix]
                gate_vector = sensitive[index, layer] + benign_target * benign[index, layer]
                factors[tensor_name(output_matrix, layer)] = (
                    gate_vector[np.newaxis].astype(np.float32),
                    output_vector[:, np.newaxis].astype(np.float32),
                )
        return factors


def fit_gated_adapter(
    inputs: Mapping[str, MatrixInputs],
    activations: Any,
    labels: Labels,
    *,
    ridges: npt.ArrayLike,
    induce: bool = False,
    categories: Sequence[str | None] = (),
    off_target_weight: float = OFF_TARGET_WEIGHT,
    device: Device = "auto",
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda n: None,
) -> GatedAdapterFit:
    """Fit gate vectors for every layer and ridge, and the contrast of every layer.

    Args:
        inputs: inputs of each output matrix, at the N samples of `activations` and at more samples after
            them. The latter are neither refused nor answered (confidence 0).
        activations: [N, L, D] array or tensor, or `Activations`.
        labels: labels of the samples of `inputs`. The gate vectors separate their kinds; judged confidence
            weights the samples of the contrast. `groups` are topics (first), forms, languages and contexts.
            The gate activation is kept small on the mean harmful and benign input of each group. The contrast
            leaves out what activations owe to a group.
        ridges: [R], relative to the mean diagonal of the metric.
        induce: move prompts towards refusal; else move sensitive prompts away from it.
        categories: refusal categories of the samples of all processes, as for `contrast_weights`.
        off_target_weight: weight of each sort of other tokens in the metric.
        device: where the fit computes.
        processes: the processes that share the samples. The arrays are the share of this process; `labels`
            and the result cover all of them.
        advance: is called with 1 after each layer.

    Raises:
        InputError: a class is empty, a ridge is not usable, values are NaN or Inf, or no layer separates the
            kinds.
    """
    grid = check_ridges(ridges)
    torch_device = resolve_device(device)
    outputs = Activations.of(activations)
    kinds = _kind_weights(labels)
    kind_shares = torch.from_numpy(np.stack([w / w.sum() for w in kinds.values()])).to(torch_device)
    groups = _group_weights(labels, kinds)
    group_shares = torch.from_numpy(np.stack(groups)).to(torch_device) if groups else kind_shares[:0]
    parts = _harmful_parts(labels, kinds["harmful"])
    part_shares = torch.from_numpy(np.stack(parts)).to(torch_device)
    sample_weights = SampleWeights(kind_shares, group_shares, part_shares, labels.local)
    matrices = {name: OutputMatrixInputs.of(name, rows, processes) for name, rows in inputs.items()}
    n_layers = outputs.shape[1]
    sensitive_gate = {name: np.zeros((len(grid), n_layers, rows.width)) for name, rows in matrices.items()}
    benign_gate = {name: np.zeros_like(rows) for name, rows in sensitive_gate.items()}
    contrast = np.empty((n_layers, outputs.shape[2]))
    with one_thread():
        weights = contrast_weights(labels, categories, induce=induce)[labels.local][: len(outputs)]
    contrast_shares = torch.from_numpy(weights).to(torch_device)

    def fit_layer(layer: int) -> None:
        rows = outputs.layer_rows(layer, device=torch_device)
        contrast[layer] = processes.sum(contrast_shares @ rows).cpu().numpy()
        for name, matrix in matrices.items():
            gates = gate_vectors(matrix, layer, sample_weights, grid, off_target_weight, processes)
            sensitive_gate[name][:, layer], benign_gate[name][:, layer] = gates.cpu().numpy()

    cores = workers(torch_device, max(matrix.width for matrix in matrices.values()), processes)
    for _ in on_all_cores(fit_layer, range(n_layers), workers=cores):
        advance(1)
    if not any(rows.any() for rows in sensitive_gate.values()):
        raise InputError(
            "gated adapter: no layer separates the mean inputs of sensitive, harmful and benign prompts; one "
            "such layer is needed. Use sets that differ in subject (prompts.sensitive, prompts.harmful, "
            "prompts.benign)."
        )
    return GatedAdapterFit(grid, sensitive_gate, benign_gate, contrast)


def _kind_weights(labels: Labels) -> dict[str, Float64]:
    """Return the weights [N] of sensitive, benign and harmful samples, refused or not.

    A gate vector separates subjects. Prompts that the model answers have these subjects too, and a gate that
    is active on them does no damage.
    """
    kinds = {kind: labels.kind(kind) for kind in ("sensitive", "benign", "harmful")}
    for kind, mask in kinds.items():
        if not labels.weights[mask].any():
            raise InputError(f"gated adapter: no {kind} prompt to fit on; at least one is needed. Add some.")
    return {kind: labels.weighted(mask, by_confidence=False) for kind, mask in kinds.items()}


def _group_weights(labels: Labels, kinds: Mapping[str, Float64]) -> list[Float64]:
    """Return normalised weights [N] of each group of harmful or benign prompts with enough samples."""
    groups = []
    for names in labels.groups.T:
        for weights in (kinds["harmful"], kinds["benign"]):
            for group in sorted({str(name) for name in names[weights > 0]} - {""}):
                inside = np.where(names == group, weights, 0.0)
                if np.count_nonzero(inside) >= MIN_SAMPLES:
                    groups.append(inside / inside.sum())
    return groups


def _harmful_parts(labels: Labels, harmful: Float64) -> list[Float64]:
    """Return normalised weights [N] of each harmful topic with `TOPIC_SAMPLES`, then of the other samples.

    The first grouping of the labels is the topic.
    """
    names = labels.groups[:, 0] if labels.groups.shape[1] else np.full(len(harmful), "")
    topics = sorted({str(name) for name in names[harmful > 0]} - {""})
    large = [topic for topic in topics if np.count_nonzero(harmful[names == topic]) >= TOPIC_SAMPLES]
    masks = [*(names == topic for topic in large), ~np.isin(names, large)]
    return [np.where(mask, harmful, 0.0) / harmful[mask].sum() for mask in masks if harmful[mask].any()]
