"""Measure candidates evaluated per minute: vectors swapped in one loaded model against loading it for each.

All methods use the same model, prompts and vectors, and compute the log-probability of the first words of a
refusal after each prompt. "reloaded" is this project with the model loaded again for each candidate; it
differs only in the loading. The peer is llama-cpp-python, which has one sequence per context. It gets good
conditions: all cores and flash attention. It reads the common prefix of the prompts once per candidate. Then
it reads each prompt and the words after it in one step, with logits of these words only. It swaps vectors
too; its "reloaded" loads the model for each candidate. All methods must compute the same numbers. The time of
a change of candidate is also measured separately. The methods take turns; the medians count.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering
from rs_gguf.engines.generation import common_prefix
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load
from rs_gguf.prompts import grid as prompts

Directions = dict[int, NDArray[np.float32]]
Pairs = list[tuple[list[int], list[int]]]
_REFUSAL = "I'm sorry, but I can't assist"
# Nats of a whole refusal prefix. Rounding depends on the batch size (0.13 nats measured without AMX). Without
# the vector, or with another one, at least one prefix differs by 2 nats.
_TOLERANCE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    path = file_to_load(models.pull(models.DEFAULT))  # all methods load the same file
    model = LlamaModel(path, n_threads=options.threads)
    pool = [p for p in prompts.grid(["sensitive", "harmful"]) if p.split == "tune"]
    sample = prompts.stratified(pool, options.prompts, seed=0)
    refusal = model.tokenize(_REFUSAL)
    pairs = [(tokens, refusal) for tokens in chat_tokens(model, sample)]
    rng = np.random.default_rng(0)
    candidates: list[Directions] = [
        {layer: rng.standard_normal(model.n_embd).astype(np.float32) * 0.05 for layer in range(8, 16)}
        for _ in range(options.candidates)
    ]
    peer = open_peer(path, options.threads)
    methods: dict[str, Callable[[Directions], NDArray[np.float64]]] = {
        "swapped": lambda directions: log_probabilities(model, directions, pairs),
        "reloaded": lambda directions: reloaded(path, options.threads, directions, pairs),
        "llama-cpp-python, swapped": lambda directions: peer_log_probabilities(peer, directions, pairs),
        "llama-cpp-python, reloaded": lambda directions: peer_reloaded(
            path, options.threads, directions, pairs
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    values = {}
    for repeat in range(options.repeats):
        for name in list(methods) if repeat % 2 == 0 else reversed(list(methods)):
            start = time.perf_counter()
            values[name] = np.stack([methods[name](directions) for directions in candidates])
            seconds[name].append(time.perf_counter() - start)
            rate = 60 * len(candidates) / seconds[name][-1]
            print(f"{name:<26} {rate:6.1f} candidates/min", flush=True)
    for name in list(methods)[1:]:
        largest = np.abs(values[name] - values["swapped"]).max()
        if largest > _TOLERANCE:
            raise SystemExit(f"{name} computes log-probabilities that differ by up to {largest:.3f} nats")
        ratio = statistics.median(seconds[name]) / statistics.median(seconds["swapped"])
        print(f"swapped evaluates {ratio:.2f} times as many candidates as {name}")
    swap, load = changes(model, candidates[0]), loading(path, options.threads)
    print(f"a change alone: {1e3 * swap:.2f} ms swapped, {1e3 * load:.0f} ms loaded, {load / swap:.0f} times")


def log_probabilities(model: LlamaModel, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    """Return the log-probability of the refusal prefix in each pair."""
    with model.steered(Steering(directions)):
        rows = model.token_logprobs(pairs)
    return np.array([float(logprobs.sum()) for logprobs, _ in rows])


def reloaded(path: Path, threads: int, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    with LlamaModel(path, n_threads=threads) as model:
        return log_probabilities(model, directions, pairs)


def open_peer(path: Path, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )


def peer_log_probabilities(
    llama: llama_cpp.Llama, directions: Directions, pairs: Pairs
) -> NDArray[np.float64]:
    width, last = llama.n_embd(), llama_cpp.llama_model_n_layer(llama.model) - 1
    buffer = np.zeros((last, width), dtype=np.float32)
    for layer, direction in directions.items():
        buffer[layer - 1] = direction
    pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    llama_cpp.llama_set_adapter_cvec(llama.ctx, pointer, buffer.size, width, 1, last)
    shared = common_prefix([prompt for prompt, _ in pairs])
    llama.reset()
    llama.eval(pairs[0][0][:shared])
    batch = llama_cpp.llama_batch_init(llama.n_batch, 0, 1)
    totals = []
    for prompt, refusal in pairs:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llama.ctx), 0, shared, -1)
        tokens = [*prompt[shared:], *refusal[:-1]]
        batch.n_tokens = len(tokens)
        first = len(tokens) - len(refusal)  # the prompt's last token predicts the first token after it
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, shared + i, i >= first
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(llama.ctx, batch) != 0:
            raise SystemExit("llama-cpp-python could not decode")
        total = 0.0
        for i, target in enumerate(refusal, start=first):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, i), (llama.n_vocab(),))
            top = float(logits.max())
            total += float(logits[target]) - top - float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
        totals.append(total)
    llama_cpp.llama_batch_free(batch)
    return np.array(totals)


def peer_reloaded(path: Path, threads: int, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    llama = open_peer(path, threads)
    values = peer_log_probabilities(llama, directions, pairs)
    llama.close()
    return values


def changes(model: LlamaModel, directions: Directions, times: int = 50) -> float:
    """Return the seconds that applying a vector to the loaded model and removing it takes."""
    start = time.perf_counter()
    for _ in range(times):
        with model.steered(Steering(directions)):
            pass
    return (time.perf_counter() - start) / times


def loading(path: Path, threads: int, times: int = 3) -> float:
    """Return the seconds that loading the model takes, with its file in the page cache."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        LlamaModel(path, n_threads=threads).close()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
