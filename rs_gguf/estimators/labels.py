"""Hold what is known of each sample besides its activations: confidence, kind, groups, weight.

Plain arrays of the caller go in; `Labels` comes out, checked and of one length. With several processes it
holds the samples of all of them, so that every process forms the same classes. A class is a vector of
non-negative weights [N]; 0 means that a sample is not in the class. Classes by refusal confidence: method §3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import Float64
from rs_gguf.machine import ALONE, Processes
from rs_gguf.records.conversation import KINDS

MIN_SAMPLES = 4
"""Fewer samples give a mean that is mostly noise."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Labels:
    """The labels of N samples.

    confidence: refusal confidence [N] in [−1, 1].
    kinds: [N], or None if the caller gave none.
    groups: names [N, G] for G groupings; G may be 0, and "" puts a sample outside a grouping.
    weights: [N] ≥ 0.
    local: the samples whose activations this process has.
    """

    confidence: Float64
    kinds: npt.NDArray[np.str_] | None
    groups: npt.NDArray[np.str_]
    weights: Float64
    local: slice

    @classmethod
    def of(
        cls,
        confidence: npt.ArrayLike,
        kinds: npt.ArrayLike | None = None,
        groups: npt.ArrayLike | None = None,
        sample_weight: npt.ArrayLike | None = None,
        *,
        processes: Processes = ALONE,
    ) -> Labels:
        """Check the arrays of this process and return the labels of all processes.

        Raises:
            InputError: an array has a wrong shape or value; the message names the array.
        """
        scores = np.asarray(confidence, dtype=np.float64)
        if scores.ndim != 1 or not (np.abs(scores) <= 1).all():
            raise InputError(
                f"confidence of shape {scores.shape} with range {np.min(scores, initial=1)} … "
                f"{np.max(scores, initial=-1)}: one number in [-1, 1] per sample is accepted"
            )
        count = len(scores)
        weights = np.ones(count) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise InputError(f"sample_weight must be {count} finite numbers ≥ 0, one per sample")
        kind = None if kinds is None else np.asarray(kinds, dtype=np.str_)
        if kind is not None and (kind.shape != (count,) or not np.isin(kind, KINDS).all()):
            raise InputError(
                f"kinds of shape {kind.shape} with the values {sorted(set(kind.ravel().tolist()))[:6]}: "
                f"{count} of {', '.join(KINDS)} are accepted, one per sample"
            )
        group = np.empty((count, 0), dtype=np.str_) if groups is None else np.asarray(groups, dtype=np.str_)
        group = group.reshape(-1, 1) if group.ndim == 1 else group
        if group.ndim != 2 or len(group) != count:
            raise InputError(
                f"groups have the shape {group.shape}: [{count}] or [{count}, groupings] of names is "
                "accepted, with '' for a sample outside a grouping"
            )
        parts = processes.gather((scores, kind, group, weights))
        if len({part[1] is None for part in parts}) > 1:
            raise InputError("some processes gave kinds and others did not: all or none must give them")
        start = sum(len(part[0]) for part in parts[: processes.rank])
        return cls(
            np.concatenate([part[0] for part in parts]),
            None if kind is None else np.concatenate([part[1] for part in parts]),
            np.concatenate([part[2] for part in parts]),
            np.concatenate([part[3] for part in parts]),
            slice(start, start + count),
        )

    def refused(self, neutral: float) -> Mask:
        """Return the mask [N] of the samples with confidence above `neutral`."""
        return self.confidence > neutral

    def answered(self, neutral: float) -> Mask:
        """Return the mask [N] of the samples with confidence below −`neutral`."""
        return self.confidence < -neutral

    def undecided(self, neutral: float) -> Mask:
        """Return the mask [N] of the samples with |confidence| up to `neutral`."""
        return np.abs(self.confidence) <= neutral

    def kind(self, name: str) -> Mask:
        """Return the mask [N] of the samples of one kind; raise `InputError` if the caller gave no kinds."""
        if self.kinds is None:
            raise InputError(
                f"this estimator needs the kind of each sample; pass kinds=[…] with one of {', '.join(KINDS)}"
            )
        mask: Mask = self.kinds == name
        return mask

    def weighted(self, mask: Mask, *, by_confidence: bool) -> Float64:
        """Return weights [N], times |confidence| if `by_confidence`; 0 outside `mask`."""
        weights = self.weights * np.abs(self.confidence) if by_confidence else self.weights
        return np.where(mask, weights, 0.0)

    def reweighted(self, weights: Float64) -> Labels:
        """Return the same samples with other weights [N]."""
        return replace(self, weights=weights)
