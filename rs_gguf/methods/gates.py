"""The gated adapter: steering that depends on the input, in closed form, as a LoRA for stock llama.cpp.

Inputs of the matrices that write to the residual stream (last prompt token, and tokens that must stay quiet),
block outputs and judged labels enter; for each block a *read* direction per matrix and a *write* direction
leave, which make ΔW = −s · d aᵀ. The read a answers 1 to the mean of sensitive prompts, a margin to that of
benign ones and minus a quarter of it to that of harmful ones, with the least energy on everything else:
minimum-variance beamforming under linear constraints (Frost 1972) in a ridge metric, as in
`constrained.SafeRidge`. The write d is what the block adds to the difference of refused and answered
sensitive prompts at equal topic, form and language. This goes beyond García-Ferrero et al. (arXiv
2512.16602), whose vector moves every prompt alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, blas, cho_factor, cho_solve
from threadpoolctl import threadpool_limits

from rs_gguf.errors import InputError
from rs_gguf.estimators.contrast import contrast_weights
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import ROUNDING
from rs_gguf.estimators.ridge import check_ridges
from rs_gguf.steering.lora_file import Factors

# What the mean harmful prompt answers for each unit that the mean benign one does. Benign prompts of a form
# that the fit has not seen may answer 0.3 less than the others, and must not be pushed to a refusal.
HARM = -0.25
QUIET = 2.0  # weight of the energy on each sort of other tokens, beside that within the classes


@dataclass(frozen=True)
class WriterInputs:
    """What one kind of matrix multiplies, in every block: rows [·, L, W] of any float type.

    Times the factor, if any, that the model multiplies the product with before it adds it to the residual.
    `last`: at the last prompt token of each sample; `prompts`, `answers`: at other tokens of prompts and of
    answers where a gate must stay shut; `constant`: at those that the chat template puts before every prompt.
    """

    last: Any  # [N, L, W]
    prompts: Any  # [P, L, W]
    answers: Any  # [A, L, W]
    constant: Any  # [T, L, W]

    def of(self, samples: npt.NDArray[np.intp]) -> WriterInputs:
        """The same with some of the samples; other tokens stay."""
        return replace(self, last=self.last[samples])


@dataclass(frozen=True)
class Gates:
    """Reads for every ridge and block, and the contrast that the writes are made of.

    `opens`, `guards`: by matrix, [R, L, W] fp64. To `opens` the mean sensitive input answers 1 and the means
    of the other kinds 0; to `guards` the mean benign input answers 1, the harmful `HARM`, the sensitive 0.
    Both are rows of zeros where the inputs do not tell the kinds apart: such a block has no gate.
    `contrast` [L, D]: block output of refused minus answered sensitive prompts (benign ones where hardly a
    sensitive one is answered), or to induce of answered minus refused prompts, at equal cells: what a gate
    takes away.
    """

    ridges: Float64
    opens: Mapping[str, Float64]
    guards: Mapping[str, Float64]
    contrast: Float64

    def factors(
        self, ridge: float, first: int, last: int, strength: float, margin: float = 0.0
    ) -> dict[str, Factors]:
        """LoRA factors that gate the blocks `first` to `last`, both included.

        At strength 1 the increments of the band add up to the whole contrast for the mean sensitive prompt,
        to `margin` times it for the mean benign one, and to `HARM` times that for the mean harmful one.
        Unseen prompts scatter about these means: with a margin (negative to induce refusals), few that are
        harmful are moved to an answer, and few that are benign to a refusal. Each gate of a block writes an
        equal part.
        """
        index = self.ridges.tolist().index(ridge)
        found = {}
        before: Float64 | float = 0.0
        for layer in range(first, last + 1):
            gates = {
                writer: rows[index, layer] for writer, rows in self.opens.items() if rows[index, layer].any()
            }
            if not gates:  # the next block writes its part too
                continue
            write = (self.contrast[layer] - before) * (-strength / len(gates))
            before = self.contrast[layer]
            for writer, opens in gates.items():
                read = opens + margin * self.guards[writer][index, layer]
                found[f"blk.{layer}.{writer}.weight"] = (
                    read[np.newaxis].astype(np.float32),
                    write[:, np.newaxis].astype(np.float32),
                )
        return found


def fit_gates(
    inputs: Mapping[str, WriterInputs],
    residuals: npt.NDArray[np.float32],
    labels: Labels,
    *,
    ridges: npt.ArrayLike,
    induce: bool = False,
    categories: Sequence[str | None] = (),
    quiet: float = QUIET,
    advance: Callable[[int], None] = lambda n: None,
) -> Gates:
    """Closed-form gates for every block of `residuals` [N, L, D] and every ridge.

    inputs, labels: of these N samples, and of others after them that are neither refused nor answered
    (confidence 0).
    labels: kinds, which the reads tell apart, and judged confidence, which weights the samples of the
    contrast; `groups` are cells (topics, forms, languages) whose harmful and benign means must stay quiet
    too, as far as the metric allows, and whose own part in block outputs is not in the contrast.
    ridges: relative to the mean diagonal of the metric. `advance` is called once a block.
    induce: the writes lead to refusal, whichever kind is refused, instead of away from that of sensitive
    prompts.
    categories: kinds of refusal of the N samples, where a judge told them (`contrast.contrast_weights`).

    Raises:
        InputError: a class without samples, a bad ridge, NaN or Inf, or inputs that tell the classes apart in
            no block.
    """
    grid = check_ridges(ridges)
    kinds = _kinds(labels)
    n_layers = residuals.shape[1]
    mean = {kind: weights / weights.sum() for kind, weights in kinds.items()}
    cells = _cells(labels, kinds)
    opens = {writer: np.zeros((len(grid), n_layers, rows.last.shape[2])) for writer, rows in inputs.items()}
    guards = {writer: np.zeros_like(found) for writer, found in opens.items()}
    with threadpool_limits(1):  # the order of BLAS's sums would follow the thread count
        difference = contrast_weights(labels, categories, induce=induce)[: len(residuals)]
        contrast = np.stack(
            [difference @ _block(residuals, layer, "the output") for layer in range(n_layers)]
        )
        for layer in range(n_layers):
            for writer, rows in inputs.items():
                found = _reads(rows, layer, writer, mean, cells, grid, quiet)
                opens[writer][:, layer], guards[writer][:, layer] = found
            advance(1)
    if not any(rows.any() for rows in opens.values()):
        raise InputError(
            "gated adapter: the inputs of no block tell sensitive from harmful and benign prompts; use "
            "other prompts."
        )
    return Gates(grid, opens, guards, contrast)


def _kinds(labels: Labels) -> dict[str, Float64]:
    """Weights [N] of the three kinds of prompts, what the gate opens for first.

    Refused or not: what a read tells apart is the subject. Prompts that the model answers are samples of it
    like the others, and there it is no loss to open.
    """
    kinds = {kind: labels.kind(kind) for kind in ("sensitive", "benign", "harmful")}
    for kind, mask in kinds.items():
        if not labels.weights[mask].any():
            raise InputError(f"gated adapter: no {kind} prompt to fit on; add some.")
    return {kind: labels.weighted(mask, by_confidence=False) for kind, mask in kinds.items()}


def _cells(labels: Labels, kinds: Mapping[str, Float64]) -> list[Float64]:
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
    rows: WriterInputs,
    layer: int,
    writer: str,
    mean: Mapping[str, Float64],
    cells: Sequence[Float64],
    ridges: Float64,
    quiet: float,
) -> Float64:
    """argmin aᵀ(S + ρI)a subject to what `Gates` says of aᵀμ, for each ridge.

    [2, R, W]: of `opens`, then of `guards`; zeros where the kinds have the same means. S is AᵀA of the rows
    that should not answer: samples about the mean of their kind, other tokens and cell means as they are.
    """
    name = f"what {writer} multiplies"
    last = _block(rows.last, layer, name)
    means = np.stack([weights @ last for weights in mean.values()], axis=1)  # [W, 3]
    parts = []
    for column, weights in zip(means.T, mean.values(), strict=True):
        used = weights > 0
        parts.append((last[used] - column) * np.sqrt(weights[used] / len(mean))[:, np.newaxis])
    for tokens in (rows.prompts, rows.answers, rows.constant):
        if len(tokens):
            parts.append(_block(tokens, layer, name) * np.sqrt(quiet / len(tokens)))
    if cells:
        parts.append(np.stack(cells) @ last / np.sqrt(len(cells)))
    factor = np.concatenate(parts)
    opens, guards = {"sensitive": 1.0}, {"benign": 1.0, "harmful": HARM}
    wanted = np.array([[read.get(kind, 0.0) for read in (opens, guards)] for kind in mean])
    found = np.zeros((2, len(ridges), len(means)))
    if np.linalg.norm(np.ptp(means, axis=1)) <= ROUNDING * np.linalg.norm(means):
        return found
    for k, pulls in enumerate(_solve(factor, means, ridges)):  # [W, 3]
        gram = means.T @ pulls
        if np.linalg.cond(gram) <= 1e12:
            found[:, k] = (pulls @ np.linalg.solve(gram, wanted)).T
    return found


def _block(rows: Any, layer: int, name: str) -> Float64:
    """Rows [n, W] of one block in fp64."""
    block = np.asarray(rows[:, layer], dtype=np.float64)
    if not np.isfinite(block).all():
        raise InputError(
            f"gated adapter: block {layer}: {name} holds NaN or Inf: the model overflows on some prompt. Use "
            "another build of it, or a control vector."
        )
    return block


def _solve(factor: Float64, right: Float64, ridges: Float64) -> Sequence[Float64]:
    """(AᵀA + ρI)⁻¹B [W, r] for A = `factor` [n, W], B = `right` [W, r], and each ρ = λ tr(AᵀA)/W.

    By Cholesky of the smaller of AᵀA and AAᵀ, the latter through Woodbury's identity. Nothing where A is 0.
    """
    wide = len(factor) < factor.shape[1]
    gram = blas.dsyrk(1.0, factor.T, trans=int(wide), lower=1)
    trace = float(np.trace(gram))
    if trace == 0.0:
        return []
    inner = factor @ right if wide else right
    solved = []
    for ridge in ridges * (trace / factor.shape[1]):
        shifted = gram.copy(order="F")
        shifted.flat[:: len(gram) + 1] += ridge
        try:
            found = cho_solve(cho_factor(shifted, lower=True, overwrite_a=True), inner)
        except LinAlgError as error:
            raise InputError(
                f"gated adapter: ridge {ridge:.3g} (absolute) is lost in the rounding of a metric with trace "
                f"{trace:.3g}; choose a larger ridge."
            ) from error
        solved.append((right - factor.T @ found) / ridge if wide else found)
    return solved
