"""Open GGUF files from untrusted sources: check the header before the `gguf` package reads it.

In: a path. Out: a `gguf.GGUFReader` over a file whose counts, lengths and offsets all lie inside the file.
The `gguf` package does not check them. A wrong number then causes endless loops, gigabytes of Python objects
or silently shortened arrays. The rules follow llama.cpp's reader (ggml/src/gguf.cpp,
`gguf_init_from_reader`), so llama.cpp can open every file that passes. Extra limits suit vectors and
adapters: reading a vector needs far less than 200 MiB of memory.
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
"""Twice the size of a vector in float64 for the largest open model so far (126 layers of width 16384)."""
MAX_NUMBERS = MAX_BYTES // 4
"""The most numbers in all tensors. In float32 they fill a file of `MAX_BYTES`, and as much memory."""
MAX_ADAPTER_BYTES = 2**30 + 2**20
"""Enough for F32 at rank 32 on every matrix of Qwen2.5-32B; other tools write adapters of that size."""
MAX_ENTRIES = 16_384
"""The most metadata values, list elements and tensors together. Each costs the reader about 1 KiB."""
MAX_KEY_BYTES = 65_535
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME without the closing NUL


class StricterThanLlamaCpp(InputError):
    """A file is refused although llama.cpp may open it."""


def open_gguf(path: str | Path, max_bytes: int = MAX_BYTES) -> GGUFReader:
    """Open a GGUF file of at most `max_bytes` for reading.

    Raises:
        InputError: the file is not sound; the message names the first fault.
        StricterThanLlamaCpp: this fault alone would not stop llama.cpp from opening the file.
    """
    data = read_bounded(path, max_bytes)
    try:
        _Walk(data, max_bytes // 4).file()
    except _Fault as fault:
        if isinstance(fault, _OwnFault):
            raise StricterThanLlamaCpp(
                f"{path}: a GGUF file outside the limits for steering files: {fault}."
            ) from None
        raise InputError(
            f"{path}: not a sound GGUF file: {fault}. Download or write the file again."
        ) from None
    return GGUFReader(path)


def read_bounded(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file of at most `max_bytes`. Raise `InputError` for anything else."""
    try:
        status = Path(path).stat()
        # Reading a pipe or device could block or never end.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file; give the path of a file.")
        if status.st_size > max_bytes:
            raise StricterThanLlamaCpp(
                f"{path}: the file has {status.st_size} bytes; a steering file has at most {max_bytes}. "
                "Is this a model? Give the file of the vector or adapter."
            )
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read ({error}). Check the path and its permissions.") from error


class _Fault(Exception):
    """The bytes break the format; the message says where and how."""


class _OwnFault(_Fault):
    """The bytes break a rule that llama.cpp does not have."""


class _Walk:
    """One pass over the header of a GGUF file; it keeps only what the rules need."""

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
            raise _Fault(f"it has format version {version}; 2 and 3 in little-endian order are accepted")
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
                f"it has {count} {what}; a vector or adapter has at most {MAX_ENTRIES} entries in total "
                "(is this a model?)"
            )

    def metadata(self, keys: set[str]) -> None:
        key = self.text("a metadata key", MAX_KEY_BYTES)
        # The reader stores three fields of its own under GGUF.* and stops at a repeated name.
        if not key or key in keys or key.startswith("GGUF."):
            kind = _OwnFault if key.startswith("GGUF.") else _Fault
            raise kind(f"metadata key {_label(key)} is empty, reserved or used twice")
        keys.add(key)
        label = _label(key)
        kind = self.kind(label)
        if key == "general.alignment":
            if kind is not GGUFValueType.UINT32:
                raise _Fault(f"general.alignment has type {kind.name}; UINT32 is needed")
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
            raise _Fault(f"{label} is a list of lists; the format has only flat lists")

    def kind(self, label: str) -> GGUFValueType:
        number = self.number("I", f"the type of {label}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Fault(f"{label} has the unknown value type {number}") from None

    def tensors(self, count: int) -> list[tuple[str, int, int]]:
        """Return (label, offset in the data section, bytes) of each tensor."""
        sizes: list[tuple[str, int, int]] = []
        names: set[str] = set()
        for _ in range(count):
            name = self.text("a tensor name", MAX_NAME_BYTES)
            # llama.cpp keeps names as C strings, which a NUL would shorten.
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
        """Return the offset and the size in bytes of a tensor of shape `dims`."""
        number = self.number("I", f"the type of {label}")
        offset = self.number("Q", f"the offset of {label}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise _Fault(f"{label} has the unknown tensor type {number}") from None
        elements = 1
        for dim in dims:  # Python integers do not overflow, so a huge product ends beyond the file
            elements *= dim
        if elements == 0 or dims[0] % block:
            raise (_Fault if elements else _OwnFault)(
                f"{label} has shape {dims}; no dimension may be 0 and the first must divide by {block}"
            )
        self.numbers += elements
        return offset, elements // block * block_bytes

    def layout(self, sizes: list[tuple[str, int, int]]) -> None:
        """Check that the padded tensors follow each other without gap or overlap and end inside the file."""
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
                    f"{label} ends at byte {start + expected} with padding, but the file at {len(self.data)}"
                )

    def padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


def _label(name: str) -> str:
    """Return an untrusted name for messages: control characters escaped, at most 80 characters."""
    return repr(name if len(name) <= 80 else name[:80] + "…")
