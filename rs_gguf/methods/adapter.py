"""Make a gated adapter: gate vectors in closed form, as a LoRA that llama.cpp loads.

`Samples` of the fit split go in. The fit is kept in `gated_adapter.safetensors`: gate vectors for every
output matrix, ridge and layer, and the refusal contrast that gives the output vectors. A candidate of the
search becomes a `LoraAdapter`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Can, Steering
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods.gates import GatedAdapterFit, fit_gated_adapter
from rs_gguf.methods.method import REFUSAL_STEERING, Space
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.models.architecture import FIRST_STEERABLE, searched_layers
from rs_gguf.records.files import load_arrays, save_arrays
from rs_gguf.records.metrics import Effect
from rs_gguf.records.trials import Candidate
from rs_gguf.steering import lora_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue

_GATES = ("sensitive_gate", "benign_gate")  # names of arrays in the artefact, before that of the matrix


class GatedAdapter:
    """The method that changes output matrices so that mainly prompts like the sensitive ones are affected."""

    name: ClassVar[str] = "adapter"
    word: ClassVar[str] = "gated adapter"
    source: ClassVar[str] = REFUSAL_STEERING
    suffix: ClassVar[str] = "-adapter.gguf"
    artefact: ClassVar[str] = "gated_adapter.safetensors"
    can_refit: ClassVar[bool] = True

    def suits(self, can: Can, effect: Effect) -> bool:
        return Can.MATRIX_INPUTS in can

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
        """Fit gate vectors for every layer and ridge; return None without inputs. `advance` counts layers."""
        if not samples.inputs:
            return None
        local = samples.share(processes)
        known = [*local.categories, *[None] * (len(local.prompts) - len(local.categories))]
        shares = processes.gather([*known, *[None] * len(local.gate_only)])
        return fit_gated_adapter(
            local.inputs,
            local.activations,
            local.labels(processes),
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
    ) -> None:
        """Draw nothing: gate vectors have no figures."""

    def save(self, fitted: GatedAdapterFit, folder: Path) -> dict[str, Any]:
        arrays: dict[str, NDArray[Any]] = {"ridges": fitted.ridges, "contrast": fitted.contrast}
        for gate, rows_of in zip(_GATES, (fitted.sensitive_gate, fitted.benign_gate), strict=True):
            for output_matrix, rows in rows_of.items():
                arrays[f"{gate}/{output_matrix}"] = rows.astype(np.float32)
        save_arrays(folder / self.artefact, arrays)
        return {}

    def load(self, folder: Path, options: FitOptions) -> GatedAdapterFit | None:
        path = folder / self.artefact
        if not path.is_file():
            return None
        arrays = load_arrays(path)
        sensitive_gate, benign_gate = (
            {
                name.removeprefix(f"{gate}/"): rows.astype(np.float64)
                for name, rows in arrays.items()
                if name.startswith(f"{gate}/")
            }
            for gate in _GATES
        )
        return GatedAdapterFit(arrays["ridges"], sensitive_gate, benign_gate, arrays["contrast"])

    def space(self, fitted: GatedAdapterFit, n_layer: int, effect: Effect) -> Space:
        return space_of(fitted.ridges.tolist(), n_layer, induce=effect == "induce")

    def steering(
        self, fitted: GatedAdapterFit, candidate: Candidate, architecture: str, scratch: Path
    ) -> Steering:
        """Return the adapter of unit strength, as a file in `scratch`, with the strength as its scale.

        Candidates that differ in strength alone share the file.
        """
        unit = replace(candidate, strength=1.0)
        name = f"{self.name}-{unit.ridge:g}-{unit.first}-{unit.last}-{unit.benign_target:g}.gguf"
        path = scratch / name
        if not path.exists():
            lora_file.write(LoraAdapter(fitted.factors(*arguments(unit)), architecture), path)
        return Steering({}, [(path, candidate.strength)])

    def file(
        self,
        fitted: GatedAdapterFit,
        candidate: Candidate,
        architecture: str,
        facts: Mapping[str, ProvenanceValue],
    ) -> LoraAdapter:
        return LoraAdapter(fitted.factors(*arguments(candidate)), architecture, facts)


def arguments(candidate: Candidate) -> tuple[float, int, int, float, float]:
    """Return what `GatedAdapterFit.factors` takes of a candidate."""
    return candidate.ridge, candidate.first, candidate.last, candidate.strength, candidate.benign_target


def space_of(ridges: Sequence[float], n_layer: int, *, induce: bool = False) -> Space:
    """Return a search space of long layer ranges: each layer adds a little, and 4 layers alone remove little.

    The search starts behind the first third of the layers, since a change there affects all later layers.
    """
    first, last = max(FIRST_STEERABLE, n_layer // 3), searched_layers(n_layer)[-1]
    # Nearer to 0, more benign prompts close and more harmful ones open.
    benign_target = -0.4 if induce else 0.4
    # Strength is measured in refusal contrasts: 0.5 shifts the mean sensitive prompt by half of the
    # difference between refused and answered prompts. Weaker gates flip few verdicts. Far above 1, short
    # answers still improve, but full-length answers degenerate.
    least = 0.5
    most = 2.5 if induce else 1.5
    strength = 1.25 if induce else least
    start = [
        Candidate(GatedAdapter.name, "", ridge, first, last, strength, benign_target) for ridge in ridges
    ]
    return Space(
        GatedAdapter.name,
        [("", ridge) for ridge in ridges],
        first=(searched_layers(n_layer).start, max(FIRST_STEERABLE, n_layer // 2)),
        length=(max(1, n_layer // 3), max(1, n_layer * 5 // 6)),
        strength=(0.1, most),
        start=start,
        benign_target=benign_target,
        least=least,
        most=most,
    )
