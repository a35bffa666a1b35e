"""A steering vector in memory, and its use on a PyTorch model.

In: one direction per steered block, with where it came from. Out: a checked, immutable `SteeringVector`, and
`apply`, which adds `scale × direction` to the output of those blocks at every position. That is the additive
intervention of arXiv 2512.16602 (section on interventions, h' = h + α·s·v, with α·s already inside the
direction) and, block for block, what llama.cpp's `build_cvec` does with `direction.N`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rs_gguf.errors import InputError
from rs_gguf.models.architecture import FIRST_STEERABLE, MAX_LAYERS

if TYPE_CHECKING:
    from torch import nn

Scalar = str | int | float | bool
ProvenanceValue = Scalar | list[str] | list[int] | list[float] | list[bool]

KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
INT64 = range(-(2**63), 2**63)


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

    directions: Mapping[int, npt.NDArray[np.float32]]
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)
    architecture: str = ""

    def __post_init__(self) -> None:
        # The dataclass is frozen for its users; its own constructor is the one place that completes it.
        object.__setattr__(self, "directions", _checked_directions(self.directions))
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))
        _checked_text("The architecture", self.architecture)

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
            and _typed(self.provenance) == _typed(other.provenance)
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
        from rs_gguf.engines.pytorch.weights import adding

        with adding(model, _times(self.directions, _finite(scale))):
            yield


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


def checked_provenance(provenance: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """Facts about an origin that a GGUF file can hold, sorted; `InputError` names the first it cannot."""
    checked: dict[str, ProvenanceValue] = {}
    for key, value in provenance.items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise InputError(
                f"Provenance key {key!r} is not a dotted name of ASCII letters, digits, _ and -; rename it."
            )
        # NumPy's scalars are what metrics usually come as.
        items = [
            item.item() if isinstance(item, np.generic) else item
            for item in (value if isinstance(value, list) else [value])
        ]
        if len({type(item) for item in items}) != 1:
            raise InputError(
                f"Provenance {key} is a list of {len(items)} values; one type and at least one needed."
            )
        for item in items:
            _checked_scalar(key, item)
        checked[key] = items if isinstance(value, list) else items[0]
    return dict(sorted(checked.items()))


def _checked_scalar(key: str, value: Any) -> None:
    if type(value) is str:
        _checked_text(f"Provenance {key}", value)
    elif type(value) is float and not math.isfinite(value):
        raise InputError(f"Provenance {key} is {value}; leave out what has no finite value.")
    elif type(value) is int and value not in INT64:
        raise InputError(f"Provenance {key} is {value}, beyond 64 bits; store it as a string.")
    elif type(value) not in (str, int, float, bool):
        raise InputError(
            f"Provenance {key} is of type {type(value).__name__}; str, int, float, bool or a list of one of "
            "these is accepted."
        )


def _checked_text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} is of type {type(value).__name__}; a string is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode text: {error}.") from error


def _typed(provenance: Mapping[str, ProvenanceValue]) -> dict[str, tuple[Sequence[str], ProvenanceValue]]:
    """Provenance with the types beside the values, since 1 == 1.0 == True in Python but not in a file."""
    return {
        key: ([type(item).__name__ for item in (value if isinstance(value, list) else [value])], value)
        for key, value in provenance.items()
    }
