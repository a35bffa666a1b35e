"""A steering vector in memory, and its use on a PyTorch model.

In: one direction per steered block, with where it came from. Out: a checked, immutable `SteeringVector`, and
`apply`, which adds `scale × direction` to the output of those blocks at every position. That is the additive
intervention of arXiv 2512.16602 (section on interventions, h' = h + α·s·v, with α·s already inside the
direction) and, block for block, what llama.cpp's `build_cvec` does with `direction.N`.
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
    """Directions that are added to the outputs of decoder blocks.

    `directions` maps a 0-based block number to a float32 array [D], all of one width D, in the unit of the
    residual stream: at scale 1.0 exactly this is added. Blocks start at 1, since llama.cpp cannot steer block
    0. `provenance` holds facts about the origin (method, strength, metrics…) as strings, 64-bit integers,
    finite floats, booleans, or non-empty lists of one of these. `architecture` is llama.cpp's name for the
    model family, such as `qwen2`, or empty when unknown.

    Arrays are copied, made read-only and sorted by block. Raises `InputError` for anything else.
    """

    kind: ClassVar[str] = "control vector"
    option: ClassVar[str] = "--control-vector"
    part: ClassVar[str] = "block"
    moves: ClassVar[str] = "every block moves by its direction"

    directions: Mapping[int, npt.NDArray[np.float32]]
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)
    architecture: str = ""

    def __post_init__(self) -> None:
        # The dataclass is frozen for its users; its own constructor is the one place that completes it.
        object.__setattr__(self, "directions", _checked_directions(self.directions))
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))
        checked_text("The architecture", self.architecture)

    @property
    def width(self) -> int:
        """D, the width of the residual stream that the directions belong to."""
        return len(next(iter(self.directions.values())))

    @property
    def layers(self) -> list[int]:
        """The steered blocks, ascending."""
        return list(self.directions)

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean length of each direction, in the unit of the residual stream."""
        return {
            layer: float(np.linalg.norm(row.astype(np.float64))) for layer, row in self.directions.items()
        }

    def __eq__(self, other: object) -> bool:
        """Equal when every number, provenance entry (with its type) and the architecture are the same."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return (
            self.layers == other.layers
            and all(np.array_equal(row, other.directions[layer]) for layer, row in self.directions.items())
            and typed(self.provenance) == typed(other.provenance)
            and self.architecture == other.architecture
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value

    def scaled(self, scale: float) -> SteeringVector:
        """The vector times `scale`, in float32 as llama.cpp multiplies; `scaled_by` in the provenance keeps
        the product.

        Raises `InputError` when `scale` or a product is not finite.
        """
        factor = _finite(scale)
        before = self.provenance.get("scaled_by", 1.0)
        total = factor * (float(before) if isinstance(before, int | float) else 1.0)
        return SteeringVector(
            _times(self.directions, factor), {**self.provenance, "scaled_by": total}, self.architecture
        )

    @contextmanager
    def apply(self, model: nn.Module, scale: float = 1.0) -> Iterator[None]:
        """Steer a transformers model inside the `with` block: block N outputs h + scale × direction N.

        Every position is steered, prompt included. Hooks are removed however the block ends, and none stays
        when attaching one fails. Nested uses add up. Raises `InputError` before any change when a direction's
        block or width does not exist in the model, or `scale` is not finite.
        """
        from rs_gguf.engines.pytorch.weights import add_directions

        with add_directions(model, _times(self.directions, _finite(scale))):
            yield

    @property
    def contents(self) -> dict[str, ProvenanceValue]:
        """The kind of file and what it steers, for people."""
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "width": self.width,
            "layers": self.layers,
        }

    def with_facts(self, facts: Mapping[str, ProvenanceValue]) -> SteeringVector:
        """Return the same vector with `facts` added to its provenance."""
        return replace(self, provenance={**self.provenance, **facts})

    @classmethod
    def combined(cls, parts: Sequence[tuple[SteeringVector, float]]) -> SteeringVector:
        """Return the sum of weight × vector, over the union of their blocks, as loading them all adds up.

        Computed in float32, part by part and in this order, as llama.cpp adds several
        `--control-vector-scaled` files. The provenance of part i is kept under `combine.i.`, its weight as
        `combine.i.weight`. The architecture is kept where the parts agree. Raises `InputError` when there is
        no part, widths differ, or a weight or a sum is not finite in float32.
        """
        if not parts:
            raise InputError("There is nothing to combine; give at least one vector.")
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
        """Return the cosine at each block that both steer with a non-zero direction, in float64.

        Raises `InputError` when their widths differ.
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

    def steering(self, path: Path, scale: float = 1.0) -> Steering:
        """Return what puts the vector on an engine at `scale`, from memory: `path` is not read again."""
        return Steering(_times(self.directions, _finite(scale)))

    def options(self, path: str) -> str:
        """Return llama.cpp's options for the file at `path`, given as a word of the shell."""
        return options(path, self.layers[0], self.layers[-1])


def options(path: str, first: int, last: int) -> str:
    """Return llama.cpp's options for a vector that steers the blocks `first` to `last`."""
    # Not `-scaled`, which splits its argument at colons: a path on Windows has one.
    return f"{SteeringVector.option} {path} --control-vector-layer-range {first} {last}"


def _times(
    directions: Mapping[int, npt.NDArray[np.float32]], factor: float
) -> dict[int, npt.NDArray[np.float32]]:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which `scaled`'s constructor reports
        return {layer: row * np.float32(factor) for layer, row in directions.items()}


def _finite(scale: float) -> float:
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float | np.floating)
        or not abs(scale) <= float(np.finfo(np.float32).max)
    ):
        raise InputError(f"The scale is {scale!r}; a finite number of float32 is needed.")
    return float(scale)


def _checked_directions(directions: Mapping[int, Any]) -> dict[int, npt.NDArray[np.float32]]:
    if not directions:
        raise InputError(
            "The vector has no direction; give at least one block, as {layer: array of width D}."
        )
    checked: dict[int, npt.NDArray[np.float32]] = {}
    for layer, given in directions.items():
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int | np.integer)
            or not FIRST_STEERABLE <= layer < MAX_LAYERS
        ):
            raise InputError(
                f"Block {layer!r} cannot be steered: block numbers are integers from 1 to {MAX_LAYERS - 1} "
                "(block 0 is out of llama.cpp's reach). Leave it out."
            )
        try:
            with np.errstate(over="ignore"):
                row = np.array(given, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"The direction of block {layer} is no array of numbers ({error}).") from None
        if row.ndim != 1 or row.size == 0:
            raise InputError(
                f"The direction of block {layer} has shape {row.shape}; one of shape [D] is needed."
            )
        if not np.isfinite(row).all():
            raise InputError(
                f"The direction of block {layer} has {int((~np.isfinite(row)).sum())} values that are NaN, "
                "Inf or beyond float32; they would reach every logit. Fit it again or leave the block out."
            )
        row.flags.writeable = False
        checked[int(layer)] = row
    widths = {len(row) for row in checked.values()}
    if len(widths) != 1:
        raise InputError(f"The directions have widths {sorted(widths)}; all must have the model's width.")
    return dict(sorted(checked.items()))


def _same_width(a: SteeringVector, b: SteeringVector) -> None:
    if a.width != b.width:
        raise InputError(f"The vectors are {a.width} and {b.width} wide: they belong to different models.")
