"""Reports on a steering file: what reading it showed, and what running it on a model showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Content = TypeVar("Content", covariant=True)


@dataclass(frozen=True)
class EffectCheck:
    """The observed effect of a file on a model.

    `reasons` say why it is not the intended effect; empty if it is. `relative_error` is the error of each
    checked layer or matrix, relative to the length of its change. `kl_mean` is the mean KL divergence of the
    next token, steered from unsteered, in nats; None if it is not finite or was not measured. `loader_says`
    is the line that llama.cpp logs if it refuses a sound file for this model, else empty.
    """

    effect_observed: bool
    reasons: tuple[str, ...]
    relative_error: dict[str, float]
    kl_mean: float | None
    loader_says: str = ""

    @property
    def largest_relative_error(self) -> float:
        """The largest relative error; NaN if no layer or matrix was checked."""
        return max(self.relative_error.values(), default=float("nan"))


@dataclass(frozen=True)
class CheckReport(Generic[Content]):
    """The result of checking a control vector or an adapter.

    `errors` make the file unusable, `warnings` do not. `loader_says` is the line that llama.cpp logs before
    it goes on without the vector. It is empty if llama.cpp would load the file (on the model, if one was
    given), and for an adapter. It is also empty if a rule that llama.cpp does not have ended the reading
    first. `content` is the vector or adapter that was read; None if it is not usable. `effect` is the
    observed effect; None if no model was given or the file itself has an error.
    """

    path: str
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    loader_says: str = ""
    content: Content | None = None
    effect: EffectCheck | None = None

    @property
    def valid(self) -> bool:
        """Whether the file is usable: it has no error."""
        return not self.errors
