"""Solve for the gate vectors of one output matrix in one layer (method §8).

Inputs of the matrix and weights of the samples go in; gate vectors a come out, for each ridge. The gate
activation aᵀx meets targets on means of prompts, and is as small as possible elsewhere: minimum-variance
beamforming under linear constraints (Frost 1972) in a ridge metric.

On rows xᵢ of weight wᵢ a gate should stay near 0. Let G = Σ wᵢxᵢxᵢᵀ + ρI, M the constrained means and e the
targets. Then a = G⁻¹Mλ with MᵀG⁻¹M λ = e.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import Float64, add_product, centred_chunks, lower_product, weighted_means
from rs_gguf.estimators.path import ROUNDING
from rs_gguf.machine import Processes

# Gate activation on the mean prompt of a harmful topic, relative to the benign target. Harmful prompts
# scatter about it: with 0, those above it would move towards an answer as far as many sensitive ones.
HARMFUL_TARGET_RATIO = -0.6
_SINGULAR = 1e12  # condition number: the constraints do not differ


@dataclass(frozen=True)
class OutputMatrixInputs:
    """The inputs [n, L, W] of one output matrix that this process has."""

    last_token: Activations  # of each sample
    tokens: Sequence[tuple[Activations, int]]  # other tokens by sort, and how many all processes have

    @classmethod
    def of(cls, output_matrix: str, inputs: MatrixInputs, processes: Processes) -> OutputMatrixInputs:
        name = f"gated adapter: the inputs of {output_matrix}"
        sorts = (inputs.last_token, inputs.prompt_tokens, inputs.answer_tokens, inputs.template_tokens)
        parts = [Activations.of(rows, name=name) for rows in sorts]
        counts = [sum(shares) for shares in zip(*processes.gather([len(p) for p in parts]), strict=True)]
        return cls(parts[0], list(zip(parts[1:], counts[1:], strict=True)))

    @property
    def width(self) -> int:
        return self.last_token.shape[2]


@dataclass(frozen=True)
class SampleWeights:
    """Normalised weights of the N samples of all processes: each row adds up to 1.

    kinds: [3, N], of sensitive, benign and harmful samples.
    groups: [G, N], of groups of harmful or benign samples.
    harmful: [H, N], of the parts of the harmful samples that are constrained one by one.
    local: the samples that this process has.
    """

    kinds: Tensor
    groups: Tensor
    harmful: Tensor
    local: slice

    @property
    def count(self) -> int:
        """The number of weighted rows that the samples give."""
        return int((self.kinds > 0).sum()) + len(self.groups)


def gate_vectors(
    inputs: OutputMatrixInputs,
    layer: int,
    weights: SampleWeights,
    ridges: Float64,
    off_target_weight: float,
    processes: Processes,
) -> Tensor:
    """Return gates [2, R, W] for R ridges: first the sensitive gate, then the benign.

    Both are zero if the means of the kinds are equal.
    """
    kinds, local = weights.kinds, weights.local
    gates = kinds.new_zeros((2, len(ridges), inputs.width))
    shares = torch.cat([kinds, weights.groups, weights.harmful])[:, local]
    rows = weighted_means(inputs.last_token, layer, shares, processes=processes)
    means, groups, parts = rows[:3].T, rows[3:][: len(weights.groups)], rows[3 + len(weights.groups) :]
    spread = means.amax(dim=1) - means.amin(dim=1)
    if spread.norm() <= ROUNDING * means.norm():
        return gates
    constraints = torch.cat([rows[:2], parts])  # [C, W]
    # One row for each constraint; one column for each gate.
    targets = rows.new_tensor([[1.0, 0.0], [0.0, 1.0], *[[0.0, HARMFUL_TARGET_RATIO]] * len(parts)])
    energy = _off_target_rows(inputs, layer, kinds[:, local], means, off_target_weight)
    if processes.rank == 0 and len(groups):
        energy = itertools.chain(energy, [groups / len(groups) ** 0.5])
    count = weights.count + sum(n for _, n in inputs.tokens)
    for k, solved in enumerate(_solve(energy, count, constraints.T, ridges, processes)):  # [W, C]
        gram = constraints @ solved
        if torch.linalg.cond(gram) <= _SINGULAR:
            gates[:, k] = (solved @ torch.linalg.solve(gram, targets)).T
    return gates


def _off_target_rows(
    inputs: OutputMatrixInputs, layer: int, kind_shares: Tensor, kinds: Tensor, off_target_weight: float
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
