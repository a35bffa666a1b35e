"""Check facts about the origin of a vector or an adapter, so that a GGUF file can hold them.

In: any mapping of names to values. Out: a sorted dictionary of the accepted types, or an `InputError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rs_gguf.errors import InputError

Scalar = str | int | float | bool
ProvenanceValue = Scalar | list[str] | list[int] | list[float] | list[bool]

KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
INT64 = range(-(2**63), 2**63)


def checked_provenance(provenance: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """Return the facts sorted by name. Raise `InputError` for the first that a GGUF file cannot hold."""
    checked: dict[str, ProvenanceValue] = {}
    for key, value in provenance.items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise InputError(
                f"provenance key {key!r} is not a dotted name of ASCII letters, digits, _ and -; rename it."
            )
        # Metrics usually arrive as NumPy scalars.
        items = [
            item.item() if isinstance(item, np.generic) else item
            for item in (value if isinstance(value, list) else [value])
        ]
        if len({type(item) for item in items}) != 1:
            raise InputError(
                f"provenance {key} is a list of {len(items)} values; one type and at least one are needed."
            )
        for item in items:
            _checked_scalar(key, item)
        checked[key] = items if isinstance(value, list) else items[0]
    return dict(sorted(checked.items()))


def _checked_scalar(key: str, value: Any) -> None:
    if type(value) is str:
        checked_text(f"provenance {key}", value)
    elif type(value) is float and not math.isfinite(value):
        raise InputError(f"provenance {key} is {value}; leave out facts with no finite value.")
    elif type(value) is int and value not in INT64:
        raise InputError(f"provenance {key} is {value}, beyond 64 bits; store it as a string.")
    elif type(value) not in (str, int, float, bool):
        raise InputError(
            f"provenance {key} has type {type(value).__name__}; accepted are str, int, float, bool or a "
            "list of one of these."
        )


def checked_text(what: str, value: Any) -> None:
    """Raise `InputError`, which names the value `what`, unless `value` is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InputError(f"{what} has type {type(value).__name__}; a string is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid Unicode text ({error}). Use text that UTF-8 can encode."
        ) from error


def typed(provenance: Mapping[str, ProvenanceValue]) -> dict[str, tuple[Sequence[str], ProvenanceValue]]:
    """Return each value with its types: 1, 1.0 and True are equal in Python but not in a file."""
    return {
        key: ([type(item).__name__ for item in (value if isinstance(value, list) else [value])], value)
        for key, value in provenance.items()
    }
