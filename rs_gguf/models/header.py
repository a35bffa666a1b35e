"""Read the header of a GGUF file: metadata without lists, and the tensors' names, shapes, types and offsets.

Takes a path and returns a `Header`. It reads no weights and keeps no vocabulary, so it takes milliseconds
whatever the size of the file.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError

# struct's codes for the value types of the format, by their number in GGUF. 8 is text, 9 a list.
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_BYTES = 2**27  # the largest vocabularies take some 2^24


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape`: inputs first. `type`: ggml's number. `offset`: bytes from the data's start."""

    name: str
    shape: Sequence[int]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    `values`: the metadata; None stands for a list. `spans`: first byte and end of each metadata entry.
    `end`: its size in bytes. The header and each tensor are padded to a multiple of `alignment` bytes.
    """

    values: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: Sequence[TensorInfo]
    alignment: int
    end: int


def read(path: Path) -> Header:
    """Return the header of a GGUF file. Every length is checked; a header takes 128 MiB at most.

    Raises:
        InputError: the file is not a GGUF file, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            # A whole model may be larger than the memory that a process may address.
            size = min(os.fstat(file.fileno()).st_size, _MAX_BYTES)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Reader(data).read()
    # mmap raises ValueError for an empty file.
    except (OSError, OverflowError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a readable GGUF file ({error}). Get the file again.") from error


def values_of_whole(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file that holds a whole model.

    Return {} for a file that cannot be read: llama.cpp gives the better message when it loads the file.

    Raises:
        InputError: the file is one part of a split model. llama.cpp would find the other parts by their
            names, but hashes and copies of this project cover one file.
    """
    try:
        values = read(path).values
    except InputError:
        return {}
    count = values.get("split.count", 0)
    if count not in (0, 1):  # 0 marks a merged file.
        raise _split_error(str(path), count)
    return values


def refuse_part_by_name(name: str) -> None:
    """Refuse a part of a split model by its name (`…-00001-of-00003.gguf`), before it is downloaded.

    Raises:
        InputError: the name belongs to a part.
    """
    suffix = re.search(r"-\d{5}-of-(\d{5})\.gguf$", name)
    if suffix and int(suffix[1]) > 1:
        raise _split_error(name, int(suffix[1]))


def _split_error(name: str, count: int) -> InputError:
    return InputError(
        f"{name} is one of {count} files that hold a model; a single file is accepted. Get all of them and "
        "merge them: `llama-gguf-split --merge FIRST OUT`."
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
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(n_values):
            start = self._at
            key = self._name("metadata key", values)
            values[key] = self._value(self._number("I"))
            spans[key] = start, self._at
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name = self._name("tensor", tensors)
            n_dims = self._number("I")
            if n_dims > _MAX_DIMS:
                raise ValueError(f"tensor {name[:80]!r} has {n_dims} dimensions")
            shape = [self._number("Q") for _ in range(n_dims)]
            tensors[name] = TensorInfo(name, shape, self._number("I"), self._number("Q"))
        return Header(values, spans, list(tensors.values()), alignment, self._at)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _name(self, what: str, known: Mapping[str, Any]) -> str:
        """Return the next name. It must be new, as in llama.cpp: otherwise a header of zeros never ends."""
        name = self._text()
        if not name or name in known:
            raise ValueError(f"{what} {name[:80]!r} is {'there twice' if name else 'empty'}")
        return name

    def _text(self) -> str:
        start = self._at + 8
        self._skip(self._number("Q"))
        # Names with different bytes must stay different: llama.cpp compares their bytes.
        return self._data[start : self._at].decode("utf-8", "backslashreplace")

    def _skip(self, size: int) -> None:
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
        if kind == _TEXT:  # such as a vocabulary
            for _ in range(count):
                self._skip(self._number("Q"))
        elif kind in CODES:
            self._skip(count * struct.calcsize("<" + CODES[kind]))
        else:
            raise ValueError("a list of lists")
        return None
