"""Hold a LoRA adapter in memory: low-rank changes of weight matrices, W' = W + scale · B A.

In: pairs (A, B), each under the name of the matrix that it changes. Out: a checked, immutable `LoraAdapter`.
Unlike a control vector's effect, an adapter's effect depends on the input. Formats: docs/adapters.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from rs_gguf.engines.engine import Steering
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import holds_experts, split_name
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering.provenance import ProvenanceValue, checked_provenance, typed

Factors = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
FACTOR_NAME = re.compile(r"(blk\.[0-9]{1,4}\.(?:shortconv\.)?[a-z0-9_]+\.weight)\.lora_([ab])")


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank changes of named matrices: `factors` maps `blk.N.<matrix>.weight` to A [r, in], B [out, r].

    A tensor that holds a matrix for each of E experts has A [E, r, in] and B [E, out, r]. At scale 1.0,
    exactly B A is added to the matrix. `architecture` is llama.cpp's name of the model family,
    which its loader compares with the model. `provenance` is as in `SteeringVector`. `invoked` marks another
    tool's aLoRA, which llama-server applies only after its invocation tokens. Arrays are copied, made
    read-only and sorted by layer.

    Raises:
        InputError: there is no matrix or architecture, shapes do not multiply, or numbers are not finite.
            Also for the embedding or output matrix: llama.cpp aborts where one matrix serves as both.
    """

    kind: ClassVar[str] = "adapter"
    option: ClassVar[str] = "--lora"
    part: ClassVar[str] = "matrix"
    intended_effect: ClassVar[str] = "each product changes by B A x"

    factors: Mapping[str, Factors]
    architecture: str
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)
    invoked: bool = False

    def __post_init__(self) -> None:
        factors = {name: (_copied(a), _copied(b)) for name, (a, b) in self.factors.items()}
        faults = [fault for name, pair in factors.items() for fault in factor_faults(name, *pair)]
        if not factors:
            faults.append("the adapter changes no matrix")
        if not self.architecture:
            faults.append("the architecture is missing; llama.cpp's loader compares it with the model's")
        if faults:
            raise InputError("; ".join(faults) + ". Fit the adapter again.")
        ordered = dict(sorted(factors.items(), key=lambda item: split_name(item[0])))
        object.__setattr__(self, "factors", ordered)
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))

    @property
    def layers(self) -> list[int]:
        """The layers that hold a changed matrix, ascending, 0-based."""
        return sorted({split_name(name)[0] for name in self.factors})

    @property
    def matrices(self) -> list[str]:
        """The kinds of matrix that are changed in at least one layer, such as `ffn_down`."""
        return sorted({split_name(name)[1] for name in self.factors})

    @property
    def rank(self) -> int:
        """The largest rank among the changes."""
        return max(int(a.shape[-2]) for a, _ in self.factors.values())

    @property
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each change B A."""
        return {name: math.sqrt(max(0.0, _inner(pair, pair))) for name, pair in self.factors.items()}

    def __eq__(self, other: object) -> bool:
        """Return whether all numbers, provenance entries (with types) and the architecture are the same."""
        if not isinstance(other, LoraAdapter):
            return NotImplemented
        return (
            list(self.factors) == list(other.factors)
            and all(
                np.array_equal(x, y)
                for name, pair in self.factors.items()
                for x, y in zip(pair, other.factors[name], strict=True)
            )
            and self.architecture == other.architecture
            and typed(self.provenance) == typed(other.provenance)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value and have no hash

    def refuse_invoked(self) -> None:
        """Raise `InputError` for an aLoRA, whose factors alone would change every token."""
        if self.invoked:
            raise InputError(
                "the adapter is an aLoRA: llama-server applies it only after its invocation tokens, but a "
                "file written here would apply to every token. Use the original file."
            )

    @property
    def contents(self) -> dict[str, ProvenanceValue]:
        """The kind of file and what it changes, for display."""
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "layers": self.layers,
            "matrices": self.matrices,
            "rank": self.rank,
        }

    def with_facts(self, facts: Mapping[str, ProvenanceValue], *, in_place_of: str = "\0") -> LoraAdapter:
        """Return the same adapter with `facts` added to its provenance, which loses keys with this prefix."""
        kept = {k: v for k, v in self.provenance.items() if not k.startswith(in_place_of)}
        return replace(self, provenance={**kept, **facts})

    @classmethod
    def combined(cls, parts: Sequence[tuple[LoraAdapter, float]]) -> LoraAdapter:
        """Return the sum of weight × adapter over the union of their matrices; ranks add up.

        The sum equals loading all parts with `--lora-scaled`, up to rounding. The provenance of part i is
        kept under `combine.i.`, its weight as `combine.i.weight`.

        Raises:
            InputError: there is no part, a weight is not finite, a part is an aLoRA, or the parts belong to
                different models.
        """
        if not parts:
            raise InputError("there is nothing to combine; give at least one adapter.")
        families = sorted({adapter.architecture for adapter, _ in parts})
        if len(families) > 1:
            raise InputError(
                f"the adapters are for {' and '.join(families)}: they belong to different models. "
                "Combine only adapters of one model."
            )
        total: dict[str, Factors] = {}
        provenance: dict[str, ProvenanceValue] = {}
        for index, (adapter, weight) in enumerate(parts):
            if not math.isfinite(weight):
                raise InputError(f"the weight {weight} of adapter {index} is not a finite number; give one.")
            adapter.refuse_invoked()
            for name, (a, b) in adapter.factors.items():
                with np.errstate(over="ignore"):  # the constructor below reports it
                    weighted = b * np.float32(weight)
                if name not in total:
                    total[name] = a, weighted
                    continue
                _same_shape(name, total[name], (a, b))
                before = total[name]
                total[name] = (
                    np.concatenate([before[0], a], axis=-2),
                    np.concatenate([before[1], weighted], axis=-1),
                )
            provenance |= {f"combine.{index}.{key}": value for key, value in adapter.provenance.items()}
            provenance[f"combine.{index}.weight"] = float(weight)
        return cls(total, families[0], provenance)

    def cosines(self, other: LoraAdapter) -> dict[str, float]:
        """Return ⟨B A, B' A'⟩ / (‖B A‖ ‖B' A'‖) of each matrix that both change.

        Raise `InputError` if the shapes of a matrix differ.
        """
        cosines = {}
        ours, theirs = self.norms, other.norms
        for name, pair in self.factors.items():
            if name in other.factors and ours[name] and theirs[name]:
                _same_shape(name, pair, other.factors[name])
                cosines[name] = _inner(pair, other.factors[name]) / (ours[name] * theirs[name])
        return cosines

    @property
    def gates(self) -> dict[str, npt.NDArray[np.float32]]:
        """Rows of A [W] by matrix, with activation 1 at the mean sensitive prompt.

        Empty unless this is a gated adapter of this project: other adapters are not normalised so.
        """
        if self.provenance.get("estimator") != GATED_ADAPTER or self.rank != 1:
            return {}
        return {name: a[0] for name, (a, _) in self.factors.items()}

    def steering(self, path: Path, scale: float = 1.0) -> Steering:
        """Return the steering that applies the adapter at `scale`; engines load the file at `path`."""
        return Steering({}, [(path, scale)])

    def options(self, path: str) -> str:
        """Return llama.cpp's options for the file at `path`, which must already be quoted for the shell."""
        return f"{self.option} {path}"


def _copied(factor: Any) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which `factor_faults` reports by name
        copy = np.array(factor, dtype=np.float32, order="C")
    copy.flags.writeable = False
    return copy


def factor_faults(name: str, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> list[str]:
    """Return why A and B cannot change the matrix `name`; an empty list if they can. See `LoraAdapter`."""
    if not FACTOR_NAME.fullmatch(f"{name}.lora_a"):
        return [f"{name!r} is not the weight of a layer (blk.N.<matrix>.weight)"]
    experts, shapes = ("E, ", 3) if holds_experts(name) else ("", 2)
    multiply = a.ndim == b.ndim == shapes and (*a.shape[:-2], a.shape[-2]) == (*b.shape[:-2], b.shape[-1])
    if not multiply or 0 in (a.size, b.size):
        return [
            f"{name}: A {a.shape} and B {b.shape} do not multiply; A must be [{experts}r, in], "
            f"B [{experts}out, r]"
        ]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return [f"{name}: NaN or Inf, which would make every logit NaN"]
    return []


def _inner(first: Factors, second: Factors) -> float:
    """Return ⟨B A, B' A'⟩, the sum of products of all entries, without forming either product."""
    (a, b), (c, d) = ([factor.astype(np.float64) for factor in pair] for pair in (first, second))
    return float(np.sum((b.swapaxes(-1, -2) @ d) * (a @ c.swapaxes(-1, -2))))


def _same_shape(name: str, first: Factors, second: Factors) -> None:
    shapes = [(*b.shape[:-1], a.shape[-1]) for a, b in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{name} has the shape {shapes[0]} in one adapter and {shapes[1]} in another: they belong to "
            "different models. Give adapters of one model."
        )
