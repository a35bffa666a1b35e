"""Judgements per second: this project's batches against llama-cpp-python's label log-probabilities.

The same model, the same labelled test pairs and the same few-shot text on all sides. The peer is used well:
one context that is kept, `logits_all=True` as its log-probabilities need, all cores, one token an answer, its
own prefix match reusing the few-shot part from call to call. It reads the text as the user's message, in the
chat format that its function is for. The sides take turns, and how many verdicts are right is printed too, so
that none can be fast by being wrong. CPU time is told as well, for machines that are busy with other things.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import llama_cpp

from rs_gguf import models
from rs_gguf.judges import Judge, open_judge
from rs_gguf.judging.calibration import LabelledPair, labelled_pairs
from rs_gguf.judging.endpoint import label_confidence
from rs_gguf.judging.exchange import parse_completion
from rs_gguf.judging.local import LabelJudge
from rs_gguf.judging.rubric import verdict_tokens
from rs_gguf.llama import LlamaModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    path = models.pull(models.DEFAULT)
    pool = [pair for pair in labelled_pairs() if pair.split == "test" and any(map(str.isalnum, pair.answer))]
    pairs = pool[:: max(1, len(pool) // options.pairs)][: options.pairs]
    ours = LlamaModel(path, n_threads=options.threads)
    longest = max(len(verdict_tokens(ours, (pair.prompt, pair.answer))) for pair in pairs)
    peer = llama_cpp.Llama(
        str(path), n_ctx=longest + 64, logits_all=True, n_threads=options.threads,
        n_threads_batch=options.threads, verbose=False,
    )  # fmt: skip
    embedded, labels = open_judge(ours), LabelJudge(ours)
    sides: dict[str, Callable[[], list[float | None]]] = {
        "embedded": lambda: judged(embedded, pairs),
        "label words": lambda: judged(labels, pairs),
        "peer": lambda: asked(peer, ours, pairs),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(list(sides)):
            start, cpu_start = time.perf_counter(), time.process_time()
            found = sides[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
            right = sum(c is not None and (c > 0) == p.refusal for c, p in zip(found, pairs, strict=True))
            print(
                f"{name:<12} {len(pairs) / wall[name][-1]:6.2f} judgements/s, "
                f"{cpu[name][-1] / len(pairs):6.2f} CPU s each  ({right} of {len(pairs)} right)",
                flush=True,
            )
    for name in ("embedded", "label words"):
        ratios = [statistics.median(of["peer"]) / statistics.median(of[name]) for of in (wall, cpu)]
        print(
            f"{name} is {ratios[0]:.1f} times as fast, with {ratios[1]:.1f} times less CPU time "
            f"(medians of {options.repeats})"
        )


def judged(judge: Judge, pairs: list[LabelledPair]) -> list[float | None]:
    graded = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    return [graded[i].confidence for i in range(len(pairs))]


def asked(peer: llama_cpp.Llama, ours: LlamaModel, pairs: list[LabelledPair]) -> list[float | None]:
    found = []
    for pair in pairs:
        text = ours.detokenize(verdict_tokens(ours, (pair.prompt, pair.answer)))
        answer = peer.create_chat_completion(
            [{"role": "user", "content": text}], max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20
        )
        found.append(label_confidence(parse_completion(answer)[0].tokens))
    return found


if __name__ == "__main__":
    main()
