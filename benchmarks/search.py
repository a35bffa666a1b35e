"""Configurations probed per minute: vectors swapped in one loaded context, against a model loaded for each.

The same model, prompts, vectors and probe on all sides: log-probabilities of a refusal's opening after each
prompt. "reloaded" is this project's own batches with the model loaded anew for every configuration, so the
difference is the loading alone. The peer is llama-cpp-python, which has one sequence a context, used well:
all cores, flash attention as here, the prompts' common beginning read once a configuration, each prompt and
the opening after it in one step, logits of the opening alone. It swaps vectors too, and "reloaded" likewise
loads the model for each. All sides must find the same numbers. What a change of configuration costs by itself
is told too. The sides take turns; medians of the repeats.
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
_OPENING = "I'm sorry, but I can't assist"
# Nats of a whole opening: batches of other sizes round otherwise (0.13 seen without AMX), and without the
# vector, or with another one, some opening differs by two.
_TOLERANCE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--configurations", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    path = file_to_load(models.pull(models.DEFAULT))  # the same for all sides
    model = LlamaModel(path, n_threads=options.threads)
    pool = [p for p in prompts.grid(["sensitive", "harmful"]) if p.split == "tune"]
    asked = prompts.stratified(pool, options.prompts, seed=0)
    opening = model.tokenize(_OPENING)
    pairs = [(tokens, opening) for tokens in chat_tokens(model, asked)]
    rng = np.random.default_rng(0)
    tried: list[Directions] = [
        {layer: rng.standard_normal(model.n_embd).astype(np.float32) * 0.05 for layer in range(8, 16)}
        for _ in range(options.configurations)
    ]
    peer = open_peer(path, options.threads)
    sides: dict[str, Callable[[Directions], NDArray[np.float64]]] = {
        "swapped": lambda directions: probe(model, directions, pairs),
        "reloaded": lambda directions: reloaded(path, options.threads, directions, pairs),
        "llama-cpp-python, swapped": lambda directions: peer_probe(peer, directions, pairs),
        "llama-cpp-python, reloaded": lambda directions: peer_reloaded(
            path, options.threads, directions, pairs
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for repeat in range(options.repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            found[name] = np.stack([sides[name](directions) for directions in tried])
            seconds[name].append(time.perf_counter() - start)
            rate = 60 * len(tried) / seconds[name][-1]
            print(f"{name:<26} {rate:6.1f} configurations/min", flush=True)
    for name in list(sides)[1:]:
        largest = np.abs(found[name] - found["swapped"]).max()
        if largest > _TOLERANCE:
            raise SystemExit(f"{name} finds other log-probabilities, by up to {largest:.3f} nats")
        ratio = statistics.median(seconds[name]) / statistics.median(seconds["swapped"])
        print(f"swapped probes {ratio:.2f} times as many configurations as {name}")
    swap, load = changes(model, tried[0]), loading(path, options.threads)
    print(f"a change alone: {1e3 * swap:.2f} ms swapped, {1e3 * load:.0f} ms loaded, {load / swap:.0f} times")


def probe(model: LlamaModel, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    """Log-probability of each opening."""
    with model.steered(Steering(directions)):
        found = model.token_logprobs(pairs)
    return np.array([float(logprobs.sum()) for logprobs, _ in found])


def reloaded(path: Path, threads: int, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    with LlamaModel(path, n_threads=threads) as model:
        return probe(model, directions, pairs)


def open_peer(path: Path, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )


def peer_probe(llama: llama_cpp.Llama, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
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
    found = []
    for prompt, opening in pairs:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llama.ctx), 0, shared, -1)
        tokens = [*prompt[shared:], *opening[:-1]]
        batch.n_tokens = len(tokens)
        first = len(tokens) - len(opening)  # the prompt's last token, which predicts the opening's first
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, shared + i, i >= first
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(llama.ctx, batch) != 0:
            raise SystemExit("llama-cpp-python could not decode")
        total = 0.0
        for i, wanted in enumerate(opening, start=first):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, i), (llama.n_vocab(),))
            top = float(logits.max())
            total += float(logits[wanted]) - top - float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
        found.append(total)
    llama_cpp.llama_batch_free(batch)
    return np.array(found)


def peer_reloaded(path: Path, threads: int, directions: Directions, pairs: Pairs) -> NDArray[np.float64]:
    llama = open_peer(path, threads)
    found = peer_probe(llama, directions, pairs)
    llama.close()
    return found


def changes(model: LlamaModel, directions: Directions, times: int = 50) -> float:
    """Seconds of putting a vector on the loaded model and taking it off."""
    start = time.perf_counter()
    for _ in range(times):
        with model.steered(Steering(directions)):
            pass
    return (time.perf_counter() - start) / times


def loading(path: Path, threads: int, times: int = 3) -> float:
    """Seconds of loading the model, its file in the page cache."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        LlamaModel(path, n_threads=threads).close()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
