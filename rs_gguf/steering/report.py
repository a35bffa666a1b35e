"""What was found out of a steering file: by reading it, and by running it on a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True)
class EffectCheck:
    """What was seen. `reasons` is empty when the effect is the one that the file promises."""

    effect_observed: bool
    reasons: tuple[str, ...]
    relative_error: dict[str, float]  # of each steered block, or of each matrix that was looked at
    kl_mean: float | None  # nats, next-token distribution steered against unsteered, where it is a number
    loader_says: str = ""  # what llama.cpp logs where it refuses a sound file for this model

    @property
    def largest_relative_error(self) -> float:
        return max(self.relative_error.values(), default=float("nan"))


@dataclass(frozen=True)
class CheckReport(Generic[Found]):
    """What a check of a control vector or an adapter found.

    `errors` make the file unfit, `warnings` do not. `loader_says` is the line that llama.cpp would log before
    going on without the vector. It is empty where llama.cpp would load the file (on the model, when one was
    given), and for an adapter. It is also empty where a rule of ours ended the reading before the line was
    known.
    `found` is the vector or adapter that was read, None where it cannot be used. `proof` is what running it
    showed, when a model was given and the file itself has no error.
    """

    path: str
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    loader_says: str = ""
    found: Found | None = None
    effect: EffectCheck | None = None

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against using the file."""
        return not self.errors
