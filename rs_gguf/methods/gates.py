"""The gated adapter: steering that depends on the input, in closed form, as a LoRA for stock llama.cpp.

Inputs of the matrices that write to the residual stream (last prompt token, and tokens that must stay quiet),
block outputs and judged labels enter; for each block a *read* direction per matrix and a *write* direction
leave, which make ΔW = −s · d aᵀ. The read a answers 1 to the mean of sensitive prompts, a benign_target to that of
benign ones and minus a quarter of it to that of harmful ones, with the least energy on everything else:
minimum-variance beamforming under linear constraints (Frost 1972) in a ridge metric, as in
`constrained.SafeRidge`. The write d is what the block adds to the difference of refused and answered
sensitive prompts at equal topic, form and language. This goes beyond García-Ferrero et al. (arXiv
2512.16602), whose vector moves every prompt alike.
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
from rs_gguf.estimators.device import Device, resolve_device, workers
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.estimators.moments import Float64, add_product, centred_chunks, lower_product, weighted_means
from rs_gguf.estimators.path import ROUNDING
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.machine import ALONE, Processes, on_all_cores, one_thread
from rs_gguf.steering.lora import Factors

# What the mean harmful prompt answers for each unit that the mean benign one does. Benign prompts of a form
# that the fit has not seen may answer 0.3 less than the others, and must not be pushed to a refusal.
HARMFUL_TARGET_RATIO = -0.25
OFF_TARGET_WEIGHT = 2.0  # weight of the energy on each sort of other tokens, beside that within the classes


@dataclass(frozen=True)
class GatedAdapterFit:
    """Reads for every ridge and block, and the contrast that the writes are made of.

    `sensitive_gate`, `benign_gate`: by matrix, [R, L, W] fp64. To `sensitive_gate` the mean sensitive input answers 1 and the means
    of the other kinds 0; to `benign_gate` the mean benign input answers 1, the harmful `HARMFUL_TARGET_RATIO`, the sensitive 0.
    Both are rows of zeros where the inputs do not tell the kinds apart: such a block has no gate.
    `contrast` [L, D]: block output of refused minus answered sensitive prompts (benign ones where hardly a
    sensitive one is answered), or to induce of answered minus refused prompts, at equal cells: what a gate
    takes away.
    """

    ridges: Float64
    sensitive_gate: Mapping[str, Float64]
    benign_gate: Mapping[str, Float64]
    contrast: Float64

    def factors(
        self, ridge: float, first: int, last: int, strength: float, benign_target: float = 0.0
    ) -> dict[str, Factors]:
        """LoRA factors that gate the blocks `first` to `last`, both included.

        At strength 1 the increments of the band add up to the whole contrast for the mean sensitive prompt,
        to `benign_target` times it for the mean benign one, and to `HARMFUL_TARGET_RATIO` times that for the mean harmful one.
        Unseen prompts scatter about these means: with a benign_target (negative to induce refusals), few that are
        harmful are moved to an answer, and few that are benign to a refusal. Each gate of a block writes an
        equal part.
        """
        index = self.ridges.tolist().index(ridge)
        found = {}
        before: Float64 | float = 0.0
        for layer in range(first, last + 1):
            gates = {
                output_matrix: rows[index, layer]
                for output_matrix, rows in self.sensitive_gate.items()
                if rows[index, layer].any()
            }
            if not gates:  # the next block writes its part too
                continue
            write = (self.contrast[layer] - before) * (-strength / len(gates))
            before = self.contrast[layer]
            for output_matrix, sensitive_gate in gates.items():
                read = sensitive_gate + benign_target * self.benign_gate[output_matrix][index, layer]
                found[f"blk.{layer}.{output_matrix}.weight"] = (
                    read[np.newaxis].astype(np.float32),
                    write[:, np.newaxis].astype(np.float32),
                )
        return found


def fit_gated_adapter(
    inputs: Mapping[str, MatrixInputs],
    residuals: Any,
    labels: Labels,
    *,
    ridges: npt.ArrayLike,
    induce: bool = False,
    categories: Sequence[str | None] = (),
    quiet: float = OFF_TARGET_WEIGHT,
    device: Device = "auto",
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda n: None,
) -> GatedAdapterFit:
    """Fit closed-form gates for every block of `residuals` [N, L, D] and every ridge.

    Args:
        inputs: of these N samples, and of others after them that are neither refused nor answered
            (confidence 0).
        residuals: block outputs, an array, tensor or `Activations`.
        labels: of the samples of `inputs`. Kinds, which the reads tell apart, and judged confidence, which
            weights the samples of the contrast; `groups` are cells (topics, forms, languages) whose harmful
            and benign means must stay quiet too, as far as the metric allows, and whose own part in block
            outputs is not in the contrast.
        ridges: relative to the mean diagonal of the metric.
        induce: the writes lead to refusal, whichever kind is refused, instead of away from that of sensitive
            prompts.
        categories: kinds of refusal of the samples that `labels` has of all processes, where a judge told
            them (`contrast_weights`).
        device: where the fit computes.
        processes: those that share the samples; the arrays are this process's part of them, and `labels` and
            the gates those of all.
        advance: called once a block.

    Raises:
        InputError: a class without samples, a bad ridge, NaN or Inf, or inputs that tell the classes apart in
            no block.
    """
    grid = check_ridges(ridges)
    where = resolve_device(device)
    outputs = Activations.of(residuals, name="block outputs")
    kinds = _kinds(labels)
    mean = torch.from_numpy(np.stack([weights / weights.sum() for weights in kinds.values()])).to(where)
    cells = _group_weights(labels, kinds)
    quiet_means = torch.from_numpy(np.stack(cells)).to(where) if cells else mean[:0]
    rows = {name: _Inputs.of(name, of_matrix, processes) for name, of_matrix in inputs.items()}
    n_layers = outputs.shape[1]
    sensitive_gate = {name: np.zeros((len(grid), n_layers, found.width)) for name, found in rows.items()}
    benign_gate = {name: np.zeros_like(found) for name, found in sensitive_gate.items()}
    contrast = np.empty((n_layers, outputs.shape[2]))
    with one_thread():
        difference = contrast_weights(labels, categories, induce=induce)[labels.local][: len(outputs)]
    sides = torch.from_numpy(difference).to(where)

    def fit_block(layer: int) -> None:
        contrast[layer] = processes.sum(sides @ outputs.layer_rows(layer, device=where)).cpu().numpy()
        for name, found in rows.items():
            reads = _reads(found, layer, mean, quiet_means, labels.local, grid, quiet, processes)
            sensitive_gate[name][:, layer], benign_gate[name][:, layer] = reads.cpu().numpy()

    cores = workers(where, max(found.width for found in rows.values()), processes)
    for _ in on_all_cores(fit_block, range(n_layers), workers=cores):
        advance(1)
    if not any(found.any() for found in sensitive_gate.values()):
        raise InputError(
            "gated adapter: the inputs of no block tell sensitive from harmful and benign prompts; use "
            "other prompts."
        )
    return GatedAdapterFit(grid, sensitive_gate, benign_gate, contrast)


@dataclass(frozen=True)
class _Inputs:
    """`MatrixInputs` to read from, and how many rows all processes have of each sort of other tokens."""

    last_token: Activations
    tokens: Sequence[tuple[Activations, int]]

    @classmethod
    def of(cls, matrix: str, found: MatrixInputs, processes: Processes) -> _Inputs:
        name = f"gated adapter: the inputs of {matrix}"
        parts = [
            Activations.of(rows, name=name)
            for rows in (found.last_token, found.prompt_tokens, found.answer_tokens, found.template_tokens)
        ]
        counts = [sum(shares) for shares in zip(*processes.gather([len(p) for p in parts]), strict=True)]
        return cls(parts[0], list(zip(parts[1:], counts[1:], strict=True)))

    @property
    def width(self) -> int:
        return self.last_token.shape[2]


def _kinds(labels: Labels) -> dict[str, Float64]:
    """Weights [N] of the three kinds of prompts, what the gate sensitive_gate for first.

    Refused or not: what a read tells apart is the subject. Prompts that the model answers are samples of it
    like the others, and there it is no loss to open.
    """
    kinds = {kind: labels.kind(kind) for kind in ("sensitive", "benign", "harmful")}
    for kind, mask in kinds.items():
        if not labels.weights[mask].any():
            raise InputError(f"gated adapter: no {kind} prompt to fit on; add some.")
    return {kind: labels.weighted(mask, by_confidence=False) for kind, mask in kinds.items()}


def _group_weights(labels: Labels, kinds: Mapping[str, Float64]) -> list[Float64]:
    """Normalised weights [N] of each cell of the quiet kinds with enough samples."""
    cells = []
    for names in labels.groups.T:
        for weights in (kinds["harmful"], kinds["benign"]):
            for cell in sorted({str(name) for name in names[weights > 0]} - {""}):
                inside = np.where(names == cell, weights, 0.0)
                if np.count_nonzero(inside) >= MIN_SAMPLES:
                    cells.append(inside / inside.sum())
    return cells


def _reads(
    rows: _Inputs,
    layer: int,
    mean: Tensor,
    cells: Tensor,
    local: slice,
    ridges: Float64,
    quiet: float,
    processes: Processes,
) -> Tensor:
    """Return argmin aᵀ(S + ρI)a subject to what `GatedAdapterFit` says of aᵀμ, for each ridge: [2, R, W].

    Of `sensitive_gate`, then of `benign_gate`; zeros where the kinds have the same means. S is AᵀA of the rows that should
    not answer: samples about the mean of their kind, other tokens and cell means as they are. `mean` [3, N]
    and `cells` [C, N] are normalised weights of all samples, of which this process holds `local`.
    """
    found = mean.new_zeros((2, len(ridges), rows.width))
    weights = torch.cat([mean, cells])
    means = weighted_means(rows.last_token, layer, weights[:, local], processes=processes)
    kinds, quiet_means = means[:3].T, means[3:]  # [W, 3], [C, W]
    spread = kinds.amax(dim=1) - kinds.amin(dim=1)
    if spread.norm() <= ROUNDING * kinds.norm():
        return found
    answers = mean.new_tensor(
        [[1.0, 0.0], [0.0, 1.0], [0.0, HARMFUL_TARGET_RATIO]]
    )  # sensitive, benign, harmful
    parts = _quiet_rows(rows, layer, mean[:, local], kinds, quiet)
    if processes.rank == 0 and len(quiet_means):
        parts = itertools.chain(parts, [quiet_means / len(quiet_means) ** 0.5])
    used = int((mean > 0).sum()) + len(cells) + sum(count for _, count in rows.tokens)
    for k, pulls in enumerate(_solve(parts, used, kinds, ridges, processes)):  # [W, 3]
        gram = kinds.T @ pulls
        if torch.linalg.cond(gram) <= 1e12:
            found[:, k] = (pulls @ torch.linalg.solve(gram, answers)).T
    return found


def _quiet_rows(rows: _Inputs, layer: int, mean: Tensor, kinds: Tensor, quiet: float) -> Iterator[Tensor]:
    """Yield the weighted rows [n, W] of A that this process has, without the means of cells."""
    for centre, weights in zip(kinds.T, mean, strict=True):
        yield from centred_chunks(rows.last_token, layer, weights / len(mean), centre)
    for tokens, count in rows.tokens:
        for _, block in tokens.chunks(layer, np.arange(len(tokens)), mean.device):
            yield block * (quiet / count) ** 0.5


def _solve(
    parts: Iterable[Tensor], count: int, right: Tensor, ridges: Float64, processes: Processes
) -> Iterator[Tensor]:
    """Yield (AᵀA + ρI)⁻¹B [W, r] for B = `right` [W, r] and each ρ = λ tr(AᵀA)/W.

    `parts` are the rows of A that this process has, and `count` how many all have. By Cholesky of the smaller
    of AᵀA and AAᵀ, the latter through Woodbury's identity. Nothing where A is 0.
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
                f"{trace:.3g}; choose a larger ridge."
            )
        solved = torch.cholesky_solve(inner, cholesky)
        yield solved if factor is None else (right - factor.T @ solved) / ridge
