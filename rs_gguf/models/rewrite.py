"""Write a GGUF model with some tensors changed. Every other tensor and metadata entry keeps its bytes.

Takes the files of a model and a `Change` for some of its tensors. Writes one file. The weights are mapped and
converted a few rows at a time, so it needs little memory for a model of any size.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models.header import Header, TensorInfo

_PART_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_AT_ONCE = 2**20  # numbers that are converted together
_COPIED = 2**24  # bytes that are copied together


@dataclass(frozen=True)
class Part:
    """One file of a model: the whole model, or one part of a split one."""

    path: Path
    header: Header


@dataclass(frozen=True)
class Change:
    """A change of one tensor: its new type (ggml's number), and the function that converts its rows.

    `convert` takes rows as they are stored and the number of the first one. It returns the new rows.
    """

    type: int
    convert: Callable[[bytes, int], bytes]


def parts_of(path: Path) -> list[Part]:
    """Return the files of the model to which `path` belongs, in their order.

    Raises:
        InputError: a file cannot be read, or a part of a split model is missing or has another number.
    """
    header = gguf_header.read(path)
    count = header.values.get("split.count", 0)
    if count in (0, 1):  # 0 marks a model that was joined from parts.
        return [Part(path, header)]
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise InputError(
            f"{path} is one of {count} files that hold a model; its name should end in "
            f"-00001-of-{count:05}.gguf. Rename the files as they were published."
        )
    parts = []
    for number in range(count):
        file = path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise InputError(
                f"{file} is missing: the model has {count} parts. Put all of them into a folder."
            )
        part = Part(file, gguf_header.read(file))
        if (part.header.values.get("split.no"), part.header.values.get("split.count")) != (number, count):
            raise InputError(f"{file} is not part {number + 1} of {count}. Get the model's files again.")
        parts.append(part)
    names = [tensor.name for part in parts for tensor in part.header.tensors]
    twice = next((one for one, other in itertools.pairwise(sorted(names)) if one == other), None)
    if twice is not None:
        raise InputError(f"{path}: two parts hold the tensor {twice}. Get the model's files again.")
    return parts


def size_of(tensor: TensorInfo, type_: int) -> int:
    """Return the bytes of a tensor's data in a type, given by ggml's number."""
    if type_ not in GGML_QUANT_SIZES:
        raise InputError(f"{tensor.name} has the type {type_}, which the gguf package does not know.")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    return int(math.prod(tensor.shape) // block * block_bytes)


def write(
    file: BinaryIO, parts: Sequence[Part], changes: Mapping[str, Change], entries: Sequence[bytes] = ()
) -> None:
    """Write the model with its `changes`, by tensor name. The order of metadata and tensors stays the same.

    entries: metadata to add, as they are stored. The three keys of a split model are left out.

    Raises:
        InputError: the tensors are not stored one after another. Nothing is written then.
    """
    for part in parts:
        _check_layout(part)
    first = parts[0].header
    tensors = [tensor for part in parts for tensor in part.header.tensors]
    types = [changes[t.name].type if t.name in changes else t.type for t in tensors]
    with contextlib.ExitStack() as stack:
        data = [stack.enter_context(_mapped(part.path)) for part in parts]
        dropped = _SPLIT_KEYS if len(parts) > 1 else ()
        kept = [data[0][start:end] for key, (start, end) in first.spans.items() if key not in dropped]
        file.write(data[0][:8] + struct.pack("<QQ", len(tensors), len(kept) + len(entries)))
        file.write(b"".join([*kept, *entries]))
        offset = 0
        for tensor, type_ in zip(tensors, types, strict=True):
            name, shape = tensor.name.encode(), tensor.shape
            file.write(struct.pack("<Q", len(name)) + name)
            file.write(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset))
            offset += _padded(size_of(tensor, type_), first.alignment)
        _pad(file, file.tell(), first.alignment)
        for part, mapped in zip(parts, data, strict=True):
            for tensor in part.header.tensors:
                start = _padded(part.header.end, part.header.alignment) + tensor.offset
                size = 0
                for rows in _rows(tensor, start, mapped, changes.get(tensor.name)):
                    file.write(rows)
                    size += len(rows)
                _pad(file, size, first.alignment)


def _rows(tensor: TensorInfo, start: int, data: mmap.mmap, change: Change | None) -> Iterator[bytes]:
    """Yield the tensor's bytes, changed or not, a few rows at a time."""
    size = size_of(tensor, tensor.type)
    if change is None:
        for at in range(start, start + size, _COPIED):
            yield data[at : min(at + _COPIED, start + size)]
        return
    n_rows = math.prod(tensor.shape[1:])
    row = size // n_rows
    step = max(1, _AT_ONCE // tensor.shape[0])
    for first in range(0, n_rows, step):
        yield change.convert(data[start + first * row : start + min(first + step, n_rows) * row], first)


def _check_layout(part: Part) -> None:
    header, end = part.header, 0
    for tensor in header.tensors:
        size = size_of(tensor, tensor.type)
        beyond = _padded(header.end, header.alignment) + end + size > part.path.stat().st_size
        # llama.cpp requires this order. Without the check, a small file with overlapping tensors could make a
        # very large copy.
        if tensor.offset != end or beyond:
            raise InputError(
                f"{part.path}: the tensor {tensor.name} is not stored where it belongs. Get the file again."
            )
        end += _padded(size, header.alignment)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, size: int, alignment: int) -> None:
    file.write(bytes(_padded(size, alignment) - size))
