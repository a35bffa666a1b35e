"""One factorisation for all ridges, against torch.linalg.solve for each.

Claim: a path of 32 ridges x all layers x four ridge estimators (RMD, WRMD, WRMD uncentred, SafeRidge) is
many times faster than solving each with torch.linalg.solve, within 1.5 layers of fp64 activations beyond
the input.

Two peers, both torch fp64, at the fastest of 1 or all threads and of one system a call or a batch of four:
  solve   the covariance of a layer and weighting is formed once, then torch.linalg.solve for each ridge and
          estimator: 128 a layer;
  refit   what fitting each setting on its own costs: covariance and torch.linalg.solve, 128 times a layer.
The peers run on a sample of ridges of one layer, of the cheapest of the four estimators, and are multiplied
out; ours runs in full. Memory is that of the arrays each side allocates. Data: N samples, 45 % refused, 45 %
answered, 10 % neutral, the spread of the dimensions falling over three decades.

Usage: python benchmarks/ridge_path.py [--small] [--repeats R]
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from rs_gguf.constrained import SafeRidge
from rs_gguf.estimators import (
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)
from rs_gguf.paths import RidgePath

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
    def solve(matrix: torch.Tensor, right: torch.Tensor, ridges: np.ndarray) -> torch.Tensor:
        """Unit directions [R, D], by one call."""
        shifted = matrix.repeat(len(ridges), 1, 1)
        shifted.diagonal(dim1=1, dim2=2).add_(
            torch.from_numpy(ridges)[:, None] * matrix.trace() / len(matrix)
        )
        # Each is symmetric; its transpose is already in the order that LAPACK wants.
        solved = torch.linalg.solve(shifted.mT, right.expand(len(ridges), -1, -1))
        directions = solved[:, :, 0]
        if right.shape[1] > 1:
            harm, pull = right[:, 1], solved[:, :, 1]
            directions = directions - pull * ((directions @ harm) / (pull @ harm))[:, None]
        return torch.nn.functional.normalize(directions, dim=1)


def best(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_of_numpy(function: Callable[[], object]) -> int:
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def peak_of_torch(function: Callable[[], object]) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(np.cumsum([change for _, change in sorted(changes)]), default=0)


def flop_ratio(n: int, width: int) -> float:
    """Floating-point operations of the peer over ours, a layer with n answered samples, leading terms alone.

    Peer: three covariances and 128 solves. Ours: two covariances, or Gram matrices where n < D, of which one
    triangle is computed, and two reductions.
    """
    size = min(n, width)
    peer = 3 * 2 * n * width**2 + len(RIDGES) * len(ESTIMATORS) * 2 / 3 * width**3
    return peer / (2 * (n * width * size + 4 / 3 * size**3))


def compare(n: int, n_layers: int, width: int, repeats: int) -> None:
    activations, confidence, kinds = make(n, n_layers, width)
    answered = int((confidence < -0.15).sum())
    print(
        f"\nN {n}, L {n_layers}, D {width}, {answered} answered, {activations.nbytes / 2**20:.0f} MiB float32"
    )

    def fit(layers: int) -> list[RidgePath]:
        return fit_paths(activations[:, :layers], confidence, ESTIMATORS, ridges=RIDGES, kinds=kinds)

    ours = best(lambda: fit(n_layers), repeats)
    print(f"ours, in full, 1 thread:              {ours:9.2f} s  ({ours / n_layers * 1e3:.0f} ms a layer)")

    paths = fit(1)
    peer = Peer(activations[:, 0].copy(), confidence, kinds)
    worst = 0.0
    for estimator, path in zip(ESTIMATORS, paths, strict=True):
        theirs = peer.solve(*peer.parts(estimator.name), RIDGES[[0, 16, 31]]).numpy()
        worst = max(worst, float(np.abs(theirs - path.directions[[0, 16, 31], 0]).max()))
    print(f"largest difference of a component:    {worst:9.1e}")

    parts = peer.parts("wrmd")
    threads = torch.get_num_threads()
    forms, solves = {}, {}
    for count in {1, threads}:
        torch.set_num_threads(count)
        forms[count] = best(lambda: peer.parts("wrmd"), repeats)
        for batch in (1, 4):
            solves[count, batch] = best(partial(peer.solve, *parts, RIDGES[:batch]), repeats) / batch
    torch.set_num_threads(threads)
    form, (solve, (count, batch)) = min(forms.values()), min((v, k) for k, v in solves.items())
    fits = len(RIDGES) * len(ESTIMATORS) * n_layers
    # RMD, WRMD and the uncentred matrix: three to form a layer, SafeRidge shares WRMD's.
    total, refit = fits * solve + 3 * n_layers * form, fits * (solve + form)
    print(f"one solve, {count} of {threads} threads, {batch} a call:    {solve * 1e3:9.1f} ms")
    print(f"peer solve, {fits} fits, extrapolated: {total:8.1f} s  = {total / ours:7.1f} x ours")
    print(f"peer refit, {fits} fits, extrapolated: {refit:8.1f} s  = {refit / ours:7.1f} x ours")
    print(f"peer solve, ratio of flops:           {flop_ratio(answered, width):9.1f}")

    few = fit(2)
    results = sum(path.directions.nbytes + path.offset.nbytes for path in few)
    size = n * width * 8
    beyond = peak_of_numpy(lambda: fit(2)) - results
    print(
        f"ours, peak beyond input and result:   {beyond / 2**20:9.1f} MiB = {beyond / size:.2f} layers in "
        f"fp64, {2 * beyond / size:.2f} in float32"
    )
    peak = peak_of_torch(lambda: peer.solve(*peer.parts("wrmd"), RIDGES[:1]))
    print(f"peer, one fit:                        {peak / 2**20:9.1f} MiB = {peak / size:.2f} layers")


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
