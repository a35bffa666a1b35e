"""Fit a gated adapter in closed form: a rank-1 LoRA whose effect depends on the input (method §8).

Inputs of the output matrices (such as `ffn_down`), activations and judged labels go in; a
`GatedAdapterFit` comes out, which gives ΔW = −s·d·aᵀ for each output matrix. The gate vector a has gate
activation 1 on the mean sensitive prompt, m (the benign target) on the mean benign one and −m/4 on the mean
harmful one. Elsewhere it gives as little as possible: minimum-variance beamforming under linear constraints
(Frost 1972) in a ridge metric, as in `constrained.SafeRidge`. The output vector d is what the layer adds to
the refusal contrast. García-Ferrero et al. (arXiv 2512.16602) fit a vector, which moves every prompt equally.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.device import resolve_device, workers
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.estimators.moments import Float64, add_product, centred_chunks, lower_product, weighted_means
from rs_gguf.estimators.path import ROUNDING
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.machine import ALONE, Device, Processes, on_all_cores, one_thread
from rs_gguf.models.architecture import tensor_name
from rs_gguf.steering.lora import Factors

# Gate activation on the mean harmful prompt, relative to the benign target. Benign prompts of an unseen form
# may have a gate activation 0.3 lower than the others, and must not be moved towards refusal.
HARMFUL_TARGET_RATIO = -0.25
OFF_TARGET_WEIGHT = 2.0  # in the metric, of each sort of other tokens, relative to the samples of the kinds


@dataclass(frozen=True)
class GatedAdapterFit:
    """Gate vectors for R ridges and L layers, and the refusal contrast that gives the output vectors.

    ridges: [R], relative.
    sensitive_gate: [R, L, W] float64 by output matrix. Its activation is 1 on the mean sensitive input and 0
        on the means of the other kinds.
    benign_gate: [R, L, W] float64 by output matrix. Its activation is 1 on the mean benign input,
        `HARMFUL_TARGET_RATIO` on the mean harmful one and 0 on the mean sensitive one.
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
        times that at the mean harmful one. Unseen prompts scatter about these means. With a benign target,
        few harmful prompts are moved towards an answer and few benign ones towards a refusal. It is negative
        to induce refusals. The output matrices of a layer add equal parts.
        """
        index = self.ridges.tolist().index(ridge)
        factors = {}
        before: Float64 | float = 0.0
        for layer in range(first, last + 1):
            sensitive_gates = {
                output_matrix: rows[index, layer]
                for output_matrix, rows in self.sensitive_gate.items()
                if rows[index, layer].any()
            }
            if not sensitive_gates:  # the next layer with a gate adds the part of this one too
                continue
            output_vector = (self.contrast[layer] - before) * (-strength / len(sensitive_gates))
            before = self.contrast[layer]
            for output_matrix, sensitive_gate in sensitive_gates.items():
                gate_vector = sensitive_gate + benign_target * self.benign_gate[output_matrix][index, layer]
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
            weights the samples of the contrast. `groups` are topics, forms and languages. The gate activation
            is kept small on the mean harmful and benign input of each group. The contrast leaves out what
            activations owe to a group.
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
    matrices = {name: _Inputs.of(name, rows, processes) for name, rows in inputs.items()}
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
            gates = _gates(
                matrix, layer, kind_shares, group_shares, labels.local, grid, off_target_weight, processes
            )
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


@dataclass(frozen=True)
class _Inputs:
    """The inputs [n, L, W] of one output matrix that this process has."""

    last_token: Activations  # of each sample
    tokens: Sequence[tuple[Activations, int]]  # other tokens by sort, and how many all processes have

    @classmethod
    def of(cls, output_matrix: str, inputs: MatrixInputs, processes: Processes) -> _Inputs:
        name = f"gated adapter: the inputs of {output_matrix}"
        sorts = (inputs.last_token, inputs.prompt_tokens, inputs.answer_tokens, inputs.template_tokens)
        parts = [Activations.of(rows, name=name) for rows in sorts]
        counts = [sum(shares) for shares in zip(*processes.gather([len(p) for p in parts]), strict=True)]
        return cls(parts[0], list(zip(parts[1:], counts[1:], strict=True)))

    @property
    def width(self) -> int:
        return self.last_token.shape[2]


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


def _gates(
    inputs: _Inputs,
    layer: int,
    kind_shares: Tensor,
    group_shares: Tensor,
    local: slice,
    ridges: Float64,
    off_target_weight: float,
    processes: Processes,
) -> Tensor:
    """Return the sensitive and the benign gates of one matrix and layer for each ridge: [2, R, W].

    Each is argmin aᵀ(S + ρI)a subject to the activations on the kind means that `GatedAdapterFit` states, and
    zero if the means are equal. S is AᵀA of rows on which a gate should stay near 0: samples about the mean
    of their kind, other tokens, and group means.

    kind_shares, group_shares: normalised weights [3, N] and [G, N] of all samples; `local` are those here.
    """
    gates = kind_shares.new_zeros((2, len(ridges), inputs.width))
    shares = torch.cat([kind_shares, group_shares])
    means = weighted_means(inputs.last_token, layer, shares[:, local], processes=processes)
    kinds, groups = means[:3].T, means[3:]  # [W, 3], [G, W]
    spread = kinds.amax(dim=1) - kinds.amin(dim=1)
    if spread.norm() <= ROUNDING * kinds.norm():
        return gates
    # One row for each of sensitive, benign, harmful; one column for each gate.
    targets = kind_shares.new_tensor([[1.0, 0.0], [0.0, 1.0], [0.0, HARMFUL_TARGET_RATIO]])
    parts = _off_target_rows(inputs, layer, kind_shares[:, local], kinds, off_target_weight)
    if processes.rank == 0 and len(groups):
        parts = itertools.chain(parts, [groups / len(groups) ** 0.5])
    count = int((kind_shares > 0).sum()) + len(group_shares) + sum(n for _, n in inputs.tokens)
    for k, solved in enumerate(_solve(parts, count, kinds, ridges, processes)):  # [W, 3]
        gram = kinds.T @ solved
        if torch.linalg.cond(gram) <= 1e12:
            gates[:, k] = (solved @ torch.linalg.solve(gram, targets)).T
    return gates


def _off_target_rows(
    inputs: _Inputs, layer: int, kind_shares: Tensor, kinds: Tensor, off_target_weight: float
) -> Iterator[Tensor]:
    """Yield the weighted rows [n, W] of A that this process has, without the group means."""
    for mean, shares in zip(kinds.T, kind_shares, strict=True):
        yield from centred_chunks(inputs.last_token, layer, shares / len(kind_shares), mean)
    for tokens, count in inputs.tokens:
        for _, rows in tokens.chunks(layer, np.arange(len(tokens)), kind_shares.device):
            yield rows * (off_target_weight / count) ** 0.5


def _solve(
    parts: Iterable[Tensor], count: int, right: Tensor, ridges: Float64, processes: Processes
) -> Iterator[Tensor]:
    """Yield (AᵀA + ρI)⁻¹B [W, r] for B = `right` [W, r] and each ρ = λ tr(AᵀA)/W; nothing if A is 0.

    `parts` are the rows of A that this process has; `count` is the number of rows of all processes. The
    smaller of AᵀA and AAᵀ is factorised by Cholesky; AAᵀ gives the solution by Woodbury's identity.
    """
    width, factor = len(right), None
    if count < width:
        own, filled = right.new_empty((count, width)), 0
        for rows in parts:
            own[filled : filled + len(rows)] = rows
            filled += len(rows)
        factor = processes.concatenate(own[:filled])
        gram = lower_product(factor.T)
    else:
        gram = right.new_zeros((width, width))
        for rows in parts:
            add_product(gram, rows)
        processes.sum(gram)
    diagonal = gram.diagonal().clone()
    trace = float(diagonal.sum())
    if trace == 0.0:
        return
    inner = right if factor is None else factor @ right
    for ridge in ridges * (trace / width):
        gram.diagonal().copy_(diagonal + ridge)
        cholesky, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise InputError(
                f"gated adapter: ridge {ridge:.3g} (absolute) is lost in the rounding of a metric with trace "
                f"{trace:.3g}; use a larger ridge."
            )
        solved = torch.cholesky_solve(inner, cholesky)
        yield solved if factor is None else (right - factor.T @ solved) / ridge
