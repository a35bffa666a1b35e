"""The gated adapter: gates in closed form, as a LoRA that llama.cpp loads.

`Samples` of the fit split enter. What leaves is kept in `gated_adapter.safetensors`: reads for every matrix, ridge
and block, and the contrast that the writes are made of. A candidate of the search becomes an adapter. The
search begins with long bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rs_gguf.engines.engine import Can, Engine, Steering
from rs_gguf.evaluation.acceptance import Effect
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods.gates import GatedAdapterFit, fit_gated_adapter
from rs_gguf.methods.method import Space
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.files import load_arrays, save_arrays
from rs_gguf.records.trials import Candidate
from rs_gguf.steering import lora_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue


class GatedAdapter:
    """Changes of matrices that act on prompts which resemble the sensitive ones."""

    name: ClassVar[str] = "adapter"
    word: ClassVar[str] = "gated adapter"
    suffixes: ClassVar[tuple[str, ...]] = ("-adapter.gguf",)
    artefact: ClassVar[str] = "gated_adapter.safetensors"

    def suits(self, engine: Engine) -> bool:
        return Can.MATRIX_INPUTS in engine.can

    def steps(self, options: FitOptions, n_layer: int) -> int:
        return n_layer

    def fit(
        self,
        samples: Samples,
        options: FitOptions,
        *,
        processes: Processes = ALONE,
        advance: Callable[[int], None] = lambda n: None,
    ) -> GatedAdapterFit | None:
        """Fit gates for every block and ridge. `advance` counts blocks."""
        if not samples.inputs:
            return None
        mine = samples.share(processes)
        known = [*mine.categories, *[None] * (len(mine.prompts) - len(mine.categories))]
        shares = processes.gather([*known, *[None] * len(mine.others)])
        return fit_gated_adapter(
            mine.inputs,
            mine.activations,
            mine.labels(processes),
            ridges=options.gate_ridges,
            induce=options.effect == "induce",
            categories=list(itertools.chain.from_iterable(shares)),
            device=options.device,
            processes=processes,
            advance=advance,
        )

    def draw(
        self,
        fitted: GatedAdapterFit,
        samples: Samples,
        options: FitOptions,
        folder: Path,
        *,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Draw nothing: there are no figures of gates."""

    def save(self, fitted: GatedAdapterFit, folder: Path) -> dict[str, Any]:
        reads = {
            f"{name}/{output_matrix}": rows.astype(np.float32)
            for name, found in (
                ("sensitive_gate", fitted.sensitive_gate),
                ("benign_gate", fitted.benign_gate),
            )
            for output_matrix, rows in found.items()
        }
        arrays = {"ridges": fitted.ridges, "contrast": fitted.contrast, **reads}
        save_arrays(folder / self.artefact, arrays)
        return {}

    def load(self, folder: Path, options: FitOptions) -> GatedAdapterFit | None:
        path = folder / self.artefact
        if not path.is_file():
            return None
        arrays = load_arrays(path)
        sensitive_gate, benign_gate = (
            {
                name.removeprefix(way): a.astype(np.float64)
                for name, a in arrays.items()
                if name.startswith(way)
            }
            for way in ("sensitive_gate/", "benign_gate/")
        )
        return GatedAdapterFit(arrays["ridges"], sensitive_gate, benign_gate, arrays["contrast"])

    def space(self, fitted: GatedAdapterFit, n_layer: int, effect: Effect) -> Space:
        return space_of(fitted.ridges.tolist(), n_layer, induce=effect == "induce")

    def steering(
        self, fitted: GatedAdapterFit, candidate: Candidate, architecture: str, scratch: Path
    ) -> Steering:
        """Return the adapter at unit strength, a file in `scratch`, scaled: strengths share the file."""
        unit = replace(candidate, strength=1.0)
        path = scratch / f"gate-{unit.ridge:g}-{unit.first}-{unit.last}-{unit.benign_target:g}.gguf"
        if not path.exists():
            (found,) = self.files(fitted, unit, architecture, {})
            lora_file.write(found, path)
        return Steering({}, [(path, candidate.strength)])

    def files(
        self,
        fitted: GatedAdapterFit,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> tuple[LoraAdapter]:
        factors = fitted.factors(
            candidate.ridge, candidate.first, candidate.last, candidate.strength, candidate.benign_target
        )
        return (LoraAdapter(factors, architecture, facts),)


def space_of(ridges: Sequence[float], n_layer: int, *, induce: bool = False) -> Space:
    """Long bands, since a gate sensitive_gate a little in each block and four blocks alone remove little.

    The first third is left alone at first: a change there reaches everything that follows.
    """
    first, last = max(FIRST_STEERABLE, n_layer // 3), max(FIRST_STEERABLE, n_layer - 2)
    # With less, more benign prompts are refused than before; to induce, fewer harmful ones.
    benign_target = -0.4 if induce else 0.4
    # Half of the contrast is halfway from the mean of one side to that of the other, and less turns few
    # verdicts over. The whole takes a refused prompt all the way: far beyond it short answers still get
    # better, and full ones break.
    least = 0.5
    most = 2.5 if induce else 1.5
    strength = 1.25 if induce else least
    start = [
        Candidate(GatedAdapter.name, "", ridge, first, last, strength, benign_target) for ridge in ridges
    ]
    return Space(
        GatedAdapter.name,
        [("", ridge) for ridge in ridges],
        first=(max(FIRST_STEERABLE, n_layer // 5), max(FIRST_STEERABLE, n_layer // 2)),
        length=(max(1, n_layer // 3), max(1, n_layer * 5 // 6)),
        strength=(0.1, most),
        start=start,
        benign_target=benign_target,
        least=least,
        most=most,
    )
