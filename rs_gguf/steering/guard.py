"""The way into GGUF files from strangers: what the `gguf` package takes on trust is checked first.

In: a path. Out: a `gguf.GGUFReader` over a file whose every count, length and offset has been followed and
found to lie inside it. The package maps the file and believes its numbers, so a wrong one means endless
loops, gigabytes of Python objects or silently shortened arrays. The rules are those of llama.cpp's own reader
(ggml/src/gguf.cpp, `gguf_init_from_reader`), so that what passes here is also what llama.cpp can open, with
ceilings that suit vectors and adapters: what a vector takes stays far below 200 MiB of memory.
"""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from rs_gguf.errors import InputError
from rs_gguf.models.header import CODES, DEFAULT_ALIGNMENT

MAX_BYTES = 32 * 2**20
"""Twice what the largest open model so far needs in float64 (126 blocks of width 16384)."""
MAX_NUMBERS = MAX_BYTES // 4
"""Numbers in all tensors: in float32 they fill a file of `MAX_BYTES`, and memory to match."""
MAX_ADAPTER_BYTES = 2**30 + 2**20
"""In F32, rank 32 on every matrix of Qwen2.5-32B, and a header; other tools' adapters are that large."""
MAX_ENTRIES = 16_384
"""Metadata values (list elements counted one by one) and tensors together; each costs the reader about 1 KiB.
"""
MAX_KEY_BYTES = 65_535
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing NUL


class StricterThanLlamaCpp(InputError):
    """A file that is refused here although llama.cpp may open it."""


def open_gguf(path: str | Path, max_bytes: int = MAX_BYTES) -> GGUFReader:
    """Open a GGUF file for reading. Raises `InputError`, with the first fault found, when it is not sound.

    `StricterThanLlamaCpp` where that fault alone would not keep llama.cpp from opening it.
    """
    data = read_bounded(path, max_bytes)
    try:
        _Walk(data, max_bytes // 4).file()
    except _Fault as fault:
        if isinstance(fault, _OwnFault):
            raise StricterThanLlamaCpp(f"{path}: a GGUF file that is not read here: {fault}.") from None
        raise InputError(f"{path}: not a sound GGUF file: {fault}. Get or write the file again.") from None
    return GGUFReader(path)


def read_bounded(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises `InputError` when it is anything else."""
    try:
        status = Path(path).stat()
        # A pipe or device could block or never end.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file; give the path of a file.")
        if status.st_size > max_bytes:
            raise StricterThanLlamaCpp(
                f"{path}: {status.st_size} bytes; such a file has at most {max_bytes}. "
                "Is this a model? Give the vector's or adapter's file."
            )
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read ({error}). Check the path and its permissions.") from error


class _Fault(Exception):
    """Where and how the bytes break the format."""


class _OwnFault(_Fault):
    """Where and how they break a rule that is not llama.cpp's."""


class _Walk:
    """One pass over the header, without keeping anything but what the rules need."""

    def __init__(self, data: bytes, max_numbers: int) -> None:
        self.data = data
        self.max_numbers = max_numbers
        self.at = 0
        self.entries = 0
        self.numbers = 0
        self.alignment = DEFAULT_ALIGNMENT

    def file(self) -> None:
        if self.take(4, "the magic") != b"GGUF":
            raise _Fault("it does not begin with 'GGUF'")
        version = self.number("I", "the version")
        if version not in (2, 3):
            raise _Fault(f"format version {version}; 2 and 3 in little-endian order are readable")
        n_tensors = self.number("Q", "the tensor count")
        n_values = self.number("Q", "the metadata count")
        self.spend(n_tensors + n_values, "tensors and metadata values")
        keys: set[str] = set()
        for _ in range(n_values):
            self.metadata(keys)
        sizes = self.tensors(n_tensors)
        if n_tensors:
            self.layout(sizes)
        if self.numbers > self.max_numbers:
            raise _OwnFault(
                f"its tensors hold {self.numbers} numbers; at most {self.max_numbers} are accepted"
            )

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise _Fault(f"it ends inside {what} (byte {len(self.data)}; {size} bytes needed at {self.at})")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, limit: int = MAX_BYTES) -> str:
        size = self.number("Q", f"the length of {what}")
        if size > limit:
            kind = _OwnFault if limit == MAX_KEY_BYTES else _Fault
            raise kind(f"{what} is {size} bytes long; at most {limit} are accepted")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _OwnFault(f"{what} is not UTF-8 text ({error})") from None

    def spend(self, count: int, what: str) -> None:
        self.entries += count
        if self.entries > MAX_ENTRIES:
            raise _OwnFault(
                f"{count} {what}; a vector or adapter has at most {MAX_ENTRIES} entries in "
                "all (is this a model?)"
            )

    def metadata(self, keys: set[str]) -> None:
        key = self.text("a metadata key", MAX_KEY_BYTES)
        # The reader files its own three fields under GGUF.* and stops at a second entry of one name.
        if not key or key in keys or key.startswith("GGUF."):
            kind = _OwnFault if key.startswith("GGUF.") else _Fault
            raise kind(f"metadata key {_label(key)} is empty, reserved or used twice")
        keys.add(key)
        label = _label(key)
        kind = self.kind(label)
        if key == "general.alignment":
            if kind is not GGUFValueType.UINT32:
                raise _Fault(f"general.alignment is of type {kind.name}; UINT32 is needed")
            self.alignment = self.number("I", key)
            if self.alignment == 0 or self.alignment & (self.alignment - 1):
                raise _Fault(f"general.alignment is {self.alignment}; a power of two is needed")
            return
        count = 1
        if kind is GGUFValueType.ARRAY:
            kind = self.kind(label)
            count = self.number("Q", f"the list length of {label}")
            self.spend(count, f"list elements in {label}")
        if kind is GGUFValueType.STRING:
            for _ in range(count):
                self.text(label)
        elif kind in CODES:
            self.take(count * struct.calcsize("<" + CODES[kind]), label)
        else:
            raise _Fault(f"{label} is a list of lists, which the format does not have")

    def kind(self, label: str) -> GGUFValueType:
        number = self.number("I", f"the type of {label}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Fault(f"{label} has the unknown value type {number}") from None

    def tensors(self, count: int) -> list[tuple[str, int, int]]:
        """(label, offset in the data section, bytes) of each tensor."""
        sizes: list[tuple[str, int, int]] = []
        names: set[str] = set()
        for _ in range(count):
            name = self.text("a tensor name", MAX_NAME_BYTES)
            # llama.cpp keeps names as C strings: a NUL would cut it short there and not here.
            if name in names or "\0" in name:
                raise (_OwnFault if "\0" in name else _Fault)(
                    f"tensor name {_label(name)} is used twice or holds a NUL"
                )
            names.add(name)
            label = _label(name)
            n_dims = self.number("I", f"the dimension count of {label}")
            if not 1 <= n_dims <= MAX_DIMS:
                raise (_Fault if n_dims else _OwnFault)(
                    f"{label} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible"
                )
            dims = [self.number("Q", f"a dimension of {label}") for _ in range(n_dims)]
            sizes.append((label, *self.extent(label, dims)))
        return sizes

    def extent(self, label: str, dims: list[int]) -> tuple[int, int]:
        number = self.number("I", f"the type of {label}")
        offset = self.number("Q", f"the offset of {label}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise _Fault(f"{label} has the unknown tensor type {number}") from None
        elements = 1
        for dim in dims:  # Python's integers do not wrap, so an overflow shows as a size beyond the file
            elements *= dim
        if elements == 0 or dims[0] % block:
            raise (_Fault if elements else _OwnFault)(
                f"{label} has shape {dims}; no dimension may be 0 and the first must divide by {block}"
            )
        self.numbers += elements
        return offset, elements // block * block_bytes

    def layout(self, sizes: list[tuple[str, int, int]]) -> None:
        """Tensors must follow one another without gap or overlap, padded, and end inside the file."""
        start = self.padded(self.at)
        expected = 0
        for label, offset, size in sizes:
            if offset != expected:
                raise _Fault(
                    f"{label} has offset {offset} where {expected} follows from the tensors before it"
                )
            expected += self.padded(size)
            if start + expected > len(self.data):
                raise _Fault(
                    f"{label} ends at byte {start + expected} with its padding, the file at {len(self.data)}"
                )

    def padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


def _label(name: str) -> str:
    """A stranger's name as it may be printed: no control characters, no kilobytes."""
    return repr(name if len(name) <= 80 else name[:80] + "…")
