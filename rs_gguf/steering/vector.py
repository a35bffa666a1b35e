"""Hold a steering vector in memory and apply it to a PyTorch model.

In: one direction for each steered layer, and facts about its origin. Out: a checked, immutable
`SteeringVector`. Its `apply` adds `scale × direction` to the output of these layers at every position. This
is the additive intervention of arXiv 2512.16602 (section on interventions, h' = h + α·s·v, with α·s already
inside the direction). llama.cpp's `build_cvec` does the same, layer by layer, with `direction.N`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from rs_gguf.engines.engine import Steering
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import FIRST_STEERABLE, MAX_LAYERS
from rs_gguf.steering.provenance import ProvenanceValue, checked_provenance, checked_text, typed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions that are added to the outputs of decoder layers.

    `directions` maps a 0-based layer number to a float32 array [D], all of one width D, in the unit of the
    residual stream. At scale 1.0, exactly this array is added. Layers start at 1, since llama.cpp cannot
    steer layer 0. `provenance` holds facts about the origin (method, strength, metrics…) as strings, 64-bit
    integers, finite floats, booleans, or non-empty lists of one of these. `architecture` is llama.cpp's name
    of the model family, such as `qwen2`; empty if unknown.

    Arrays are copied, made read-only and sorted by layer. Anything else raises `InputError`.
    """

    kind: ClassVar[str] = "control vector"
    option: ClassVar[str] = "--control-vector"
    part: ClassVar[str] = "layer"
    intended_effect: ClassVar[str] = "the output of every layer changes by its direction"

    directions: Mapping[int, npt.NDArray[np.float32]]
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)
    architecture: str = ""

    def __post_init__(self) -> None:
        # The dataclass is frozen for users, so only its constructor replaces the fields by checked ones.
        object.__setattr__(self, "directions", _checked_directions(self.directions))
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))
        checked_text("the architecture", self.architecture)

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return len(next(iter(self.directions.values())))

    @property
    def layers(self) -> list[int]:
        """The steered layers, ascending, 0-based."""
        return list(self.directions)

    @property
    def norms(self) -> dict[int, float]:
        """The Euclidean norm of each direction, in the unit of the residual stream."""
        return {
            layer: float(np.linalg.norm(row.astype(np.float64))) for layer, row in self.directions.items()
        }

    def __eq__(self, other: object) -> bool:
        """Return whether all numbers, provenance entries (with types) and the architecture are the same."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return (
            self.layers == other.layers
            and all(np.array_equal(row, other.directions[layer]) for layer, row in self.directions.items())
            and typed(self.provenance) == typed(other.provenance)
            and self.architecture == other.architecture
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value and have no hash

    def scaled(self, scale: float) -> SteeringVector:
        """Return the vector times `scale`, multiplied in float32 as in llama.cpp.

        `scaled_by` in the provenance is the product of all scales so far. Raise `InputError` if `scale` or a
        number of the product is not finite.
        """
        factor = _finite(scale)
        before = self.provenance.get("scaled_by", 1.0)
        total = factor * (float(before) if isinstance(before, int | float) else 1.0)
        return SteeringVector(
            _times(self.directions, factor), {**self.provenance, "scaled_by": total}, self.architecture
        )

    @contextmanager
    def apply(self, model: nn.Module, scale: float = 1.0) -> Iterator[None]:
        """Steer a transformers model inside the `with` statement: layer N outputs h + scale × direction N.

        Every position is steered, prompt included. Hooks are removed however the statement ends, and none
        remains if attaching one fails. Nested uses add up.

        Raises:
            InputError: the model lacks a direction's layer or its width, or `scale` is not finite. The model
                is then unchanged.
        """
        from rs_gguf.engines.pytorch.weights import add_directions

        with add_directions(model, _times(self.directions, _finite(scale))):
            yield

    @property
    def contents(self) -> dict[str, ProvenanceValue]:
        """The kind of file and what it steers, for display."""
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "width": self.width,
            "layers": self.layers,
        }

    def with_facts(self, facts: Mapping[str, ProvenanceValue], *, in_place_of: str = "\0") -> SteeringVector:
        """Return the same vector with `facts` added to its provenance, which loses keys with this prefix."""
        kept = {k: v for k, v in self.provenance.items() if not k.startswith(in_place_of)}
        return replace(self, provenance={**kept, **facts})

    @classmethod
    def combined(cls, parts: Sequence[tuple[SteeringVector, float]]) -> SteeringVector:
        """Return the sum of weight × vector over the union of their layers.

        The sum is computed in float32, part by part and in this order, as llama.cpp adds several
        `--control-vector-scaled` files. The provenance of part i is kept under `combine.i.`, its weight as
        `combine.i.weight`. The architecture is kept if all parts have the same.

        Raises:
            InputError: there is no part, widths differ, or a weight or a sum is not finite in float32.
        """
        if not parts:
            raise InputError("there is nothing to combine; give at least one vector.")
        total: dict[int, npt.NDArray[np.float32]] = {}
        provenance: dict[str, ProvenanceValue] = {}
        for index, (vector, weight) in enumerate(parts):
            _same_width(parts[0][0], vector)
            for layer, row in vector.scaled(weight).directions.items():
                with np.errstate(over="ignore"):  # the constructor below reports it
                    total[layer] = total[layer] + row if layer in total else row
            provenance |= {f"combine.{index}.{key}": value for key, value in vector.provenance.items()}
            provenance[f"combine.{index}.weight"] = float(weight)
            if vector.architecture:
                provenance[f"combine.{index}.architecture"] = vector.architecture
        hints = {vector.architecture for vector, _ in parts}
        return cls(total, provenance, hints.pop() if len(hints) == 1 else "")

    def cosines(self, other: SteeringVector) -> dict[int, float]:
        """Return the cosine at each layer that both steer with a non-zero direction, in float64.

        Raise `InputError` if their widths differ.
        """
        _same_width(self, other)
        ours, theirs = self.norms, other.norms
        return {
            layer: float(
                np.dot(row.astype(np.float64), other.directions[layer].astype(np.float64))
                / (ours[layer] * theirs[layer])
            )
            for layer, row in self.directions.items()
            if layer in other.directions and row.any() and other.directions[layer].any()
        }

    @property
    def gates(self) -> dict[str, npt.NDArray[np.float32]]:
        """Nothing: a control vector has no gates."""
        return {}

    def steering(self, path: Path, scale: float = 1.0) -> Steering:
        """Return the steering that applies the vector at `scale`, from memory; `path` is not read."""
        return Steering(_times(self.directions, _finite(scale)))

    def options(self, path: str) -> str:
        """Return llama.cpp's options for the file at `path`, which must already be quoted for the shell."""
        return options(path, self.layers[0], self.layers[-1])


def options(path: str, first: int, last: int) -> str:
    """Return llama.cpp's options for a vector that steers the layers `first` to `last`, both included."""
    # `-scaled` would split its argument at colons, which paths on Windows contain.
    return f"{SteeringVector.option} {path} --control-vector-layer-range {first} {last}"


def _times(
    directions: Mapping[int, npt.NDArray[np.float32]], factor: float
) -> dict[int, npt.NDArray[np.float32]]:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the constructor reports
        return {layer: row * np.float32(factor) for layer, row in directions.items()}


def _finite(scale: float) -> float:
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float | np.floating)
        or not abs(scale) <= float(np.finfo(np.float32).max)
    ):
        raise InputError(f"the scale is {scale!r}; a finite number in the range of float32 is needed.")
    return float(scale)


def _checked_directions(directions: Mapping[int, Any]) -> dict[int, npt.NDArray[np.float32]]:
    if not directions:
        raise InputError(
            "the vector has no direction; give at least one layer, as {layer: array of width D}."
        )
    checked: dict[int, npt.NDArray[np.float32]] = {}
    for layer, direction in directions.items():
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int | np.integer)
            or not FIRST_STEERABLE <= layer < MAX_LAYERS
        ):
            raise InputError(
                f"layer {layer!r} cannot be steered: accepted are integers from 1 to {MAX_LAYERS - 1}, since "
                "llama.cpp cannot steer layer 0. Leave it out."
            )
        try:
            with np.errstate(over="ignore"):
                row = np.array(direction, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the direction of layer {layer} is not an array of numbers ({error}). "
                "Give numbers of shape [D]."
            ) from None
        if row.ndim != 1 or row.size == 0:
            raise InputError(f"the direction of layer {layer} has shape {row.shape}; shape [D] is needed.")
        if not np.isfinite(row).all():
            raise InputError(
                f"the direction of layer {layer} has {int((~np.isfinite(row)).sum())} values that are NaN, "
                "Inf or beyond float32; they would make every logit NaN. Fit it again or leave the layer out."
            )
        row.flags.writeable = False
        checked[int(layer)] = row
    widths = {len(row) for row in checked.values()}
    if len(widths) != 1:
        raise InputError(f"the directions have widths {sorted(widths)}; all must have the model's width.")
    return dict(sorted(checked.items()))


def _same_width(a: SteeringVector, b: SteeringVector) -> None:
    if a.width != b.width:
        raise InputError(
            f"the vectors have widths {a.width} and {b.width}: they belong to different models. "
            "Give vectors of one model."
        )
