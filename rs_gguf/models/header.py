"""The header of a GGUF file, however large: metadata without its lists, and what is told of the tensors.

A path goes in, a `Header` comes out. No weight is read and no vocabulary kept, so it takes milliseconds.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError

# struct's codes of the value types of the format, by their number there; 8 is text, 9 a list.
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its dimensions with the inputs first, ggml's number of its type, its offset in the data."""

    name: str
    shape: Sequence[int]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """`values` are the metadata, None for a list. Tensors are told of from byte `tensors_at` to `end`.

    To a multiple of `alignment` bytes the header is padded, and so is each tensor.
    """

    values: dict[str, Any]
    tensors: Sequence[TensorInfo]
    alignment: int
    tensors_at: int
    end: int


def read(path: Path) -> Header:
    """The header of a GGUF file. Every length is followed, none is believed.

    Raises:
        InputError: not a GGUF file, or a damaged header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()
    except (OSError, OverflowError, ValueError, struct.error) as error:  # a ValueError: an empty file
        raise InputError(
            f"{path}: not a GGUF file that can be read ({error}). Get the file again."
        ) from error


def values_of_whole(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file. `InputError` where it is one of several that hold a model.

    llama.cpp finds the others by their names; here a model is the file that was given. Of a file that cannot
    be read there are none: whoever loads it tells better what is wrong.
    """
    try:
        values = read(path).values
    except InputError:
        return {}
    count = values.get("split.count", 0)
    if count not in (0, 1):  # 0: they were merged
        raise _part_of(str(path), count)
    return values


def refuse_part_by_name(name: str) -> None:
    """The same by the name alone, `…-00001-of-00003.gguf`, for a file that is not here."""
    found = re.search(r"-\d{5}-of-(\d{5})\.gguf$", name)
    if found and int(found[1]) > 1:
        raise _part_of(name, int(found[1]))


def _part_of(name: str, count: int) -> InputError:
    return InputError(
        f"{name} is one of {count} files that hold a model. Get them all and make them one: "
        "`llama-gguf-split --merge FIRST OUT`."
    )


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def read(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._at = 8
        n_tensors, n_values = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(n_values):
            key = self._name("metadata key", values)
            values[key] = self._value(self._number("I"))
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        tensors_at = self._at
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name = self._name("tensor", tensors)
            n_dims = self._number("I")
            if n_dims > _MAX_DIMS:
                raise ValueError(f"tensor {name[:80]!r} has {n_dims} dimensions")
            shape = [self._number("Q") for _ in range(n_dims)]
            tensors[name] = TensorInfo(name, shape, self._number("I"), self._number("Q"))
        return Header(values, list(tensors.values()), alignment, tensors_at, self._at)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _name(self, what: str, known: Mapping[str, Any]) -> str:
        """A name that is not there yet, as llama.cpp asks for; or a header of zeros would go on and on."""
        name = self._text()
        if not name or name in known:
            raise ValueError(f"{what} {name[:80]!r} is {'there twice' if name else 'empty'}")
        return name

    def _text(self) -> str:
        start = self._at + 8
        self._pass_over(self._number("Q"))
        # Names that differ must not be made alike: llama.cpp compares their bytes.
        return self._data[start : self._at].decode("utf-8", "backslashreplace")

    def _pass_over(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError("it ends too early")
        self._at += size

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in CODES:
            return self._number(CODES[kind])
        if kind != _LIST:
            raise ValueError(f"unknown value type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _TEXT:  # a vocabulary: passed over
            for _ in range(count):
                self._pass_over(self._number("Q"))
        elif kind in CODES:
            self._pass_over(count * struct.calcsize("<" + CODES[kind]))
        else:
            raise ValueError("a list of lists")
        return None
