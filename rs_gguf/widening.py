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
import struct
from functools import cache
from pathlib import Path
from typing import BinaryIO

import llama_cpp
import numpy as np
import platformdirs
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rs_gguf import gguf_header
from rs_gguf.errors import InputError
from rs_gguf.files import write_atomic
from rs_gguf.gguf_header import Header, TensorInfo
from rs_gguf.models import fingerprint

_log = logging.getLogger("rs_gguf.widening")

_Q5_0, _Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
_MOST_BYTES = 2**30  # that a copy may add to a model: memory is dearer than time beyond


def file_to_load(path: Path) -> Path:
    """The copy of a model that this machine multiplies faster, made now if there is none; else the model.

    Copies lie in the user's cache folder, named by the SHA-256 of the file they were made of. Where there is
    no room for one the model itself is as good, only slower.
    """
    if not _copy_helps():
        return path
    try:
        header = gguf_header.read(path)
        wide = _to_widen(header)
        if not wide:
            return path
        copy = platformdirs.user_cache_path("rs-gguf") / "widened" / f"{fingerprint(path)}.gguf"
        if not copy.is_file():
            write_atomic(copy, lambda file: _write(file, path, header, {tensor.name for tensor in wide}))
    except (InputError, MemoryError) as error:  # llama.cpp tells better what is wrong with a model
        _log.info("no copy of %s in Q8_0: %s", path, error)
        return path
    return copy


def size_to_load(path: Path, header: Header) -> int:
    """Bytes of the file that `file_to_load` would give, but for padding. None is made."""
    wide = _to_widen(header) if _copy_helps() else []
    return path.stat().st_size + sum(map(_bytes_added, wide))


@cache
def _copy_helps() -> bool:
    on_cpu = not llama_cpp.llama_supports_gpu_offload()
    return on_cpu and b"AVX512_VNNI = 1" in llama_cpp.llama_print_system_info()  # where AMX is, VNNI is


def _to_widen(header: Header) -> list[TensorInfo]:
    """Matrices of Q5_0 that are multiplied, unless the copy would be too large.

    Experts' are not multiplied with tiles, whatever their type, and most of them rest at each token.
    """
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    wide = [
        tensor
        for tensor in header.tensors
        if tensor.type == _Q5_0 and len(tensor.shape) == 2 and (tied or tensor.name != "token_embd.weight")
    ]
    return wide if sum(map(_bytes_added, wide)) <= _MOST_BYTES else []


def _bytes_added(tensor: TensorInfo) -> int:
    return _size(tensor, _Q8_0) - _size(tensor, _Q5_0)


def _size(tensor: TensorInfo, kind: int) -> int:
    if kind not in GGML_QUANT_SIZES:
        raise InputError(f"{tensor.name} is of type {kind}, which the gguf package does not know.")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(math.prod(tensor.shape) // block * block_bytes)


def _write(file: BinaryIO, path: Path, header: Header, wide: set[str]) -> None:
    """Write the model with the tensors `wide` as Q8_0: metadata as they are, tensors in their order."""

    def padded(size: int) -> int:
        return -(-size // header.alignment) * header.alignment

    def pad(size: int) -> None:
        file.write(bytes(padded(size) - size))

    kinds = {tensor.name: _Q8_0 if tensor.name in wide else tensor.type for tensor in header.tensors}
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        file.write(data[: header.tensors_at])
        offset = 0
        for tensor in header.tensors:
            name, shape = tensor.name.encode(), tensor.shape
            file.write(struct.pack("<Q", len(name)) + name)
            file.write(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kinds[tensor.name], offset))
            offset += padded(_size(tensor, kinds[tensor.name]))
        pad(file.tell())
        for tensor in header.tensors:
            start, size = padded(header.end) + tensor.offset, _size(tensor, tensor.type)
            if start + size > len(data):
                raise InputError(f"{path} ends before its tensor {tensor.name} does.")
            blocks = data[start : start + size]
            file.write(widened(blocks) if tensor.name in wide else blocks)
            pad(_size(tensor, kinds[tensor.name]))


def widened(blocks: bytes) -> bytes:
    """Q5_0 blocks, of 22 bytes each, as Q8_0 blocks of 34 with the same values."""
    factor, high, low = np.split(np.frombuffer(blocks, np.uint8).reshape(-1, 22), [2, 6], axis=1)
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    integers = np.concatenate([low & 0xF, low >> 4], axis=1) | fifth << 4
    return np.concatenate([factor, integers - np.uint8(16)], axis=1).tobytes()
