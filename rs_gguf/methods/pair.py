"""Make a pair: a gated adapter, and the control vector that holds the constant part of its gates.

`Samples` of the fit split go in. The fit is kept in `gated_pair.safetensors`, as a gated adapter's fit with
intercepts. A candidate of the search becomes a `LoraAdapter` and a `SteeringVector`, which llama.cpp loads
together. `rs_gguf.methods.gates` says where the constant part enters the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from rs_gguf.engines.engine import Can
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods.adapter import GatedAdapter, arguments
from rs_gguf.methods.gates import GatedAdapterFit
from rs_gguf.methods.options import FitOptions, GateOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.records.trials import Candidate
from rs_gguf.steering.file import SteeringFile
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.vector import SteeringVector


class GatedPair(GatedAdapter):
    """The method that gives the gates of an adapter an intercept; it is used if the options have one."""

    name: ClassVar[str] = "pair"
    word: ClassVar[str] = "pair of adapter and vector"
    suffixes: ClassVar[tuple[str, ...]] = ("-pair-adapter.gguf", "-pair-vector.gguf")
    artefact: ClassVar[str] = "gated_pair.safetensors"

    def suits(self, can: Can, options: FitOptions) -> bool:
        return options.gate.intercept > 0 and super().suits(can, options)

    def gate_options(self, options: FitOptions) -> GateOptions:
        """Return the variants of the closed form, with the intercept."""
        return options.gate

    def fit(
        self,
        samples: Samples,
        options: FitOptions,
        *,
        processes: Processes = ALONE,
        advance: Callable[[int], None] = lambda n: None,
    ) -> GatedAdapterFit | None:
        """Fit as a gated adapter is; return None without inputs or without an intercept."""
        if not options.gate.intercept:
            return None
        return super().fit(samples, options, processes=processes, advance=advance)

    def files(
        self,
        fitted: GatedAdapterFit,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> tuple[SteeringFile, ...]:
        directions = fitted.directions(*arguments(candidate))
        vector = SteeringVector(directions, facts, architecture)
        return (*super().files(fitted, candidate, architecture, facts), vector)
