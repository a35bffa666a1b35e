"""Define the interface of a method that makes steering files: fit, search space, file.

Samples of the fit split go in. The fit, the `Space` of its candidates and the file of a `Candidate` come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rs_gguf.engines.engine import Can, Steering
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.records.metrics import Effect
from rs_gguf.records.trials import Candidate
from rs_gguf.steering.file import SteeringFile
from rs_gguf.steering.provenance import ProvenanceValue

Fitted = TypeVar("Fitted")

REFUSAL_STEERING = "Refusal Steering, arXiv 2512.16602"


class SteeringMethod(Protocol[Fitted]):
    """One method that makes steering files. Fitting and search use nothing else of it.

    name: its key in `METHODS` and in results.
    word: its name in text.
    source: where it comes from, for the provenance of its files.
    suffix: end of the name of its file, after the effect.
    artefact: the file of a run folder that holds the fit.
    can_refit: whether the fit reads inputs of matrices, which its own file changes.
    """

    name: ClassVar[str]
    word: ClassVar[str]
    source: ClassVar[str]
    suffix: ClassVar[str]
    artefact: ClassVar[str]
    can_refit: ClassVar[bool]

    def suits(self, can: Can, effect: Effect) -> bool:
        """Return whether an engine with these abilities can fit and load it for this effect."""

    def steps(self, options: FitOptions, n_layer: int) -> int:
        """Return the number of steps by which `fit` advances."""

    def fit(
        self,
        samples: Samples,
        options: FitOptions,
        *,
        processes: Processes = ALONE,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Fitted | None:
        """Fit what the options name; return None if the samples lack what the method needs.

        Several `processes` call this together, each with all samples, and share the sums. The result is
        complete on rank 0 only.
        """

    def draw(
        self,
        fitted: Fitted,
        samples: Samples,
        options: FitOptions,
        folder: Path,
    ) -> None:
        """Draw figures of a fit that was just made, in `folder`."""

    def save(self, fitted: Fitted, folder: Path) -> dict[str, Any]:
        """Write the fit to `folder`; return its entries for `fit.json`."""

    def load(self, folder: Path, options: FitOptions) -> Fitted | None:
        """Read the fit that `save` wrote; return None if there is none."""

    def space(self, fitted: Fitted, n_layer: int, effect: Effect) -> Space:
        """Return the search space of the candidates."""

    def steering(self, fitted: Fitted, candidate: Candidate, architecture: str, scratch: Path) -> Steering:
        """Return the steering of a candidate for an engine. Its file, if any, lies in `scratch`."""

    def file(
        self,
        fitted: Fitted,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> SteeringFile:
        """Return the file of a candidate, with `facts` as provenance."""


@dataclass(frozen=True)
class Space:
    """The search space of one method; ranges include both ends.

    directions: pairs of estimator and ridge; the estimator is "" if the method has none.
    first: range of the first layer.
    length: range of the number of layers.
    strength: range of the strength.
    start: candidates that are tried before all others.
    benign_target: the same for all candidates.
    least: lowest strength at which a candidate first generates answers.
    most: highest strength at which a candidate generates answers.
    """

    method: str
    directions: Sequence[tuple[str, float]]
    first: tuple[int, int]
    length: tuple[int, int]
    strength: tuple[float, float]
    start: Sequence[Candidate]
    benign_target: float = 0.0
    least: float = 0.0
    most: float = math.inf

    def holds(self, candidate: Candidate) -> bool:
        """Return whether the candidate has a method, estimator and ridge of this space."""
        return candidate.method == self.method and (candidate.estimator, candidate.ridge) in self.directions
