"""Compare distributions of the next token: logits go in; log-probabilities and KL divergences come out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log-probabilities [..., V] of logits [..., V]."""
    from scipy.special import log_softmax  # only who runs a model needs the extra `run`

    return np.asarray(log_softmax(logits.astype(np.float64), axis=-1))


def kl(of: NDArray[Any], against: NDArray[Any]) -> NDArray[np.float64]:
    """Return KL(of‖against) [...] in nats; NaN where a number is not finite.

    of, against: logits or log-probabilities [..., V].
    """
    with np.errstate(invalid="ignore"):
        p, q = log_probabilities(of), log_probabilities(against)
        found = np.sum(np.exp(p) * (p - q), axis=-1)
    finite = np.isfinite(of).all(axis=-1) & np.isfinite(against).all(axis=-1)
    return np.where(finite, found, np.nan)
