"""Solve for the gate vectors of one output matrix in one layer (method §8).

Inputs of the matrix and weights of the samples go in; gate vectors a and intercepts c come out, for each
ridge. The gate activation aᵀx + c meets targets on means of prompts, and is as small as possible elsewhere:
minimum-variance beamforming under linear constraints (Frost 1972) in a ridge metric. The ridge does not
penalise the intercept.

On rows xᵢ of weight wᵢ a gate should stay near 0. Let G = Σ wᵢxᵢxᵢᵀ + ρI. Let s = Σ wᵢxᵢ and w = Σ wᵢ, over
the rows that are not centred. M are the constrained means, e the targets. Then

    [K u; uᵀ −r] [λ; c] = [e; 0], a = G⁻¹(Mλ − cs),
    K = MᵀG⁻¹M, u = 1 − MᵀG⁻¹s, r = w − sᵀG⁻¹s.

This is the minimum for x̃ = [x; 1]. It does not change if one point is subtracted from all inputs, so centred
features need no variant of their own. Without an intercept Kλ = e and a = G⁻¹Mλ. A part of the free intercept
gives the minimum for that c, which lies between both: it is linear in c.

With a hard null space, a is orthogonal to the directions in which benign and harmful prompts have most
energy, as in AlphaSteer (arXiv 2506.07022). Each direction is a constraint with target 0, and without the 1
of u. These constraints replace the ones on benign and harmful means.
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
from rs_gguf.methods.options import GateOptions

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
    harmful: [H, N], of the parts of the harmful samples that are constrained one by one; H may be 0.
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
    options: GateOptions,
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """Return gates [2, R, W] and intercepts [2, R] for R ridges: first the sensitive gate, then the benign.

    Both are zero if the means of the kinds are equal. Without `options.intercept`, all intercepts are 0.
    """
    kinds, local = weights.kinds, weights.local
    gates, intercepts = kinds.new_zeros((2, len(ridges), inputs.width)), kinds.new_zeros((2, len(ridges)))
    shares = torch.cat([kinds, weights.groups, weights.harmful])[:, local]
    rows = weighted_means(inputs.last_token, layer, shares, processes=processes)
    means, groups, parts = rows[:3].T, rows[3:][: len(weights.groups)], rows[3 + len(weights.groups) :]
    spread = means.amax(dim=1) - means.amin(dim=1)
    if spread.norm() <= ROUNDING * means.norm():
        return gates, intercepts
    if options.null_space:
        quiet = _quiet_directions(inputs, layer, kinds[1:, local], options.null_space, processes)
        constraints = _Constraints.null_space(rows[:1], quiet)
    else:
        benign = rows[:0] if options.benign_free else rows[1:2]
        constraints = _Constraints.of_means(rows[:1], benign, parts if len(parts) else rows[2:3])
    energy = _off_target_rows(inputs, layer, kinds[:, local], means, off_target_weight)
    if processes.rank == 0 and len(groups):
        energy = itertools.chain(energy, [groups / len(groups) ** 0.5])
    count = weights.count + sum(n for _, n in inputs.tokens)
    right, uncentred = constraints.rows.T, None
    if options.intercept:
        uncentred = _uncentred(inputs, layer, groups, off_target_weight, processes)
        right = torch.cat([right, -uncentred[0][:, None]], dim=1)
    for k, solved in enumerate(_solve(energy, count, right, ridges, processes)):
        for part, solution in _multipliers(solved, constraints, options.intercept, uncentred):
            gates[:, k] += part * (solved[:, : len(solution)] @ solution).T
            if len(solution) > len(constraints.targets):
                intercepts[:, k] = part * solution[-1]
    return gates, intercepts


@dataclass(frozen=True)
class _Constraints:
    """What a gate vector a and its intercept c must meet: Ra + kc = e.

    rows: R [C, W], means of prompts, or directions.
    constants: k [C], 1 for a mean and 0 for a direction.
    targets: e [C, 2], one column for each gate.
    """

    rows: Tensor
    constants: Tensor
    targets: Tensor

    @classmethod
    def of_means(cls, sensitive: Tensor, benign: Tensor, harmful: Tensor) -> _Constraints:
        """Return the constraints on means [·, W] of sensitive, benign and harmful prompts."""
        rows = torch.cat([sensitive, benign, harmful])
        targets = [[1.0, 0.0]] + [[0.0, 1.0]] * len(benign) + [[0.0, HARMFUL_TARGET_RATIO]] * len(harmful)
        return cls(rows, rows.new_ones(len(rows)), rows.new_tensor(targets))

    @classmethod
    def null_space(cls, sensitive: Tensor, quiet: Tensor) -> _Constraints:
        """Return the constraints on the sensitive mean [1, W], and on directions [r, W] to ignore."""
        rows = torch.cat([sensitive, quiet])
        constants, targets = rows.new_zeros(len(rows)), rows.new_zeros((len(rows), 2))
        constants[0] = targets[0, 0] = 1.0
        return cls(rows, constants, targets)


def _multipliers(
    solved: Tensor, constraints: _Constraints, share: float, uncentred: tuple[Tensor, float] | None
) -> list[tuple[float, Tensor]]:
    """Return the parts of the minimum: without an intercept [C, 2] and with the free one, which adds a row.

    Each comes with its share. There are none if the constraints of one do not differ.

    solved: G⁻¹M [W, C] and, with an intercept, −G⁻¹s in one more column.
    uncentred: s [W] and w.
    """
    rows, targets = constraints.rows, constraints.targets
    gram = rows @ solved[:, : len(targets)]  # K
    systems = [(1 - share, gram, targets)] if share < 1 else []
    if uncentred is not None:
        (total, weight), pull = uncentred, solved[:, -1]
        missing = constraints.constants + rows @ pull  # u [C]
        border = torch.cat([missing, -weight - total @ pull[:, None]])  # uᵀ, −r
        system = torch.cat([torch.cat([gram, missing[:, None]], dim=1), border[None]])
        systems.append((share, system, torch.cat([targets, targets.new_zeros((1, 2))])))
    if any(torch.linalg.cond(system) > _SINGULAR for _, system, _ in systems):
        return []
    return [(part, torch.linalg.solve(system, right)) for part, system, right in systems]


def _quiet_directions(
    inputs: OutputMatrixInputs, layer: int, kind_shares: Tensor, share: float, processes: Processes
) -> Tensor:
    """Return the directions [r, W] of most energy of benign and harmful prompts, which a gate must ignore.

    They are the eigenvectors of the mean of both second moments, less the lowest `share` of all W. Directions
    without energy stay too, if there are more of them.

    kind_shares: [2, n], of the benign and harmful samples that this process has.
    """
    origin = kind_shares.new_zeros(inputs.width)
    chunks = (centred_chunks(inputs.last_token, layer, shares, origin) for shares in kind_shares)
    own = torch.cat([origin.new_empty((0, inputs.width)), *itertools.chain.from_iterable(chunks)])
    _, sizes, directions = torch.linalg.svd(processes.concatenate(own), full_matrices=False)
    with_energy = int((sizes > ROUNDING * sizes[0]).sum())
    quiet: Tensor = directions[: min(with_energy, inputs.width - int(share * inputs.width))]
    return quiet


def _off_target_rows(
    inputs: OutputMatrixInputs, layer: int, kind_shares: Tensor, kinds: Tensor, off_target_weight: float
) -> Iterator[Tensor]:
    """Yield the weighted rows [n, W] of A that this process has, without the group means."""
    for mean, shares in zip(kinds.T, kind_shares, strict=True):
        yield from centred_chunks(inputs.last_token, layer, shares / len(kind_shares), mean)
    for tokens, count in inputs.tokens:
        for _, rows in tokens.chunks(layer, np.arange(len(tokens)), kind_shares.device):
            yield rows * (off_target_weight / count) ** 0.5


def _uncentred(
    inputs: OutputMatrixInputs, layer: int, groups: Tensor, off_target_weight: float, processes: Processes
) -> tuple[Tensor, float]:
    """Return the sum s [W] and the total weight w of the rows that are not centred: other tokens, groups."""
    total, weight = groups.new_zeros(groups.shape[1]), 0.0
    for tokens, count in inputs.tokens:
        for _, rows in tokens.chunks(layer, np.arange(len(tokens)), groups.device):
            total += rows.sum(dim=0) * (off_target_weight / count)
        weight += off_target_weight if count else 0.0
    processes.sum(total)
    if len(groups):
        total, weight = total + groups.mean(dim=0), weight + 1.0
    return total, weight


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
