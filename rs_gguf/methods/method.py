"""A way to make steering files: how one is fitted, where a search looks for the best one, what is written.

Samples of the fit split go in; whatever the method fits, `Candidate`s of its `Space`, and files come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.evaluation.acceptance import Effect
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.records.trials import Candidate
from rs_gguf.steering.file import SteeringFile
from rs_gguf.steering.provenance import ProvenanceValue

Fitted = TypeVar("Fitted")


class SteeringMethod(Protocol[Fitted]):
    """One way to make steering files. Fitting and search ask nothing else of it.

    `name`: its key in `METHODS` and in results. `word`: for people. `suffixes`: of the names of the files
    that it writes, after the effect. `artefact`: the file of a run folder that holds what was fitted.
    """

    name: ClassVar[str]
    word: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    artefact: ClassVar[str]

    def suits(self, engine: Engine) -> bool:
        """Whether the engine can read what a fit needs."""

    def steps(self, options: FitOptions, n_layer: int) -> int:
        """Return how far `fit` and `draw` advance together."""

    def fit(
        self,
        samples: Samples,
        options: FitOptions,
        *,
        processes: Processes = ALONE,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Fitted | None:
        """Fit all that the options name; None where the samples hold nothing that it could be fitted on.

        Several `processes` call this together, each with all samples, and share the moments. What ranks above
        0 return is not complete.
        """

    def draw(
        self,
        fitted: Fitted,
        samples: Samples,
        options: FitOptions,
        folder: Path,
        *,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Draw what was just fitted, as figures in `folder`."""

    def save(self, fitted: Fitted, folder: Path) -> dict[str, Any]:
        """Write what was fitted to a run folder; return what `fit.json` says of it."""

    def load(self, folder: Path, options: FitOptions) -> Fitted | None:
        """Read what `save` wrote; None where nothing was fitted."""

    def space(self, fitted: Fitted, n_layer: int, effect: Effect) -> Space:
        """Return where a search looks."""

    def steering(self, fitted: Fitted, candidate: Candidate, architecture: str, scratch: Path) -> Steering:
        """Return what puts a candidate on an engine, of which files may lie in the folder `scratch`."""

    def files(
        self,
        fitted: Fitted,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> tuple[SteeringFile, ...]:
        """Return what is written of a candidate, with `facts` as provenance; a file for each suffix."""


@dataclass(frozen=True)
class Space:
    """Where a search looks, for one method: the pairs of estimator and ridge, inclusive ranges of the rest.

    `first` and `length` are in blocks; all have the same `benign_target`. The points of `start` are tried before all
    others. A candidate answers first with a strength of `least` at least, and never with more than `most`.
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
        """Whether the candidate is one of this space's kind: methods are searched apart."""
        return candidate.method == self.method and (candidate.estimator, candidate.ridge) in self.directions
