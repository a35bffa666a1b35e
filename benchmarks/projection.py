"""Measure the projection kernel against its peers, on the same data, interleaved in one process.

For every size, type and K, prints the kernel's median time and its bandwidth relative to the fastest of three
plain readers. Also prints the kernel's time with an offset, on one thread, and for a single repeated row.
That row stays in the cache, so only the multiplications take time. The peers follow, fastest first, with the
ratio of the fastest to the kernel: among all, and among those that are as exact. Several layouts are tried
for each peer; the fastest counts. A peer counts only if its result is correct. A mark ~ means that it rounds
its result to 16 bits, an error of 10⁻³ instead of the kernel's 10⁻⁷. NumKong has no threads; it gets as many
as the kernel, split by samples. Last comes a line per goal: met, or where it is missed.

    python benchmarks/projection.py [--seconds S] [--threads T]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from rs_gguf import _core
from rs_gguf.activations.projection import project
from rs_gguf.machine import usable_cores

SIZES = [(512, 32, 4096), (64, 24, 896)]
RANKS = [1, 8, 64]
TYPES = {
    "f32": (np.float32, torch.float32),
    "f16": (np.float16, torch.float16),
    "bf16": (ml_dtypes.bfloat16, torch.bfloat16),
}
ACCEPTED_ERROR = 1e-2  # relative to Σ|h||v|; accepts the 16-bit results of torch's 16-bit products
EXACT = 1e-6  # the kernel's largest error on random rows, relative to Σ|h||v|
SPINNING = 0.05  # seconds until threads of another call stop spinning: OpenBLAS spins for 2²⁶ cycles
TOO_SLOW = 8  # times the kernel's time
FEW = 8  # directions up to which memory bandwidth should be the limit

Call = Callable[[], Any]


def numkong() -> Any:
    """Return the peer's module, or None if it is not installed."""
    try:
        return importlib.import_module("numkong")
    except ImportError:
        return None


@dataclass(frozen=True)
class Row:
    """The result for one size, type and K; times are relative to the kernel's time."""

    name: str
    type: str
    rank: int
    of_read: float
    cached: float  # the time with rows from the cache, relative to plain reads
    best: float
    scaling: float


def split(pool: ThreadPoolExecutor, threads: int, n: int, part: Callable[[slice], Any]) -> list[Any]:
    """Call `part` on each of `threads` slices of n rows concurrently; return the results in order."""
    edges = [n * i // threads for i in range(threads + 1)]
    return list(pool.map(part, [slice(a, b) for a, b in itertools.pairwise(edges)]))


def readers(h: np.ndarray, threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Return calls that only read every byte of h."""
    words = h.reshape(-1).view(np.int64)
    tensor = torch.from_numpy(words).view(torch.float64)  # meaningless bits; only reading them counts
    return {
        "numpy add": lambda: split(pool, threads, words.size, lambda rows: np.add.reduce(words[rows])),
        "numpy or": lambda: split(pool, threads, words.size, lambda rows: np.bitwise_or.reduce(words[rows])),
        "torch sum": lambda: tensor.sum(),
    }


def peers(
    h: torch.Tensor, v: torch.Tensor, threads: int, pool: ThreadPoolExecutor
) -> dict[str, tuple[Call, Callable[[], np.ndarray]]]:
    """Return name → (the call to time, a function that returns its result [N, L, K])."""
    n, layers, _ = h.shape
    rows = v.to(h.dtype).contiguous()  # [L, K, D]
    same = rows.transpose(1, 2).contiguous()  # [L, D, K]
    wide = v.transpose(1, 2).contiguous()
    by_layer = torch.empty(layers, n, v.shape[1], dtype=h.dtype)
    wide_out = torch.empty(layers, n, v.shape[1])

    def matmul() -> torch.Tensor:
        for layer in range(layers):
            torch.matmul(h[:, layer], same[layer], out=by_layer[layer])
        return by_layer

    def matmul_in_float32() -> torch.Tensor:
        for layer in range(layers):
            torch.matmul(h[:, layer].float(), wide[layer], out=wide_out[layer])
        return wide_out

    def result(call: Callable[[], torch.Tensor]) -> tuple[Call, Callable[[], np.ndarray]]:
        return call, lambda: call().float().permute(1, 0, 2).numpy()

    def linear() -> list[torch.Tensor]:
        return [torch.nn.functional.linear(h[:, layer], rows[layer]) for layer in range(layers)]

    def mv() -> list[torch.Tensor]:
        return [torch.mv(h[:, layer], rows[layer, 0]) for layer in range(layers)]

    calls: dict[str, tuple[Call, Callable[[], np.ndarray]]] = {
        "torch.matmul": result(matmul),
        "torch.linear": result(lambda: torch.stack(linear())),
        "torch.bmm": result(lambda: torch.bmm(h.permute(1, 0, 2), same)),
        "torch.einsum": result(lambda: torch.einsum("nld,ldk->lnk", h, same)),
    }
    if v.shape[1] == 1:
        calls["torch.mv"] = mv, lambda: torch.stack(mv(), 1)[:, :, None].float().numpy()
    if h.dtype == torch.float32:
        array, columns, out = h.numpy(), wide.numpy(), np.empty((layers, n, v.shape[1]), np.float32)

        def numpy_matmul() -> np.ndarray:
            for layer in range(layers):
                np.matmul(array[:, layer], columns[layer], out=out[layer])
            return out

        calls["numpy.matmul"] = numpy_matmul, lambda: numpy_matmul().transpose(1, 0, 2)
    else:
        calls["torch float, matmul"] = result(matmul_in_float32)
    nk = numkong()
    if nk is not None:
        array_type, bits = {
            torch.float32: (np.float32, torch.float32),
            torch.float16: (np.float16, torch.float16),
            torch.bfloat16: (ml_dtypes.bfloat16, torch.int16),
        }[h.dtype]
        rows_in, rows_v = (x.view(bits).numpy().view(array_type) for x in (h, rows))
        name = np.dtype(array_type).name

        def cdist(samples: slice, layer: int) -> Any:
            a, b = rows_in[samples, layer], rows_v[layer]
            if name == "bfloat16":  # cdist takes bfloat16 as bits
                a, b = a.view(np.uint16), b.view(np.uint16)
            return nk.cdist(a, b, "dot", dtype=name, out_dtype="float32")

        def dots_packed(samples: slice, layer: int) -> Any:
            return nk.dots_packed(rows_in[samples, layer], nk.dots_pack(rows_v[layer]))

        def by_samples(one: Callable[[slice, int], Any]) -> tuple[Call, Callable[[], np.ndarray]]:
            def part(samples: slice) -> list[Any]:
                return [one(samples, layer) for layer in range(layers)]

            def result() -> np.ndarray:
                parts = split(pool, threads, n, part)
                return np.concatenate([np.stack([np.asarray(x) for x in p], axis=1) for p in parts])

            return lambda: split(pool, threads, n, part), result

        calls["numkong.cdist"] = by_samples(cdist)
        calls["numkong.dots_packed"] = by_samples(dots_packed)
    return calls


def interleave(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Return the median time in s of each call. They take turns for `seconds` and at least three rounds.

    A call that takes more than `TOO_SLOW` times the kernel's time has one turn. Threads of OpenBLAS and
    OpenMP spin for tens of milliseconds after a call, on cores that the next call needs. Each turn therefore
    waits until they sleep, and is timed after a first call that wakes the call's own threads.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 3:
        for name, call in calls.items():
            if times[name] and min(times[name]) > TOO_SLOW * min(times["kernel"]):
                continue
            time.sleep(SPINNING)
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds per row of the table")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pool = ThreadPoolExecutor(options.threads)
    print(f"kernel {_core.kernel()}, {options.threads} threads, torch {torch.__version__}, ", end="")
    print(f"numkong {numkong().__version__}" if numkong() else "numkong not installed: skipped")
    print(
        f"{'N × L × D':>16} type   K |     ms  GB/s  of read | cached +offset 1 thread, scaling | "
        "fastest peer, fastest as exact"
    )
    rows = []
    for n, layers, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(n, layers, d, generator=generator)
        offset = np.random.default_rng(0).standard_normal((layers, d)).astype(np.float32)
        for type_name, (array_type, tensor_type) in TYPES.items():
            h = base.to(tensor_type)
            bits = torch.float32 if tensor_type == torch.float32 else torch.int16
            array = h.view(bits).numpy().view(array_type)
            rows += [measure(h, array, k, offset, type_name, options, pool) for k in RANKS]
    print_goals(rows, options.threads)


def measure(
    h: torch.Tensor,
    array: np.ndarray,
    k: int,
    offset: np.ndarray,
    type_name: str,
    options: argparse.Namespace,
    pool: ThreadPoolExecutor,
) -> Row:
    """Measure one row of the table; print and return it."""
    n, layers, d = h.shape
    v = torch.randn(layers, k, d, generator=torch.Generator().manual_seed(k)).to(h.dtype).float()
    directions = v.numpy()
    rivals = peers(h, v, options.threads, pool)
    few = np.linspace(0, n - 1, 8 * options.threads, dtype=int)  # samples from every thread's part
    expected = np.einsum("nld,lkd->nlk", h[few].double().numpy(), directions.astype(np.float64))
    scale = np.einsum("nld,lkd->nlk", h[few].double().abs().numpy(), np.abs(directions).astype(np.float64))
    errors = {name: np.max(np.abs(rival[1]()[few] - expected) / scale) for name, rival in rivals.items()}
    ours = np.max(np.abs(project(array, directions, threads=options.threads)[few] - expected) / scale)
    assert ours <= EXACT, f"the kernel is wrong: {ours}"

    reads = readers(array, options.threads, pool)
    one_row = np.broadcast_to(array[:1], array.shape)
    calls: dict[str, Call] = {
        "kernel": lambda: project(array, directions, threads=options.threads),
        "kernel cached": lambda: project(one_row, directions, threads=options.threads),
        "kernel +offset": lambda: project(array, directions, offset, options.threads),
        "kernel 1 thread": lambda: project(array, directions, threads=1),
    }
    calls |= reads
    calls |= {name: rival[0] for name, rival in rivals.items() if errors[name] <= ACCEPTED_ERROR}
    medians = interleave(calls, options.seconds)
    read = min(medians[name] for name in reads)
    ms = medians["kernel"]
    ranking = sorted((medians[name], name) for name in rivals if name in medians)
    exact = [(t, name) for t, name in ranking if errors[name] <= EXACT]
    others = ", ".join(f"{'' if errors[name] <= EXACT else '~'}{name} {1e3 * t:.2f}" for t, name in ranking)
    scaling = medians["kernel 1 thread"] / ms
    print(
        f"{n:>4} × {layers} × {d:<5} {type_name:>4} {k:>3} | {1e3 * ms:>6.2f} "
        f"{array.nbytes / ms / 1e9:>5.1f} {read / ms:>7.0%}  | "
        f"{1e3 * medians['kernel cached']:>6.2f} {1e3 * medians['kernel +offset']:>7.2f} "
        f"{1e3 * medians['kernel 1 thread']:>8.2f} {scaling:>5.2f}×   | "
        f"{ranking[0][0] / ms:.2f}×, {exact[0][0] / ms:.2f}× of {others}",
        flush=True,
    )
    for name, error in errors.items():
        if error > ACCEPTED_ERROR:
            print(f"{'':>26}| {name} is wrong by {error:.0e} of Σ|h||v|: not counted")
    cached = medians["kernel cached"] / read
    return Row(f"N {n} {type_name} K {k}", type_name, k, read / ms, cached, ranking[0][0] / ms, scaling)


def print_goals(rows: list[Row], threads: int) -> None:
    """Print a line per goal: whether all rows that it concerns meet it."""
    few = [row for row in rows if row.rank <= FEW]
    goals: list[tuple[str, list[Row], Callable[[Row], float], float]] = [
        (f"85 % of the read bandwidth, K ≤ {FEW}", few, lambda row: row.of_read, 0.85),
        (f"not slower than the fastest peer, K ≤ {FEW}", few, lambda row: row.best, 1.0),
        (
            f"1.5 × the fastest peer in 16 bits, K ≤ {FEW}",
            [row for row in few if row.type != "f32"],
            lambda row: row.best,
            1.5,
        ),
        (
            "within 10 % of the fastest peer, K = 64",
            [r for r in rows if r.rank > FEW],
            lambda row: row.best,
            0.9,
        ),
    ]
    if threads == 2:
        goals.append(
            ("1.7 × one thread, N 512", [r for r in rows if "N 512" in r.name], lambda r: r.scaling, 1.7)
        )
    print()
    for goal, concerned, figure, minimum in goals:
        missed = [f"{row.name} {figure(row):.2f}" for row in concerned if figure(row) < minimum]
        print(f"{goal}: {'missed by ' + ', '.join(missed) if missed else 'met'}")
    compute_bound = [row.name for row in few if row.cached > 1 / 0.85]
    if compute_bound:
        print(f"the multiplications alone take longer than 85 % of the bandwidth: {', '.join(compute_bound)}")


if __name__ == "__main__":
    main()
