"""A copy of a model that llama.cpp multiplies faster on today's x86 processors: the very same weights.

Q4_K_M files hold Q5_0 where a width is no multiple of 256, as in Qwen2.5-0.5B. The processor's dot products
of bytes (AVX-512 VNNI) take Q8_0 as it is, and Q5_0 only after its bits were put together, each time anew;
llama.cpp's way to the matrix tiles of Intel's AMX does not take Q5_0 at all. A Q5_0 block is a half-precision
factor and 32 integers from −16 to 15; a Q8_0 block is the same with integers from −128 to 127. So Q5_0 goes
into Q8_0 with no weight changed. A GGUF file goes in, the path of the one to load comes out.
"""

from __future__ import annotations

import logging
import math
import mmap
import shutil
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models.header import Header, TensorInfo
from rs_gguf.models.resolve import fingerprint
from rs_gguf.records.files import cache_folder, remove_drafts, write_atomic

_log = logging.getLogger("rs_gguf.widening")

_Q5_0, _Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
_MOST_BYTES = 2**30  # that a copy may add to a model: memory is dearer than time beyond
_LEAST_SHARE = 0.25  # of the file in such matrices: the rest is no faster, and copied too
_MOST_ALIGNMENT = 4096  # bytes that tensors are padded to; a damaged header may ask for gigabytes
_ROOM = 2  # times the model: the copy, and as much again for others


def file_to_load(path: Path) -> Path:
    """The copy of a model that this machine multiplies faster, made now if there is none; else the model.

    Copies lie in the user's cache folder, named by the SHA-256 of the file they were made of. Where there is
    no room for one the model itself is as good, only slower.
    """
    if not _copy_helps():
        return path
    try:
        folder = cache_folder() / "q5_0_to_q8_0"
        remove_drafts(folder, "*.gguf")
        header = gguf_header.read(path)
        kinds = _kinds(path, header)
        if not _bytes_added(header, kinds):
            return path
        copy = folder / f"{fingerprint(path)}.gguf"
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < _ROOM * path.stat().st_size:
                raise InputError(f"{folder} has no room for it.")
            write_atomic(copy, lambda file: _write(file, path, header, kinds))
    except (InputError, OSError, MemoryError) as error:  # llama.cpp tells better what is wrong with a model
        _log.info("no copy of %s in Q8_0: %s", path, error)
        return path
    return copy


def size_to_load(path: Path, header: Header) -> int:
    """Bytes of the file that `file_to_load` would give, but for padding. None is made."""
    added = _bytes_added(header, _kinds(path, header)) if _copy_helps() else 0
    return path.stat().st_size + added


@cache
def _copy_helps() -> bool:
    on_cpu = not llama_cpp.llama_supports_gpu_offload()
    return on_cpu and b"AVX512_VNNI = 1" in llama_cpp.llama_print_system_info()  # where AMX is, VNNI is


def _kinds(path: Path, header: Header) -> list[int]:
    """The types of the tensors in the copy: Q8_0 where a matrix of Q5_0 is multiplied.

    Experts' are not multiplied with tiles, whatever their type, and most of them rest at each token. All are
    the model's own where a copy would be too large, or be made for little.
    """
    own = [tensor.type for tensor in header.tensors]
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    kinds = [
        _Q8_0
        if tensor.type == _Q5_0 and len(tensor.shape) == 2 and (tied or tensor.name != "token_embd.weight")
        else tensor.type
        for tensor in header.tensors
    ]
    wide = [tensor for tensor, kind in zip(header.tensors, kinds, strict=True) if kind != tensor.type]
    enough = sum(_size(tensor, _Q5_0) for tensor in wide) >= _LEAST_SHARE * path.stat().st_size
    fits = _bytes_added(header, kinds) <= _MOST_BYTES and header.alignment <= _MOST_ALIGNMENT
    return kinds if enough and fits else own


def _bytes_added(header: Header, kinds: Sequence[int]) -> int:
    pairs = zip(header.tensors, kinds, strict=True)
    return sum(
        _size(tensor, kind) - _size(tensor, tensor.type) for tensor, kind in pairs if kind != tensor.type
    )


def _size(tensor: TensorInfo, kind: int) -> int:
    if kind not in GGML_QUANT_SIZES:
        raise InputError(f"{tensor.name} is of type {kind}, which the gguf package does not know.")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(math.prod(tensor.shape) // block * block_bytes)


def _write(file: BinaryIO, path: Path, header: Header, kinds: Sequence[int]) -> None:
    """Write the model with its tensors in these types: metadata as they are, tensors in their order.

    Raises:
        InputError: the tensors do not lie one behind the other in the file. Nothing was written then.
    """

    def padded(size: int) -> int:
        return -(-size // header.alignment) * header.alignment

    def pad(size: int) -> None:
        file.write(bytes(padded(size) - size))

    end = 0
    for tensor in header.tensors:
        size = _size(tensor, tensor.type)
        # As llama.cpp wants them. Else a small file might have its bytes copied many times over.
        if tensor.offset != end or padded(header.end) + end + size > path.stat().st_size:
            raise InputError(f"{path}: its tensor {tensor.name} is not in its place.")
        end += padded(size)
    typed = list(zip(header.tensors, kinds, strict=True))
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        file.write(data[: header.tensors_at])
        offset = 0
        for tensor, kind in typed:
            name, shape = tensor.name.encode(), tensor.shape
            file.write(struct.pack("<Q", len(name)) + name)
            file.write(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
            offset += padded(_size(tensor, kind))
        pad(file.tell())
        for tensor, kind in typed:
            start = padded(header.end) + tensor.offset
            blocks = data[start : start + _size(tensor, tensor.type)]
            file.write(blocks if kind == tensor.type else q5_0_to_q8_0(blocks))
            pad(_size(tensor, kind))


def q5_0_to_q8_0(blocks: bytes) -> bytes:
    """Q5_0 blocks, of 22 bytes each, as Q8_0 blocks of 34 with the same values."""
    factor, high, low = np.split(np.frombuffer(blocks, np.uint8).reshape(-1, 22), [2, 6], axis=1)
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    integers = np.concatenate([low & 0xF, low >> 4], axis=1) | fifth << 4
    return np.concatenate([factor, integers - np.uint8(16)], axis=1).tobytes()
