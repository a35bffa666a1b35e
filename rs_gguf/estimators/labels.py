"""What is known of each sample besides its activations: confidence, kind, groups, weight.

Plain arrays of the caller enter, `Labels` leaves: checked, of one length, and, over several processes, of
all samples, so that every process sees the same classes. A class is a vector of non-negative weights [N];
0 means that a sample is not in it. Classes by refusal confidence: method §3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import Float64
from rs_gguf.machine import ALONE, Processes
from rs_gguf.records.conversation import KINDS

MIN_SAMPLES = 4  # below which a mean is noise
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Labels:
    """Confidence [N], kinds [N] or None, groups [N, G] (G may be 0), weights [N], `local` part of them."""

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
        """Check what this process has and gather that of all. `InputError` names the array."""
        score = np.asarray(confidence, dtype=np.float64)
        if score.ndim != 1 or not (np.abs(score) <= 1).all():
            raise InputError(
                f"confidence of shape {score.shape} with range {np.min(score, initial=1)} … "
                f"{np.max(score, initial=-1)}: one number in [-1, 1] a sample is accepted"
            )
        count = len(score)
        weights = np.ones(count) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise InputError(f"sample_weight must be {count} finite numbers ≥ 0, one a sample")
        kind = None if kinds is None else np.asarray(kinds, dtype=np.str_)
        if kind is not None and (kind.shape != (count,) or not np.isin(kind, KINDS).all()):
            raise InputError(
                f"kinds of shape {kind.shape} with the values {sorted(set(kind.ravel().tolist()))[:6]}: "
                f"{count} of {', '.join(KINDS)} are accepted, one a sample"
            )
        group = np.empty((count, 0), dtype=np.str_) if groups is None else np.asarray(groups, dtype=np.str_)
        group = group.reshape(-1, 1) if group.ndim == 1 else group
        if group.ndim != 2 or len(group) != count:
            raise InputError(
                f"groups have the shape {group.shape}: [{count}] or [{count}, groupings] of names is "
                "accepted, with '' for a sample outside a grouping"
            )
        parts = processes.gather((score, kind, group, weights))
        if len({part[1] is None for part in parts}) > 1:
            raise InputError("kinds were given by some processes and not by others: all or none must")
        start = sum(len(part[0]) for part in parts[: processes.rank])
        return cls(
            np.concatenate([part[0] for part in parts]),
            None if kind is None else np.concatenate([part[1] for part in parts]),
            np.concatenate([part[2] for part in parts]),
            np.concatenate([part[3] for part in parts]),
            slice(start, start + count),
        )

    def refused(self, neutral: float) -> Mask:
        return self.confidence > neutral

    def answered(self, neutral: float) -> Mask:
        return self.confidence < -neutral

    def undecided(self, neutral: float) -> Mask:
        return np.abs(self.confidence) <= neutral

    def kind(self, name: str) -> Mask:
        """Samples of one kind; `InputError` when no kinds were given."""
        if self.kinds is None:
            raise InputError(
                f"this estimator needs the kind of each sample; pass kinds=[…] with one of {', '.join(KINDS)}"
            )
        mask: Mask = self.kinds == name
        return mask

    def weighted(self, mask: Mask, *, by_confidence: bool) -> Float64:
        """The weight vector [N] of the samples in `mask`: their own weight, times |c| when asked."""
        weights = self.weights * np.abs(self.confidence) if by_confidence else self.weights
        return np.where(mask, weights, 0.0)

    def reweighted(self, weights: Float64) -> Labels:
        """The same samples with other weights [N]."""
        return replace(self, weights=weights)
