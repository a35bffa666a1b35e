"""What a gate takes away: refused against answered prompts, with all else that they have in common left out.

Labels and the judged kinds of refusal go in; the weight of each sample in the contrast comes out. The
difference of means that control vectors are made of (method §3) holds the subjects, the
forms of request and the languages that are refused more often; this is the coefficient of the refusal beside
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rs_gguf.errors import InputError
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.records.conversation import FAILURES, NEUTRAL


def contrast_weights(labels: Labels, categories: Sequence[str | None] = (), *, induce: bool) -> Float64:
    """Weights [N] of the samples: 1 in all on the one side of the contrast, −1 on the other.

    categories: kinds of refusal by the rubric of the first samples; None, or beyond them, where unknown.

    What samples have of their topic, form and language is not to be taken away with the refusal. So this is
    the least-squares coefficient of the side, beside one for each cell that both sides have samples of; a
    ridge of one sample a cell keeps rare cells from it. Residuals of the side on the cells are such weights
    (the theorem of Frisch, Waugh and Lovell). Without cells: mean of one side minus mean of the other.

    Raises:
        InputError: a side without samples.
    """
    one, other = _sides(labels, categories, induce)
    side = one.astype(np.float64) - other
    weights = labels.weighted(one | other, by_confidence=True)
    columns = [np.ones(len(side))]
    for names in labels.groups.T:
        for cell in sorted(set(names[one].tolist()) & set(names[other].tolist()) - {""}):
            columns.append((names == cell).astype(np.float64))
    design = np.stack(columns, axis=1)
    weighted = design * weights[:, np.newaxis]
    gram = weighted.T @ design + np.diag([0.0] + [1.0] * (len(columns) - 1))
    shared = torch.linalg.solve(torch.from_numpy(gram), torch.from_numpy(weighted.T @ side)).numpy()
    residual = weights * side - weighted @ shared
    found: Float64 = 2 * residual / (residual @ side)
    return found


def _sides(labels: Labels, categories: Sequence[str | None], induce: bool) -> tuple[Mask, Mask]:
    """The samples [N] on either side of the contrast: the writes lead from the first to the second."""
    refused, answered = labels.refused(NEUTRAL), labels.answered(NEUTRAL)
    sensitive = labels.kind("sensitive")
    if induce:  # the topic need not be refused yet
        refused = target_refusals(refused, categories, direct=True)
        sides = {"answered benign or sensitive": ~labels.kind("harmful") & answered, "refused": refused}
    else:
        # What the subjects have of their own is on both sides, so that a gate leaves it alone.
        enough = np.count_nonzero(sensitive & answered) >= MIN_SAMPLES
        kind = "sensitive" if enough else "benign"
        sides = {
            "refused sensitive": target_refusals(sensitive & refused, categories),
            f"answered {kind}": labels.kind(kind) & answered,
        }
    for verdict, mask in sides.items():
        if not labels.weights[mask].any():
            raise InputError(f"gated adapter: no {verdict} prompt to fit on; add some.")
    one, other = sides.values()
    return one, other


def target_refusals(refused: Mask, categories: Sequence[str | None], *, direct: bool = False) -> Mask:
    """Of the refusals [N] those that a steering leads away from, or, to induce, leads to: no mere failures.

    categories: as of `contrast_weights`. `direct`: in so many words, as a user who induces refusals wants
    them. Where too few are such, more are taken: in the end all.
    """
    known = np.full(len(refused), "", dtype="<U32")
    known[: len(categories)] = [category or "" for category in categories]
    choices: list[Mask] = [refused & ~np.isin(known, FAILURES), refused]
    if direct:
        choices.insert(0, refused & (known == "direct"))
    return next((mask for mask in choices if np.count_nonzero(mask) >= MIN_SAMPLES), refused)
