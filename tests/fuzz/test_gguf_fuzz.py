"""20,000 broken files per format: each is refused with a reason or read correctly, in bounded memory."""

from __future__ import annotations

import contextlib
import ctypes
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fixtures.binaries import completion
from fixtures.tiny_gguf import write_tiny_qwen2
from fuzz.mutator import MEMORY, limits, mutate, replace
from safetensors.torch import save

from rs_gguf.errors import InputError
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.container import finish
from rs_gguf.steering.formats.vectors import convert
from rs_gguf.steering.guard import StricterThanLlamaCpp, open_gguf
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import check, read, write

pytestmark = pytest.mark.slow

SEED = 20260714
FILES = 20_000
LOADED = 300  # files that llama.cpp's program loads, one process each

PIECES = (b"\0" * 4, b"\xff" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f")


@pytest.fixture(scope="module")
def gguf_seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("seeds")
    rng = np.random.default_rng(SEED)
    facts: dict[str, Any] = {
        "method": "wrmd",
        "layers": [1, 2],
        "names": ["a", "b"],
        "strength": 0.5,
        "on": True,
    }
    directions = {layer: rng.standard_normal(8).astype(np.float32) for layer in (1, 2)}
    write(SteeringVector(directions, facts, "qwen2"), folder / "ours.gguf")
    write(SteeringVector({1: rng.standard_normal(3).astype(np.float32)}), folder / "small.gguf")
    writer = gguf.GGUFWriter(folder / "theirs.gguf", "controlvector")
    writer.add_custom_alignment(8)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 3)
    for name, kind in (("direction.0", np.float32), ("direction.1", np.float64), ("x", np.float16)):
        writer.add_tensor(name, rng.standard_normal(4).astype(kind))
    finish(writer)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def llama_cpp_opens() -> Any:
    """A function that returns whether llama.cpp's reader, `gguf_init_from_file`, can open a path."""
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
        # Read the tensor data too, as the control vector loader does.
        context = init(str(path).encode(), Params(False, ctypes.pointer(tensors)))
        if context:
            free(context)
            free_tensors(tensors)
        return bool(context)

    return opens


def outcome(path: Path) -> str:
    """Read one file in every way; return "read" or "refused". Any error but `InputError` is a failure."""
    report = check(path)
    if report.valid:
        vector = read(path)
        assert report.content == vector
        # A correct reading finds the bytes of every direction in the file.
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
    outcomes = {"read": 0, "refused": 0}
    with limits() as start:
        for number in range(FILES):
            replace(path, mutate(rng, gguf_seeds, PIECES))
            start()
            try:
                outcomes[outcome(path)] += 1
            except Exception as error:
                kept = tmp_path / f"failed-{number}.gguf"
                path.rename(kept)
                raise AssertionError(f"mutation {number} (kept as {kept}): {error!r}") from error
    # The mutator must produce both unreadable files and readable ones.
    assert min(outcomes.values()) > FILES // 20, outcomes


def test_every_prefix_of_a_valid_file_is_refused(tmp_path: Path, gguf_seeds: list[bytes]) -> None:
    whole = gguf_seeds[0]
    for size in range(len(whole)):
        (tmp_path / "f.gguf").write_bytes(whole[:size])
        assert not check(tmp_path / "f.gguf").valid, f"the first {size} of {len(whole)} bytes"


def test_llama_cpp_opens_every_file_that_the_guard_accepts(
    tmp_path: Path, gguf_seeds: list[bytes], llama_cpp_opens: Any
) -> None:
    rng = random.Random(SEED + 1)
    path = tmp_path / "f.gguf"
    sound = 0
    for number in range(FILES // 5):
        replace(path, mutate(rng, gguf_seeds, PIECES))
        with contextlib.suppress(InputError):
            open_gguf(path)
            sound += 1
            assert llama_cpp_opens(path), f"mutation {number}: the guard is too lenient"
    assert sound > FILES // 50


def test_mutated_safetensors_are_refused_or_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    seeds = [
        save({f"layer_{layer}": torch.randn(4, generator=generator, dtype=kind) for layer in (1, 2)})
        for kind in (torch.float32, torch.bfloat16, torch.float64)
    ]
    seeds.append(save({"directions": torch.randn(3, 4, generator=generator)}, {"format": "pt"}))
    rng = random.Random(SEED)
    path = tmp_path / "f.safetensors"
    outcomes = {"read": 0, "refused": 0}
    with limits() as start:
        for number in range(FILES):
            replace(path, mutate(rng, seeds, PIECES))
            start()
            try:
                vector = convert(path, "huggingface").vector
                assert all(np.isfinite(row).all() for row in vector.directions.values())
                outcomes["read"] += 1
            except InputError:
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"mutation {number}: {error!r}") from error
    assert min(outcomes.values()) > FILES // 20, outcomes


def test_mutated_adapters_are_refused_or_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    path = tmp_path / "f.gguf"
    seeds = []
    for rank, names in ((1, ["blk.1.ffn_down"]), (2, ["blk.0.attn_output", "blk.1.ffn_down"])):
        factors = {
            f"{n}.weight": (
                rng.standard_normal((rank, 4)).astype(np.float32),
                rng.standard_normal((3, rank)).astype(np.float32),
            )
            for n in names
        }
        lora.write(LoraAdapter(factors, "qwen2", {"method": "gate", "margin": 0.5}), path)
        seeds.append(path.read_bytes())
    draw = random.Random(SEED)
    outcomes = {"read": 0, "refused": 0}
    with limits() as start:
        for number in range(FILES):
            replace(path, mutate(draw, seeds, PIECES))
            start()
            try:
                report = lora.check(path)
                outcomes["read" if report.valid else "refused"] += 1
                if report.valid:
                    adapter = lora.read(path)
                    assert all(np.isfinite(half).all() for pair in adapter.factors.values() for half in pair)
                    assert all(np.isfinite(norm) for norm in adapter.norms.values())
                else:
                    assert all(reason.strip() and len(reason) < 2_000 for reason in report.errors)
            except Exception as error:
                raise AssertionError(f"mutation {number}: {error!r}") from error
    assert min(outcomes.values()) > FILES // 20, outcomes


@pytest.mark.real  # uses no real model, but building the program takes minutes
def test_llama_cpp_logs_the_line_that_check_predicts(tmp_path: Path, gguf_seeds: list[bytes]) -> None:
    model, path = tmp_path / "tiny.gguf", tmp_path / "f.gguf"
    write_tiny_qwen2(model)
    options = ["--model", str(model), "--control-vector", str(path), "--prompt", "a", "--predict", "1"]
    options += ["--no-conversation", "--no-warmup", "--ctx-size", "64", "--threads", "1"]
    rng = random.Random(SEED + 2)
    lines_seen = set()
    for number in range(LOADED):
        replace(path, mutate(rng, gguf_seeds, PIECES))
        report = check(path)
        if any("that no model has" in reason for reason in report.errors):
            continue  # the loader would allocate memory for all layers before it
        with contextlib.suppress(InputError):
            try:
                open_gguf(path)
            except StricterThanLlamaCpp:
                continue
        lines = [line for line in completion(*options)[1] if str(path) in line]
        if report.loader_says:
            assert lines, f"mutation {number}: not {report.loader_says} for {report.errors}"
            assert report.loader_says in lines[0], f"mutation {number}: {lines}"
            lines_seen.add(report.loader_says)
        else:
            assert not lines, f"mutation {number}: {lines}"
    assert len(lines_seen) == 3  # container, number and type; test_vector_file.py has the other lines


# Runs in a separate process, so that the peak is only that of reading.
PEAK = """
import sys
from pathlib import Path
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.formats.vectors import convert
from rs_gguf.errors import InputError
from rs_gguf.steering.container import finish

def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024

files = [Path(name) for name in sys.argv[1:]]
if files[0].suffix == ".safetensors":
    import safetensors.torch
before = memory("VmRSS")
for file in files:
    for read in (control_vector.check, lora.check, lambda path: convert(path, "huggingface")):
        try:
            read(file)
        except InputError:
            pass
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_largest_files_fit_into_the_memory(tmp_path: Path) -> None:
    """Read files at the limits of bytes, numbers, entries and text length."""

    def gguf_file(name: str, metadata: str | list[str], tensors: dict[str, Any]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "qwen2" if "lora" in name else "controlvector")
        for key, value in {"type": "adapter"}.items() if "lora" in name else ():
            writer.add_string(f"general.{key}", value)
        if "lora" in name:
            writer.add_string("adapter.type", "lora")
        (writer.add_array if isinstance(metadata, list) else writer.add_string)("rs_gguf.note", metadata)
        for tensor, data in tensors.items():
            writer.add_tensor(tensor, data)
        finish(writer)
        return tmp_path / name

    def directions(kind: Any, count: int) -> dict[str, Any]:
        return {f"direction.{n}": np.ones(count // 500, kind) for n in range(1, 501)}

    millions = 2**20
    a, b = np.ones((16, 2**18), np.float16), np.ones((2**18 - 2**12, 16), np.float16)
    row = {"direction.1": np.ones(4, np.float32)}
    vectors = [
        gguf_file("f32.gguf", "", directions(np.float32, 8 * millions - 50_000)),
        gguf_file("f16.gguf", "", directions(np.float16, 8 * millions)),
        gguf_file("f16-too-many.gguf", "", directions(np.float16, 16 * millions - 50_000)),
        gguf_file("entries.gguf", ["a"] * 16_000, row),
        gguf_file("text.gguf", "ä" * (15 * millions), row),
        gguf_file("tensors.gguf", "", {f"x.{n}": np.ones(1, np.float32) for n in range(16_000)}),
        gguf_file("lora.gguf", "", {"blk.1.ffn_down.weight.lora_a": a, "blk.1.ffn_down.weight.lora_b": b}),
    ]
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    matrices: list[Path] = []
    for kind in kinds:
        width = (32 * millions - 4096) // kind.itemsize // 511
        for part in (1, 2):  # at half the bytes, 16-bit matrices stay within the limit of numbers
            matrices.append(tmp_path / f"{len(matrices)}.safetensors")
            matrices[-1].write_bytes(save({"m": torch.ones(511, width // part, dtype=kind)}))
    for files in (vectors, matrices):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, files)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= MEMORY
