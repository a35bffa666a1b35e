"""Measure a ridge path from one eigendecomposition against separate solves and Cholesky factors.

Claim: at D = 4,096, a ridge path is at least 50 times as fast as solving each system separately with
torch.linalg.solve. The path has 32 ridges × all layers × four estimators (RMD, WRMD, uncentred WRMD,
SafeRidge).

This project's path runs completely, with one layer per core. The peers run in float64 with torch, on
one thread or all, whichever is faster.
  torch.linalg.solve   Gaussian elimination of each covariance;
  Cholesky             factors of the same systems;
  Cholesky, dual       the Gram matrix [n, n] of the n answered samples in place of the covariance [D, D];
  eigh                 the eigenvectors of the smaller of the two, from which all ridges are solved.
Each peer forms a matrix once for all ridges: three per layer, since SafeRidge uses the matrix of WRMD. The
peers run on one layer and matrix, the first two on a sample of the ridges; their times are extrapolated. The
memory is the growth of the process during this project's path (Linux). Data: N samples, 45 % refused, 45 %
answered, 10 % neutral; the standard deviations of the dimensions span three decades.

Usage: python benchmarks/ridge_path.py [--small] [--repeats R]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from rs_gguf.estimators.constrained import SafeRidge
from rs_gguf.estimators.estimator import (
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.path import RidgePath
from rs_gguf.machine import usable_cores

RIDGES = np.geomspace(1e-3, 1e2, 32)
ESTIMATORS = [
    RidgeMeanDifference(),
    WeightedRidgeMeanDifference(),
    UncentredWeightedRidgeMeanDifference(),
    SafeRidge(),
]
MATRICES = 3  # matrices per layer for the four estimators


def make(n: int, n_layers: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random activations [N, L, D], confidences [N] and kinds [N]."""
    rng = np.random.default_rng(0)
    confidence = np.repeat([1.0, -1.0, 0.0], [int(n * 0.45), int(n * 0.45), n - 2 * int(n * 0.45)])
    kinds = np.where(confidence > 0, np.where(rng.random(n) < 0.3, "harmful", "sensitive"), "benign")
    confidence *= rng.uniform(0.2, 1, n)
    activations = rng.standard_normal((n, n_layers, width), dtype=np.float32)
    activations *= np.geomspace(10, 0.01, width, dtype=np.float32)
    activations += (confidence[:, None, None] * rng.standard_normal(width) * 0.1).astype(np.float32)
    activations += ((kinds == "harmful")[:, None, None] * rng.standard_normal(width) * 0.1).astype(np.float32)
    return activations, confidence, kinds


# ---- peers -----------------------------------------------------------------------------------------------


def by_elimination(matrix: Float64, right: Float64, shifts: Float64) -> Float64:
    """Return (matrix + shift I)⁻¹ right, [R, D, K], for each of the `shifts` [R] by Gaussian elimination."""
    columns = torch.from_numpy(right)
    # Solve one system per call: batches on several threads hang or fail in torch 2.13 with MKL.
    return np.stack([torch.linalg.solve(m, columns).numpy() for m in shifted_by(matrix, shifts)])


def by_cholesky(matrix: Float64, right: Float64, shifts: Float64) -> Float64:
    """Return the same by a Cholesky factor of each system."""
    columns = torch.from_numpy(right)
    factors = map(torch.linalg.cholesky, shifted_by(matrix, shifts))
    return np.stack([torch.cholesky_solve(columns, factor).numpy() for factor in factors])


def shifted_by(matrix: Float64, shifts: Float64) -> Iterator[torch.Tensor]:
    whole = torch.from_numpy(matrix)
    for shift in shifts:
        shifted = whole.clone()
        shifted.diagonal().add_(float(shift))
        yield shifted


def by_eigenvectors(matrix: Float64, right: Float64, shifts: Float64) -> Float64:
    """Return the same from one eigendecomposition."""
    values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(matrix)))
    scaled = (vectors.T @ right) / (values[:, None] + shifts[:, None, None])
    return product(vectors, scaled)


def product(a: Float64, b: Float64) -> Float64:
    """Return A [M, D] times each matrix of B [R, D, K], as [R, M, K]."""
    return np.moveaxis(np.tensordot(a, b, (1, 1)), 1, 0)


class Peer(NamedTuple):
    """A way to solve (AᵀA + λI) x = b for samples A [n, D], or its dual, with `at_once` ridges per call."""

    solver: Callable[[Float64, Float64, Float64], Float64]
    at_once: int
    dual: bool = False

    def matrix(self, samples: Float64) -> Float64:
        return samples @ samples.T if self.dual else samples.T @ samples

    def directions(self, matrix: Float64, samples: Float64, right: Float64, ridges: Float64) -> Float64:
        """Return unit directions [R, D] for relative ridges, orthogonal to any second right-hand side."""
        shifts = ridges * matrix.trace() / samples.shape[1]
        if self.dual:
            inner = self.solver(matrix, samples @ right, shifts)
            solved = (right - product(samples.T, inner)) / shifts[:, None, None]
        else:
            solved = self.solver(matrix, right, shifts)
        directions = solved[:, :, 0]
        if right.shape[1] > 1:
            harm, pull = right[:, 1], solved[:, :, 1]
            directions = directions - pull * ((directions @ harm) / (pull @ harm))[:, None]
        return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def system(
    estimator: str, rows: np.ndarray, confidence: np.ndarray, kinds: np.ndarray
) -> tuple[Float64, Float64]:
    """Return the weighted, centred answered samples A [n, D] of one layer, and right-hand sides [D, K]."""
    refused, answered = confidence > 0.15, confidence < -0.15
    size = np.ones(len(rows)) if estimator == "rmd" else np.abs(confidence)

    def weighted(mask: np.ndarray) -> tuple[Float64, Float64]:
        return rows[mask].astype(np.float64), size[mask] / size[mask].sum()

    def mean(mask: np.ndarray) -> Float64:
        samples, weights = weighted(mask)
        return np.asarray(weights @ samples)

    samples, weights = weighted(answered)
    centre = weights @ samples
    if estimator != "wrmd-uncentred":
        samples -= centre
    samples *= np.sqrt(weights)[:, None]
    if estimator == "safe-wrmd":
        harm = mean(refused & (kinds == "harmful")) - mean(answered & (kinds == "benign"))
        return samples, np.column_stack([mean(refused & (kinds == "sensitive")) - centre, harm])
    return samples, (mean(refused) - centre)[:, None]


# ---- measures --------------------------------------------------------------------------------------------


def best(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest time in s."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest time in s on one thread or on all."""
    times = []
    for count in {1, usable_cores()}:
        torch.set_num_threads(count)
        with threadpool_limits(count):
            times.append(best(function, repeats))
    return min(times)


def peak(function: Callable[[], object]) -> int:
    """Return the largest growth of this process in bytes while the function runs."""

    def memory(key: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split(f"{key}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def formed(peer: Peer, make_system: Callable[[], tuple[Float64, Float64]]) -> Float64:
    return peer.matrix(make_system()[0])


def compare(n: int, n_layers: int, width: int, repeats: int) -> None:
    activations, confidence, kinds = make(n, n_layers, width)
    answered = int((confidence < -0.15).sum())
    print(
        f"\nN {n}, L {n_layers}, D {width}, {answered} answered, {activations.nbytes / 2**20:.0f} MiB float32"
    )

    def fit(layers: int) -> list[RidgePath]:
        return fit_paths(
            activations[:, :layers], confidence, ESTIMATORS, ridges=RIDGES, kinds=kinds, device="cpu"
        )

    ours = best(lambda: fit(n_layers), repeats)
    cores = f"ours, complete, {usable_cores()} cores:"
    print(f"{cores:<31}{ours:8.1f} s  ({ours / n_layers * 1e3:.0f} ms a layer)")

    peers = {
        "torch.linalg.solve": Peer(by_elimination, 1),
        "Cholesky": Peer(by_cholesky, 1),
        "Cholesky, dual": Peer(by_cholesky, len(RIDGES), dual=True),
        "eigh": Peer(by_eigenvectors, len(RIDGES), dual=answered < width),
    }
    rows = activations[:, 0].copy()
    systems = {e.name: partial(system, e.name, rows, confidence, kinds) for e in ESTIMATORS}
    ends = [0, len(RIDGES) - 1]
    paths = fit(1)
    for name, peer in peers.items():
        difference = 0.0
        for estimator, path in zip(ESTIMATORS, paths, strict=True):
            samples, right = systems[estimator.name]()
            directions = peer.directions(peer.matrix(samples), samples, right, RIDGES[ends])
            difference = max(difference, float(np.abs(directions - path.directions[ends, 0]).max()))
        samples, right = systems["wrmd"]()
        matrix = peer.matrix(samples)
        form = fastest(partial(formed, peer, systems["wrmd"]), repeats)
        ridges = RIDGES[: peer.at_once]
        solve = fastest(partial(peer.directions, matrix, samples, right, ridges), repeats) / len(ridges)
        total = n_layers * MATRICES * (form + len(RIDGES) * solve)
        print(
            f"{name + ':':<31}{total:8.1f} s  = {total / ours:6.1f} x ours  (matrix "
            f"{form * 1e3:.0f} ms, a ridge {solve * 1e3:.1f} ms; components off by {difference:.0e} at most)"
        )
    if not Path("/proc/self/clear_refs").exists():
        print("ours, beyond the result: not measured, since only Linux reports the peak of memory in /proc")
        return
    size = n * width * 8
    beyond = peak(lambda: fit(2)) - sum(path.directions.nbytes for path in fit(2))
    print(f"ours, beyond the result: {beyond / 2**20:8.1f} MiB = {beyond / size:.2f} layers in float64")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="D = 896 only")
    parser.add_argument("--repeats", type=int, default=3, help="best of this many (default 3)")
    options = parser.parse_args()
    compare(2000, 24, 896, options.repeats)
    if not options.small:
        compare(2000, 32, 4096, options.repeats)
