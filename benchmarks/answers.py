"""Measure answers per second: this project's batches against llama-cpp-python, one answer at a time.

The peer gets good conditions: the same file and threads, one context that it keeps, and flash attention. It
decodes greedily, with its prompt cache for the shared system prompt. Both answer the same prompts. The order
alternates after a first answer of each, which is not timed. Prints prompts/s and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import llama_cpp

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load
from rs_gguf.prompts import grid as prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    path, threads = file_to_load(models.pull(models.DEFAULT)), usable_cores()  # both load the same file
    pool = [p for p in prompts.grid() if p.split == "fit" and p.language == "en"]
    sample = prompts.stratified(pool, options.prompts, seed=1)
    ours = LlamaModel(path, n_threads=threads)
    peer = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )
    tokens = chat_tokens(ours, sample)
    seconds: dict[str, list[float]] = {"batched": [], "one at a time": []}

    def batched(first: int) -> int:
        return sum(len(a.tokens) for _, a in ours.generate(tokens[first:], max_tokens=options.tokens))

    def one_at_a_time(first: int) -> int:
        count = 0
        for prompt in sample[first:]:
            message = [{"role": "user", "content": prompt.prompt}]
            answer = peer.create_chat_completion(message, max_tokens=options.tokens, temperature=0.0)
            count += answer["usage"]["completion_tokens"]
        return count

    methods = [("batched", batched), ("one at a time", one_at_a_time)]
    for _, method in methods:
        method(len(sample) - 1)
    for repeat in range(options.repeats):
        for name, method in methods if repeat % 2 == 0 else methods[::-1]:
            start = time.perf_counter()
            count = method(0)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<14} {len(sample) / seconds[name][-1]:6.2f} prompts/s  ({count} tokens)")
    ratio = statistics.median(seconds["one at a time"]) / statistics.median(seconds["batched"])
    print(f"batched is {ratio:.2f} times as fast (medians of {options.repeats})")


if __name__ == "__main__":
    main()
