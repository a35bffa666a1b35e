"""Measure answers per second: this project's batches against llama-cpp-python, one answer at a time.

The peer gets good conditions: the same file and threads, one context that it keeps, and flash attention. It
decodes greedily, with its prompt cache for the shared system prompt. Both answer the same prompts. The order
alternates after a first answer of each, which is not timed. Prints prompts/s and the ratio of the medians.

With `--drafts`, steered answers that begin from the unsteered ones take turns with plain decoding instead.
For each kind of prompt, a table has the share of draft tokens that the steered model draws too. It also
counts the answers that differ from plain decoding: with drafts, and in another order (near ties).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import llama_cpp

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering
from rs_gguf.engines.generation import common_prefix
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load
from rs_gguf.prompts import grid as prompts
from rs_gguf.records.conversation import KINDS, Prompt

ADAPTER = Path(__file__).parents[1] / "vectors" / "qwen2.5-coder-0.5b-remove" / "remove-adapter.gguf"
Answers = Mapping[int, Sequence[int]]  # tokens by the index of the prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--drafts", action="store_true", help="time steered answers with and without drafts")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="of the steered answers")
    options = parser.parse_args()
    pool = [p for p in prompts.grid() if p.split == "fit" and p.language == "en"]
    sample = prompts.stratified(pool, options.prompts, seed=1)
    path, threads = file_to_load(models.pull(models.DEFAULT)), usable_cores()  # both load the same file
    with LlamaModel(path, n_threads=threads) as ours:
        if options.drafts:
            with_drafts(ours, sample, options)
        else:
            beside_peer(ours, sample, options, path, threads)


def beside_peer(
    ours: LlamaModel, sample: Sequence[Prompt], options: argparse.Namespace, path: Path, threads: int
) -> None:
    peer = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )
    tokens = chat_tokens(ours, sample)

    def batched(first: int) -> int:
        return sum(len(a.tokens) for _, a in ours.generate(tokens[first:], max_tokens=options.tokens))

    def one_at_a_time(first: int) -> int:
        count = 0
        for prompt in sample[first:]:
            message = [{"role": "user", "content": prompt.prompt}]
            answer = peer.create_chat_completion(message, max_tokens=options.tokens, temperature=0.0)
            count += answer["usage"]["completion_tokens"]
        return count

    for method in (batched, one_at_a_time):
        method(len(sample) - 1)
    methods = {"batched": lambda: batched(0), "one at a time": lambda: one_at_a_time(0)}
    print_ratio(methods, len(sample), options.repeats)


def with_drafts(model: LlamaModel, sample: Sequence[Prompt], options: argparse.Namespace) -> None:
    tokens = chat_tokens(model, sample)

    def answers(drafts: Sequence[Sequence[int]] = (), backwards: bool = False) -> Answers:
        asked = tokens[::-1] if backwards else tokens
        found = dict(model.generate(asked, max_tokens=options.tokens, drafts=drafts))
        return {len(found) - 1 - i if backwards else i: answer.tokens for i, answer in found.items()}

    unsteered = answers()
    drafts = [unsteered[i] for i in range(len(sample))]
    with model.steered(Steering(adapters=[(options.adapter, 1.0)])):
        plain, drafted, backwards = answers(), answers(drafts), answers(backwards=True)  # also warms up
        print("| prompts | n | drafts kept | differ | differ in another order |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for kind in KINDS:
            indices = [i for i, prompt in enumerate(sample) if prompt.kind == kind]
            kept = sum(common_prefix([drafts[i], drafted[i]]) for i in indices)
            share = kept / max(1, sum(len(drafts[i]) for i in indices))
            differ = (sum(other[i] != plain[i] for i in indices) for other in (drafted, backwards))
            print(f"| {kind} | {len(indices)} | {share:.0%} | " + " | ".join(map(str, differ)) + " |")

        def count(drafts: Sequence[Sequence[int]]) -> int:
            return sum(map(len, answers(drafts).values()))

        methods = {"from drafts": lambda: count(drafts), "plainly": lambda: count(())}
        print_ratio(methods, len(sample), options.repeats)


def print_ratio(methods: Mapping[str, Callable[[], int]], n: int, repeats: int) -> None:
    """Time two methods in turns. Each returns the tokens of its `n` answers."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats):
        for name in list(methods)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            count = methods[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<14} {n / seconds[name][-1]:6.2f} prompts/s  ({count} tokens)", flush=True)
    (first, ours), (_, others) = seconds.items()
    ratio = statistics.median(others) / statistics.median(ours)
    print(f"{first} is {ratio:.2f} times as fast (medians of {repeats})")


if __name__ == "__main__":
    main()
