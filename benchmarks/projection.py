"""The projection kernel beside its peers, on the same data, interleaved in one process.

Prints, for every size, type and K: the kernel's median time, its bandwidth as a part of what plain reads of
the same bytes reach (fastest of three readers), its time with an offset and on one thread, and the peers,
fastest first, with the ratio of the fastest to the kernel. A peer's call is counted only when its result is
right. NumKong has no threads of its own and is given as many as the kernel, by samples. A peer that is not
installed is skipped, and said to be.

    python benchmarks/projection.py [--seconds S] [--threads T]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import torch

from rs_gguf import _core
from rs_gguf.projection import project

SIZES = [(512, 32, 4096), (64, 24, 896)]
RANKS = [1, 8, 64]
TYPES = {
    "f32": (np.float32, torch.float32),
    "f16": (np.float16, torch.float16),
    "bf16": (ml_dtypes.bfloat16, torch.bfloat16),
}
ACCEPTED_ERROR = 1e-2  # of Σ|h||v|: the 16-bit results of torch's own 16-bit products are let through

Call = Callable[[], Any]


def numkong() -> Any:
    try:
        return importlib.import_module("numkong")
    except ImportError:
        return None


def split(pool: ThreadPoolExecutor, threads: int, n: int, part: Callable[[slice], Any]) -> None:
    """part(rows) on each of `threads` runs of rows at once."""
    edges = [n * i // threads for i in range(threads + 1)]
    list(pool.map(part, [slice(a, b) for a, b in itertools.pairwise(edges)]))


def readers(h: np.ndarray, threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Calls that do nothing but read every byte of h."""
    words = h.reshape(-1).view(np.int64)
    tensor = torch.from_numpy(words).view(torch.float64)  # bits that mean nothing: only their reading counts
    return {
        "numpy add": lambda: split(pool, threads, words.size, lambda rows: np.add.reduce(words[rows])),
        "numpy or": lambda: split(pool, threads, words.size, lambda rows: np.bitwise_or.reduce(words[rows])),
        "torch sum": lambda: tensor.sum(),
    }


def peers(
    h: torch.Tensor, v: torch.Tensor, threads: int, pool: ThreadPoolExecutor
) -> dict[str, tuple[Call, Callable[[], np.ndarray]]]:
    """Name → (the call to time, its result as [N, L, K])."""
    n, layers, _ = h.shape
    same = v.to(h.dtype).transpose(1, 2).contiguous()  # [L, D, K]
    wide = v.transpose(1, 2).contiguous()
    by_layer = torch.empty(layers, n, v.shape[1], dtype=h.dtype)
    wide_out = torch.empty(layers, n, v.shape[1])

    def matmul() -> torch.Tensor:
        for layer in range(layers):
            torch.matmul(h[:, layer], same[layer], out=by_layer[layer])
        return by_layer

    def widened() -> torch.Tensor:
        for layer in range(layers):
            torch.matmul(h[:, layer].float(), wide[layer], out=wide_out[layer])
        return wide_out

    def result(call: Callable[[], torch.Tensor]) -> tuple[Call, Callable[[], np.ndarray]]:
        return call, lambda: call().float().permute(1, 0, 2).numpy()

    found: dict[str, tuple[Call, Callable[[], np.ndarray]]] = {
        "torch.matmul": result(matmul),
        "torch.bmm": result(lambda: torch.bmm(h.permute(1, 0, 2), same)),
        "torch.einsum": result(lambda: torch.einsum("nld,ldk->lnk", h, same)),
    }
    if h.dtype == torch.float32:
        array, columns, out = h.numpy(), wide.numpy(), np.empty((layers, n, v.shape[1]), np.float32)

        def numpy_matmul() -> np.ndarray:
            for layer in range(layers):
                np.matmul(array[:, layer], columns[layer], out=out[layer])
            return out

        found["numpy.matmul"] = numpy_matmul, lambda: numpy_matmul().transpose(1, 0, 2)
    else:
        found["torch float, matmul"] = result(widened)
    nk = numkong()
    if nk is not None:
        name = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[h.dtype]
        bits = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.int16}[name]
        rows_in, rows_v = h.view(bits).numpy(), v.to(h.dtype).contiguous().view(bits).numpy()
        if name == "bfloat16":
            rows_in, rows_v = rows_in.view(np.uint16), rows_v.view(np.uint16)

        def cdist() -> list[list[Any]]:
            def part(rows: slice) -> list[Any]:
                return [
                    nk.cdist(rows_in[rows, layer], rows_v[layer], "dot", dtype=name, out_dtype="float32")
                    for layer in range(layers)
                ]

            edges = [n * i // threads for i in range(threads + 1)]
            return list(pool.map(part, [slice(a, b) for a, b in itertools.pairwise(edges)]))

        found["numkong.cdist"] = (
            cdist,
            lambda: np.concatenate([np.stack([np.asarray(x) for x in part], axis=1) for part in cdist()]),
        )
    return found


def interleave(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median time of each call, in turns, for `seconds` and three rounds; a hopeless call has one turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 3:
        fastest = min((min(t) for t in times.values() if t), default=0.0)
        for name, call in calls.items():
            if times[name] and times[name][0] > 8 * fastest:
                continue
            time.sleep(0.003)  # OpenMP threads of the call before spin for a while, on the cores wanted here
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pool = ThreadPoolExecutor(options.threads)
    print(f"kernel {_core.kernel()}, {options.threads} threads, torch {torch.__version__}, ", end="")
    print(f"numkong {numkong().__version__}" if numkong() else "numkong not installed: skipped")
    print(f"{'N × L × D':>16} type   K |     ms  GB/s  of read | +offset 1 thread | best peer")
    for n, layers, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(n, layers, d, generator=generator)
        offset = np.random.default_rng(0).standard_normal((layers, d)).astype(np.float32)
        for type_name, (array_type, tensor_type) in TYPES.items():
            h = base.to(tensor_type)
            bits = torch.float32 if tensor_type == torch.float32 else torch.int16
            array = h.view(bits).numpy().view(array_type)
            for k in RANKS:
                row(h, array, k, offset, type_name, options, pool)


def row(
    h: torch.Tensor,
    array: np.ndarray,
    k: int,
    offset: np.ndarray,
    type_name: str,
    options: argparse.Namespace,
    pool: ThreadPoolExecutor,
) -> None:
    n, layers, d = h.shape
    v = torch.randn(layers, k, d, generator=torch.Generator().manual_seed(k)).to(h.dtype).float()
    directions = v.numpy()
    rivals = peers(h, v, options.threads, pool)
    few = slice(0, 8)
    expected = np.einsum("nld,lkd->nlk", h[few].double().numpy(), directions.astype(np.float64))
    scale = np.einsum("nld,lkd->nlk", h[few].double().abs().numpy(), np.abs(directions).astype(np.float64))
    errors = {name: np.max(np.abs(rival[1]()[few] - expected) / scale) for name, rival in rivals.items()}
    ours = np.max(np.abs(project(array, directions)[few] - expected) / scale)
    assert ours <= 1e-6, f"the kernel is wrong: {ours}"

    reads = readers(array, options.threads, pool)
    calls: dict[str, Call] = {
        "kernel": lambda: project(array, directions, threads=options.threads),
        "kernel +offset": lambda: project(array, directions, offset, options.threads),
        "kernel 1 thread": lambda: project(array, directions, threads=1),
    }
    calls |= reads
    calls |= {name: rival[0] for name, rival in rivals.items() if errors[name] <= ACCEPTED_ERROR}
    medians = interleave(calls, options.seconds)
    read = min(medians[name] for name in reads)
    ranking = sorted((medians[name], name) for name in rivals if name in medians)
    others = ", ".join(f"{name} {1e3 * t:.2f}" for t, name in ranking)
    ms = medians["kernel"]
    print(
        f"{n:>4} × {layers} × {d:<5} {type_name:>4} {k:>3} | {1e3 * ms:>6.2f} "
        f"{array.nbytes / ms / 1e9:>5.1f} {read / ms:>7.0%}  | {1e3 * medians['kernel +offset']:>7.2f} "
        f"{1e3 * medians['kernel 1 thread']:>8.2f} | {ranking[0][0] / ms:.2f}× of {others}",
        flush=True,
    )
    for name, error in errors.items():
        if error > ACCEPTED_ERROR:
            print(f"{'':>26}| {name} is wrong by {error:.0e} of Σ|h||v|: not counted")


if __name__ == "__main__":
    main()
