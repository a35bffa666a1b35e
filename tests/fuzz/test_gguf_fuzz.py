"""Twenty thousand broken vector files: each is refused with a reason or read correctly, in bounded memory.

The mutator starts from valid files, so that most of each file still makes sense, and knows what hurts a
reader: sizes at the edges of integers, cut ends, moved and repeated pieces, and pieces of other files. It
draws from one seed.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save

from rs_gguf.control_vector import check, read, write
from rs_gguf.convert import convert
from rs_gguf.errors import InputError
from rs_gguf.gguf_guard import open_gguf
from rs_gguf.steering import SteeringVector

SEED = 20260714
GGUF_FILES = 20_000
SAFETENSORS_FILES = 5_000
MEMORY = 200 * 2**20

POWERS = (0, 1, 5, 7, 8, 15, 16, 31, 32, 63, 64)
EDGES = sorted({2**bits + step for bits in POWERS for step in (-1, 0, 1)})


@contextlib.contextmanager
def bounded_memory(extra: int) -> Iterator[None]:
    """Let the address space of the process grow by `extra` bytes at most; beyond, allocation fails."""
    resource = pytest.importorskip("resource", reason="the limit needs a POSIX system")
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("the limit needs /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 2, 4, 8, 16, 32, 64))
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            flip = 1 << rng.randrange(8)
            data[at : at + 1] = bytes(byte ^ flip for byte in data[at : at + 1])
        elif kind == 2:
            width, code = rng.choice(((4, "<I"), (8, "<Q")))
            data[at : at + width] = struct.pack(code, rng.choice(EDGES) % 2 ** (8 * width))
        elif kind == 3:
            del data[at : len(data) if rng.random() < 0.3 else at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size] if rng.random() < 0.5 else rng.randbytes(size)
        elif kind == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        elif kind == 6 and len(data) >= 24:
            # The two counts of the header, or the length of the first key: the numbers a reader loops on.
            field = rng.choice((8, 16, 24))
            data[field : field + 8] = struct.pack("<Q", rng.choice(EDGES) % 2**64)
        else:
            data[at : at + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f"))
    return bytes(data)


@pytest.fixture(scope="module")
def gguf_seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("seeds")
    rng = np.random.default_rng(SEED)
    facts = {"method": "wrmd", "layers": [1, 2], "names": ["a", "b"], "strength": 0.5, "on": True}
    directions = {layer: rng.standard_normal(8) for layer in (1, 2)}
    write(SteeringVector(directions, facts, "qwen2"), folder / "ours.gguf")
    write(SteeringVector({1: rng.standard_normal(3)}), folder / "small.gguf")
    writer = gguf.GGUFWriter(folder / "theirs.gguf", "controlvector")
    writer.add_custom_alignment(8)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 3)
    for name, kind in (("direction.0", np.float32), ("direction.1", np.float64), ("x", np.float16)):
        writer.add_tensor(name, rng.standard_normal(4).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def llama_cpp_opens() -> Any:
    """llama.cpp's own container reader, `gguf_init_from_file`: whether it can open a path."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = llama_cpp.llama_cpp._lib

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))

    init, free, free_tensors = (
        getattr(library, name) for name in ("gguf_init_from_file", "gguf_free", "ggml_free")
    )
    init.argtypes, init.restype = (ctypes.c_char_p, Params), ctypes.c_void_p
    free.argtypes, free.restype = (ctypes.c_void_p,), None
    free_tensors.argtypes, free_tensors.restype = (ctypes.c_void_p,), None

    def opens(path: Path) -> bool:
        tensors = ctypes.c_void_p()
        # Data included, since the control vector loader reads it too.
        context = init(str(path).encode(), Params(False, ctypes.pointer(tensors)))
        if context:
            free(context)
            free_tensors(tensors)
        return bool(context)

    return opens


def judge(path: Path) -> str:
    """Put one file through every entrance. Anything but `InputError` is a failure."""
    report = check(path)
    if report.valid:
        vector = read(path)
        assert report.vector == vector
        # Read correctly: every direction's bytes stand in the file as they are.
        raw = path.read_bytes()
        assert all(row.tobytes() in raw for row in vector.directions.values())
    else:
        assert all(reason.strip() for reason in report.errors)
        with pytest.raises(InputError) as caught:
            read(path)
        assert all(reason in str(caught.value) for reason in report.errors)
        assert len(str(caught.value)) < 20_000
    with contextlib.suppress(InputError):
        convert(path, "cvector-generator")
    return "read" if report.valid else "refused"


def test_mutated_vectors_are_refused_or_read(tmp_path: Path, gguf_seeds: list[bytes]) -> None:
    rng = random.Random(SEED)
    path = tmp_path / "f.gguf"
    verdicts = {"read": 0, "refused": 0}
    with bounded_memory(MEMORY):
        for number in range(GGUF_FILES):
            path.write_bytes(mutate(rng, gguf_seeds))
            try:
                verdicts[judge(path)] += 1
            except Exception as error:
                kept = tmp_path / f"failed-{number}.gguf"
                path.rename(kept)
                raise AssertionError(f"mutation {number} (kept as {kept}): {error!r}") from error
    # A mutator that only makes rubbish, or only noise in the numbers, would test nothing.
    assert min(verdicts.values()) > GGUF_FILES // 20, verdicts


def test_every_prefix_of_a_valid_file_is_refused(tmp_path: Path, gguf_seeds: list[bytes]) -> None:
    whole = gguf_seeds[0]
    for size in range(len(whole)):
        (tmp_path / "f.gguf").write_bytes(whole[:size])
        assert not check(tmp_path / "f.gguf").valid, f"the first {size} of {len(whole)} bytes"


def test_what_the_guard_lets_in_llama_cpp_can_open(
    tmp_path: Path, gguf_seeds: list[bytes], llama_cpp_opens: Any
) -> None:
    rng = random.Random(SEED + 1)
    path = tmp_path / "f.gguf"
    sound = 0
    for number in range(GGUF_FILES // 5):
        path.write_bytes(mutate(rng, gguf_seeds))
        with contextlib.suppress(InputError):
            open_gguf(path)
            sound += 1
            assert llama_cpp_opens(path), f"mutation {number}: the guard is too lenient"
    assert sound > GGUF_FILES // 50


def test_mutated_safetensors_are_refused_or_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    seeds = [
        save({f"layer_{layer}": torch.randn(4, generator=generator, dtype=kind) for layer in (1, 2)})
        for kind in (torch.float32, torch.bfloat16, torch.float64)
    ]
    seeds.append(save({"directions": torch.randn(3, 4, generator=generator)}, {"format": "pt"}))
    rng = random.Random(SEED)
    path = tmp_path / "f.safetensors"
    verdicts = {"read": 0, "refused": 0}
    with bounded_memory(MEMORY):
        for number in range(SAFETENSORS_FILES):
            path.write_bytes(mutate(rng, seeds))
            try:
                vector = convert(path, "huggingface").vector
                assert all(np.isfinite(row).all() for row in vector.directions.values())
                verdicts["read"] += 1
            except InputError:
                verdicts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"mutation {number}: {error!r}") from error
    assert min(verdicts.values()) > SAFETENSORS_FILES // 20, verdicts
