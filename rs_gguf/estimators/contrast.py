"""Weigh samples for the refusal contrast of a gated adapter (method §8).

The refusal contrast is the difference of activations between refused and answered prompts at equal topic,
form and language. Labels and the refusal categories of the judge go in; the weight of each sample in the
contrast comes out. The difference of means that control vectors use (method §3) also holds the topics, forms
and languages that are refused more often. Here the regression coefficient of the refusal replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rs_gguf.errors import InputError
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels, Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.records.conversation import EXPLICIT, NEUTRAL


def contrast_weights(labels: Labels, categories: Sequence[str | None] = (), *, induce: bool) -> Float64:
    """Return weights [N] of the samples: they add up to 1 in the first class and to −1 in the second.

    To remove refusals, the first class holds refused sensitive prompts and the second answered ones. To
    induce, the first class holds answered prompts and the second refused ones.

    categories: refusal category of each sample by the rubric; None, or a shorter list, where it is unknown.

    An adapter must not remove what the samples owe to their topic, form and language. The weights therefore
    give the least-squares coefficient of the class beside one coefficient for each group that both classes
    have samples of. A ridge of one sample per group keeps small groups from fitting the refusal. The weights
    are the residuals of the class on the groups (theorem of Frisch, Waugh and Lovell). Without groups they
    give the difference of the two class means.

    Raises:
        InputError: a class has no sample.
    """
    first, second = _classes(labels, categories, induce)
    sign = first.astype(np.float64) - second
    weights = labels.weighted(first | second, by_confidence=True)
    columns = [np.ones(len(sign))]
    for names in labels.groups.T:
        for group in sorted(set(names[first].tolist()) & set(names[second].tolist()) - {""}):
            columns.append((names == group).astype(np.float64))
    design = np.stack(columns, axis=1)
    weighted = design * weights[:, np.newaxis]
    gram = weighted.T @ design + np.diag([0.0] + [1.0] * (len(columns) - 1))
    coefficients = torch.linalg.solve(torch.from_numpy(gram), torch.from_numpy(weighted.T @ sign)).numpy()
    residual = weights * sign - weighted @ coefficients
    contrast: Float64 = 2 * residual / (residual @ sign)
    return contrast


def _classes(labels: Labels, categories: Sequence[str | None], induce: bool) -> tuple[Mask, Mask]:
    """Return masks [N] of the two classes; the adapter moves prompts from the first to the second."""
    refused, answered = labels.refused(NEUTRAL), labels.answered(NEUTRAL)
    sensitive = labels.kind("sensitive")
    if induce:  # the model may answer every sensitive prompt so far, so refusals of all kinds count
        classes = {
            "answered benign or sensitive": ~labels.kind("harmful") & answered,
            "refused": _explicit(refused, categories),
        }
    else:
        # With sensitive prompts in both classes, their subjects are not part of the contrast.
        enough = np.count_nonzero(sensitive & answered) >= MIN_SAMPLES
        kind = "sensitive" if enough else "benign"
        classes = {
            "refused sensitive": sensitive & refused,
            f"answered {kind}": labels.kind(kind) & answered,
        }
    for name, mask in classes.items():
        if not labels.weights[mask].any():
            raise InputError(f"gated adapter: no {name} prompt to fit on; at least one is needed. Add some.")
    first, second = classes.values()
    return first, second


def _explicit(refused: Mask, categories: Sequence[str | None]) -> Mask:
    """Return a mask [N] of the explicit refusals, which are what a user who induces refusals wants.

    If there are fewer than 4 (`MIN_SAMPLES`), all refusals count.
    """
    explicit = refused.copy()
    explicit[: len(categories)] &= np.array([category == EXPLICIT for category in categories], dtype=bool)
    explicit[len(categories) :] = False
    return explicit if np.count_nonzero(explicit) >= MIN_SAMPLES else refused
