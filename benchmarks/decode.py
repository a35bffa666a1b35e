"""Tokens per second of `LlamaModel.generate` beside `llama-batched-bench`, built from the same source.

Both sides read the same number of random prompts of the same length, none with a common beginning, and answer
each with the same number of tokens, on the same threads. The peer's cache is as ours: a stream of its own for
each sequence, no larger than it must be. It draws tokens at random, where ours takes the likeliest of all
logits and looks for the end of an answer. The sides take turns.

Then the speed of the default model with the published adapter and without it, in turn, answers of one length.
Then the most memory that a process holds which answers 32 prompts, at two sizes of the context.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rs_gguf.engines.engine import NO_STEERING, Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures import binaries

GOAL = 0.8
CONTEXTS = (2048, 8192)
ADAPTER = Path(__file__).parents[1] / "vectors" / "qwen2.5-coder-0.5b-remove" / "remove-adapter.gguf"
PADDING = 256  # of a stream of the cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.DEFAULT, help="catalogue name or GGUF file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--memory", type=int, metavar="CELLS", help="only hold this context and tell memory")
    options = parser.parse_args()
    path = models.resolve(options.model)
    if options.memory:
        print(held(path, options))
        return
    bench = binaries.program("llama-batched-bench")
    print(f"{path.name}, {options.prompt} + {options.tokens} tokens, {options.threads} threads")
    print("| at once | read, tokens/s | peer | answer, tokens/s | peer | ratio | 80 % |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.batch:
        print(row(path, bench, batch, options), flush=True)
    if options.model == models.DEFAULT:  # which the adapter is for
        print("\n| at once | answer, tokens/s | with the adapter | ratio |\n| --- | --- | --- | --- |")
        with LlamaModel(path, n_parallel=max(options.batch), n_threads=options.threads) as model:
            for batch in options.batch:
                print(steered_row(model, batch, options), flush=True)
    print("\n| context | cells at once | peak memory, MB |\n| --- | --- | --- |")
    for cells in CONTEXTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", str(cells)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)


def row(path: Path, bench: Path, batch: int, options: argparse.Namespace) -> str:
    loaded = file_to_load(path)  # the same for both sides
    with LlamaModel(path, n_parallel=batch, n_threads=options.threads) as model:
        prompts = endless(model, batch, options)
        runs: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for repeat in range(options.repeats):
            for side in ("ours", "peer") if repeat % 2 == 0 else ("peer", "ours"):
                if side == "ours":
                    runs[side].append(ours(model, prompts, options))
                else:
                    runs[side].append(peer(loaded, bench, batch, options))
    (read, answer), (peer_read, peer_answer) = (
        [statistics.median(speeds) for speeds in zip(*runs[side], strict=True)] for side in runs
    )
    ratio = answer / peer_answer
    met = "met" if ratio >= GOAL else "missed"
    return (
        f"| {batch} | {read:.1f} | {peer_read:.1f} | {answer:.1f} | {peer_answer:.1f} | {ratio:.0%} | {met} |"
    )


def steered_row(model: LlamaModel, batch: int, options: argparse.Namespace) -> str:
    """Answers of the same length with the published adapter and without it, in turn."""
    sides = [NO_STEERING, Steering(adapters=[(ADAPTER, 1.0)])]
    speeds: list[list[float]] = [[], []]
    prompts = []
    for steering in sides:
        with model.steered(steering):
            prompts.append(endless(model, batch, options))
    for repeat in range(options.repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            with model.steered(sides[side]):
                speeds[side].append(ours(model, prompts[side], options)[1])
    plain, gated = map(statistics.median, speeds)
    return f"| {batch} | {plain:.1f} | {gated:.1f} | {gated / plain:.2f} |"


def endless(model: LlamaModel, batch: int, options: argparse.Namespace) -> list[list[int]]:
    """Prompts that the model does not stop answering, so that all of a batch stay in it."""
    rng = np.random.default_rng(0)
    chosen: list[list[int]] = []
    while len(chosen) < batch:
        tried = rng.integers(1000, model.n_vocab // 2, (batch - len(chosen), options.prompt)).tolist()
        answers = dict(model.generate(tried, max_tokens=options.tokens + 1))
        chosen += [prompt for i, prompt in enumerate(tried) if not answers[i].finished]
    return chosen


def ours(
    model: LlamaModel, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> tuple[float, float]:
    """Tokens read and answered in a second. The first token of an answer belongs to the reading."""
    seconds = []
    for tokens in (1, options.tokens + 1):
        start = time.perf_counter()
        answers = list(model.generate(prompts, max_tokens=tokens))
        seconds.append(time.perf_counter() - start)
        assert all(len(answer.tokens) == tokens for _, answer in answers)
    read, whole = seconds
    count = len(prompts)
    return count * options.prompt / read, count * options.tokens / (whole - read)


def peer(path: Path, bench: Path, batch: int, options: argparse.Namespace) -> tuple[float, float]:
    """The same of llama-batched-bench."""
    cells = -(-(options.prompt + options.tokens) // PADDING) * PADDING
    command = [bench, "-m", path, "-c", batch * cells, "-npp", options.prompt, "-ntg", options.tokens]
    command += ["-npl", batch, "-t", options.threads, "-tb", options.threads, "--output-format", "jsonl"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    found = json.loads(next(line for line in said if line.startswith("{")))
    return found["speed_pp"], found["speed_tg"]


def held(path: Path, options: argparse.Namespace) -> str:
    """A row of the second table: the peak of this process."""
    with LlamaModel(path, n_ctx=options.memory, n_threads=options.threads) as model:
        rng = np.random.default_rng(0)
        prompts = rng.integers(1000, model.n_vocab // 2, (model.n_parallel, options.prompt)).tolist()
        for _ in model.generate(prompts, max_tokens=options.tokens):
            pass
        cells = -(-(options.prompt + options.tokens) // PADDING) * PADDING
        at_once = min(model.n_parallel, options.memory // cells)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return f"| {options.memory} | {at_once} × {cells} | {peak:.0f} |"


if __name__ == "__main__":
    main()
