"""One factorisation for all ridges, against torch.linalg.solve for each.

Claim: a path of 32 ridges x all layers x four ridge estimators (RMD, WRMD, WRMD uncentred, SafeRidge) is
many times faster than solving each with torch.linalg.solve, within 1.5 layers of fp64 activations beyond
the input.

Two peers, both torch fp64 at the faster of 1 and all threads:
  solve   the covariance of a layer and weighting is formed once, then one torch.linalg.solve a ridge and
          estimator: 128 a layer;
  refit   what fitting each setting on its own costs: covariance and torch.linalg.solve, 128 times a layer.
The peers run on a sample of ridges of one layer and are multiplied out; ours runs in full. Data: N samples,
45 % refused, 45 % answered, 10 % neutral, the spread of the dimensions falling over three decades.

Usage: python benchmarks/ridge_path.py [--small] [--repeats R]
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch

from rs_gguf.constrained import SafeRidge
from rs_gguf.estimators import (
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)

RIDGES = np.geomspace(1e-3, 1e2, 32)
ESTIMATORS = [
    RidgeMeanDifference(),
    WeightedRidgeMeanDifference(),
    UncentredWeightedRidgeMeanDifference(),
    SafeRidge(),
]


def make(n: int, n_layers: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = np.repeat([1.0, -1.0, 0.0], [int(n * 0.45), int(n * 0.45), n - 2 * int(n * 0.45)])
    kinds = np.where(confidence > 0, np.where(rng.random(n) < 0.3, "harmful", "sensitive"), "benign")
    confidence *= rng.uniform(0.2, 1, n)
    activations = rng.standard_normal((n, n_layers, width), dtype=np.float32)
    activations *= np.geomspace(10, 0.01, width, dtype=np.float32)
    activations += (confidence[:, None, None] * rng.standard_normal(width) * 0.1).astype(np.float32)
    activations += ((kinds == "harmful")[:, None, None] * rng.standard_normal(width) * 0.1).astype(np.float32)
    return activations, confidence, kinds


class Peer:
    """The four estimators by torch.linalg.solve, one layer."""

    def __init__(self, rows: np.ndarray, confidence: np.ndarray, kinds: np.ndarray) -> None:
        self.rows = torch.from_numpy(rows)
        self.size = torch.from_numpy(np.abs(confidence))
        refused, answered = confidence > 0.15, confidence < -0.15
        self.masks = {
            "refused": refused,
            "answered": answered,
            "sensitive": refused & (kinds == "sensitive"),
            "harmful": refused & (kinds == "harmful"),
            "benign": answered & (kinds == "benign"),
        }

    def parts(self, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix before the ridge and the right-hand sides."""

        def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            mask = torch.from_numpy(self.masks[name])
            weight = torch.ones_like(self.size) if estimator == "rmd" else self.size
            return self.rows[mask].double(), weight[mask] / weight[mask].sum()

        def mean(name: str) -> torch.Tensor:
            h, w = weights(name)
            return w @ h

        h, w = weights("answered")
        centre = mean("answered")
        if estimator != "wrmd-uncentred":
            h = h - centre
        matrix = (h * w[:, None]).T @ h
        if estimator == "safe-wrmd":
            return matrix, torch.stack([mean("sensitive") - centre, mean("harmful") - mean("benign")], 1)
        return matrix, (mean("refused") - centre)[:, None]

    @staticmethod
    def solve(matrix: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge * matrix.trace() / len(matrix))
        solved = torch.linalg.solve(shifted, right)
        direction = solved[:, 0]
        if right.shape[1] > 1:
            harm = right[:, 1]
            direction = direction - solved[:, 1] * (harm @ direction) / (harm @ solved[:, 1])
        return direction / direction.norm()


def best(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(n: int, n_layers: int, width: int, repeats: int) -> None:
    activations, confidence, kinds = make(n, n_layers, width)
    answered = int((confidence < -0.15).sum())
    print(
        f"\nN {n}, L {n_layers}, D {width}, {answered} answered, {activations.nbytes / 2**20:.0f} MiB float32"
    )

    start = time.perf_counter()
    paths = fit_paths(activations, confidence, ESTIMATORS, ridges=RIDGES, kinds=kinds)
    ours = time.perf_counter() - start
    for _ in range(repeats - 1):
        start = time.perf_counter()
        fit_paths(activations, confidence, ESTIMATORS, ridges=RIDGES, kinds=kinds)
        ours = min(ours, time.perf_counter() - start)
    print(f"ours, in full, 1 thread:              {ours:9.2f} s  ({ours / n_layers * 1e3:.0f} ms a layer)")

    peer = Peer(activations[:, 0].copy(), confidence, kinds)
    names = [estimator.name for estimator in ESTIMATORS]
    parts = {name: peer.parts(name) for name in names}
    worst = 0.0
    for name, path in zip(names, paths, strict=True):
        for index in (0, 16, 31):
            theirs = peer.solve(*parts[name], RIDGES[index]).numpy()
            worst = max(worst, float(np.abs(theirs - path.directions[index, 0]).max()))
    print(f"largest difference of a component:    {worst:9.1e}")

    solve, refit, chosen = np.inf, np.inf, 1
    threads = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        for name in names:
            once = best(lambda name=name: peer.solve(*parts[name], 0.1), repeats)
            if once < solve:
                solve, chosen = once, count
            refit = min(refit, best(lambda name=name: peer.solve(*peer.parts(name), 0.1), repeats))
    form = best(lambda: peer.parts("wrmd"), repeats)
    torch.set_num_threads(threads)
    fits = len(RIDGES) * len(ESTIMATORS) * n_layers
    # RMD, WRMD and the uncentred matrix: three to form a layer, SafeRidge shares WRMD's.
    total = fits * solve + 3 * n_layers * form
    print(f"one torch.linalg.solve, {chosen} of {threads} threads: {solve * 1e3:9.1f} ms")
    print(f"peer solve, {fits} fits, extrapolated: {total:8.1f} s  = {total / ours:7.1f} x ours")
    print(
        f"peer refit, {fits} fits, extrapolated: {fits * refit:8.1f} s  = {fits * refit / ours:7.1f} x ours"
    )

    few = activations[:, :2]
    tracemalloc.start()
    kept = fit_paths(few, confidence, ESTIMATORS, ridges=RIDGES, kinds=kinds)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    results = sum(p.directions.nbytes + p.offset.nbytes for p in kept)
    layer = n * width * 8
    beyond = peak - results
    print(
        f"peak beyond input and result:         {beyond / 2**20:9.1f} MiB = {beyond / layer:.2f} layers in "
        f"fp64, {2 * beyond / layer:.2f} in float32"
    )


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
