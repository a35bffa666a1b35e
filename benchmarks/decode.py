"""Measure tokens/s of `LlamaModel.generate` against `llama-batched-bench`, built from the same source.

Both read the same number of random prompts of the same length without a common prefix. Both answer each
prompt with the same number of tokens, on the same threads. The peer's KV cache has the same form: one stream
per sequence, as small as possible. The peer samples tokens at random; this project takes the likeliest token
and checks for the end of the answer. They take turns.

Also measures the default model with and without the published adapter, in turns, at one answer length. Last
comes the peak memory of a process that answers 32 prompts at two context sizes. Prints Markdown tables.
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
PADDING = 256  # KV cells of a stream are rounded up to a multiple of this


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.DEFAULT, help="catalogue name or GGUF file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="concurrent sequences")
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--memory", type=int, metavar="CELLS", help="only print the peak memory at this context size"
    )
    options = parser.parse_args()
    path = models.resolve(options.model)
    if options.memory:
        print(memory_row(path, options))
        return
    bench = binaries.program("llama-batched-bench")
    print(f"{path.name}, {options.prompt} + {options.tokens} tokens, {options.threads} threads")
    print("| at once | read, tokens/s | peer | answer, tokens/s | peer | ratio | 80 % |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.batch:
        print(row(path, bench, batch, options), flush=True)
    if options.model == models.DEFAULT:  # the adapter fits only this model
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
    loaded = file_to_load(path)  # both load the same file
    with LlamaModel(path, n_parallel=batch, n_threads=options.threads) as model:
        prompts = endless(model, batch, options)
        runs: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for repeat in range(options.repeats):
            for program in ("ours", "peer") if repeat % 2 == 0 else ("peer", "ours"):
                if program == "ours":
                    runs[program].append(ours(model, prompts, options))
                else:
                    runs[program].append(peer(loaded, bench, batch, options))
    (read, answer), (peer_read, peer_answer) = (
        [statistics.median(speeds) for speeds in zip(*runs[program], strict=True)] for program in runs
    )
    ratio = answer / peer_answer
    met = "met" if ratio >= GOAL else "missed"
    return (
        f"| {batch} | {read:.1f} | {peer_read:.1f} | {answer:.1f} | {peer_answer:.1f} | {ratio:.0%} | {met} |"
    )


def steered_row(model: LlamaModel, batch: int, options: argparse.Namespace) -> str:
    """Return a row of the second table: answers of one length with and without the published adapter."""
    steerings = [NO_STEERING, Steering(adapters=[(ADAPTER, 1.0)])]
    speeds: list[list[float]] = [[], []]
    prompts = []
    for steering in steerings:
        with model.steered(steering):
            prompts.append(endless(model, batch, options))
    for repeat in range(options.repeats):
        for k in (0, 1) if repeat % 2 == 0 else (1, 0):
            with model.steered(steerings[k]):
                speeds[k].append(ours(model, prompts[k], options)[1])
    plain, gated = map(statistics.median, speeds)
    return f"| {batch} | {plain:.1f} | {gated:.1f} | {gated / plain:.2f} |"


def endless(model: LlamaModel, batch: int, options: argparse.Namespace) -> list[list[int]]:
    """Return random prompts whose answers do not end early, so that the batch stays full."""
    rng = np.random.default_rng(0)
    prompts: list[list[int]] = []
    while len(prompts) < batch:
        candidates = rng.integers(1000, model.n_vocab // 2, (batch - len(prompts), options.prompt)).tolist()
        answers = dict(model.generate(candidates, max_tokens=options.tokens + 1))
        prompts += [prompt for i, prompt in enumerate(candidates) if not answers[i].finished]
    return prompts


def ours(
    model: LlamaModel, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> tuple[float, float]:
    """Return tokens/s of prompts and of answers. The first answer token counts as part of the prompt pass."""
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
    """Return tokens/s of prompts and of answers by llama-batched-bench."""
    cells = -(-(options.prompt + options.tokens) // PADDING) * PADDING
    command = [bench, "-m", path, "-c", batch * cells, "-npp", options.prompt, "-ntg", options.tokens]
    command += ["-npl", batch, "-t", options.threads, "-tb", options.threads, "--output-format", "jsonl"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    speeds = json.loads(next(line for line in lines if line.startswith("{")))
    return speeds["speed_pp"], speeds["speed_tg"]


def memory_row(path: Path, options: argparse.Namespace) -> str:
    """Return a row of the third table: the peak memory of this process."""
    with LlamaModel(path, n_ctx=options.memory, n_threads=options.threads) as model:
        rng = np.random.default_rng(0)
        prompts = rng.integers(1000, model.n_vocab // 2, (model.n_parallel, options.prompt)).tolist()
        for _ in model.generate(prompts, max_tokens=options.tokens):
            pass
        cells = -(-(options.prompt + options.tokens) // PADDING) * PADDING
        at_once = min(model.n_parallel, options.memory // cells)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, other systems KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return f"| {options.memory} | {at_once} × {cells} | {peak:.0f} |"


if __name__ == "__main__":
    main()
