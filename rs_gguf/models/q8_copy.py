"""Make a Q8_0 copy of a model that holds Q5_0 matrices: the same weights, faster on current x86 processors.

Q4_K_M files use Q5_0 for matrices whose width is not a multiple of 256, as in Qwen2.5-0.5B. The processor's
byte dot products (AVX-512 VNNI) take Q8_0 directly. Q5_0 must be unpacked first, every time it is multiplied;
llama.cpp's code for Intel's AMX tiles does not support it at all. A Q5_0 block is a half-precision factor and
32 integers from −16 to 15. A Q8_0 block is the same with integers from −128 to 127, so the copy is lossless.
Takes a GGUF file and returns the path of the file to load.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models import rewrite
from rs_gguf.models.header import Header
from rs_gguf.models.resolve import fingerprint
from rs_gguf.models.rewrite import Change, Part, size_of
from rs_gguf.records.files import cache_folder, remove_drafts, write_atomic

_log = logging.getLogger("rs_gguf.q8_copy")

_Q5_0, _Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
_MAX_BYTES_ADDED = 2**30  # by a copy; beyond that, memory matters more than time
_MIN_SHARE = 0.25  # of the file in Q5_0 matrices; the rest of the copy is not faster
_MAX_ALIGNMENT = 4096  # bytes; a damaged header may ask for gigabytes of padding
_FREE_SPACE = 2  # times the size of the model: one for the copy, one for other programs


def file_to_load(path: Path) -> Path:
    """Return the path of the Q8_0 copy if it is faster on this machine; otherwise the path of the model.

    The copy is made at first use and stored in the user's cache folder under the SHA-256 of the model file.
    If it cannot be made, for example on a full disk, the model itself gives the same results, only more
    slowly.
    """
    if not _copy_helps():
        return path
    try:
        folder = cache_folder() / "q5_0_to_q8_0"
        remove_drafts(folder, "*.gguf")
        header = gguf_header.read(path)
        types = _copy_types(path, header)
        if not _bytes_added(header, types):
            return path
        copy = folder / f"{fingerprint(path)}.gguf"
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < _FREE_SPACE * path.stat().st_size:
                raise InputError(f"{folder} has too little free space.")
            pairs = zip(header.tensors, types, strict=True)
            to_q8_0 = Change(_Q8_0, lambda blocks, _: q5_0_to_q8_0(blocks))
            changes = {tensor.name: to_q8_0 for tensor, type_ in pairs if type_ != tensor.type}
            write_atomic(copy, lambda file: rewrite.write(file, [Part(path, header)], changes))
    # llama.cpp gives the better message for a damaged file.
    except (InputError, OSError, MemoryError) as error:
        _log.info("no Q8_0 copy of %s: %s", path, error)
        return path
    return copy


def size_to_load(path: Path, header: Header) -> int:
    """Return the bytes of the file that `file_to_load` would return, without padding. Make no copy."""
    added = _bytes_added(header, _copy_types(path, header)) if _copy_helps() else 0
    return path.stat().st_size + added


@cache
def _copy_helps() -> bool:
    on_cpu = not llama_cpp.llama_supports_gpu_offload()
    # Every processor with AMX has VNNI too.
    return on_cpu and b"AVX512_VNNI = 1" in llama_cpp.llama_print_system_info()


def _copy_types(path: Path, header: Header) -> list[int]:
    """Return the types of the tensors in the copy: Q8_0 for Q5_0 matrices that are multiplied.

    Experts keep their types: llama.cpp does not use tiles for them, and most of them are idle at each token.
    All tensors keep their types if a copy would be too large, or would change too little of the file.
    """
    own = [tensor.type for tensor in header.tensors]
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    types = [
        _Q8_0
        if tensor.type == _Q5_0 and len(tensor.shape) == 2 and (tied or tensor.name != "token_embd.weight")
        else tensor.type
        for tensor in header.tensors
    ]
    q5_0 = [tensor for tensor, type_ in zip(header.tensors, types, strict=True) if type_ != tensor.type]
    enough = sum(size_of(tensor, _Q5_0) for tensor in q5_0) >= _MIN_SHARE * path.stat().st_size
    fits = _bytes_added(header, types) <= _MAX_BYTES_ADDED and header.alignment <= _MAX_ALIGNMENT
    return types if enough and fits else own


def _bytes_added(header: Header, types: Sequence[int]) -> int:
    pairs = zip(header.tensors, types, strict=True)
    return sum(
        size_of(tensor, type_) - size_of(tensor, tensor.type)
        for tensor, type_ in pairs
        if type_ != tensor.type
    )


def q5_0_to_q8_0(blocks: bytes) -> bytes:
    """Return Q5_0 blocks (22 bytes each) as Q8_0 blocks (34 bytes each) with the same values."""
    factor, high, low = np.split(np.frombuffer(blocks, np.uint8).reshape(-1, 22), [2, 6], axis=1)
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    integers = np.concatenate([low & 0xF, low >> 4], axis=1) | fifth << 4
    return np.concatenate([factor, integers - np.uint8(16)], axis=1).tobytes()
