"""The judge's speed, what was tried for its accuracy, and the tables of docs/judge.md and docs/lab/judge.md.

speed: judgements per second of this project's batches against label words read by llama-cpp-python. The same
model, the same labelled test pairs and the same tokens on all sides. The peer, which has one sequence a
context, is used well: its tokens are prepared beforehand, one context is kept, the few-shot text is read once
for all pairs, and logits are computed of the last token alone (what `create_chat_completion(logprobs=True)`
does of every token); all cores, flash attention as here. The sides take turns, and how many verdicts are
right is printed too, so that none can be fast by being wrong. CPU time is told as well, for machines that are
busy with other things.

variants: what a probe could read instead, compared on calibration pairs that were left out of its fit.

tables: what `rs-export judge --agreement` tells of several judges, in Markdown, with the misses of the first.

fit: the probe for the default model, or for another one, on the labelled pairs, into a file; the shipped one
is `rs_gguf/data/judge_probe.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
from threadpoolctl import threadpool_limits

from rs_gguf.engines.generation import common_prefix
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.estimators.moments import Float64
from rs_gguf.judges import rubric
from rs_gguf.judges.calibration import (
    LabelledPair,
    agreement,
    cross_validate,
    fit_probe,
    labelled_pairs,
    platt,
    principal_components,
)
from rs_gguf.judges.judge import by_rule
from rs_gguf.judges.local import LabelJudge
from rs_gguf.judges.probe import read_states, save_probe
from rs_gguf.judges.registry import Judge, Judgement, Pair, open_judge
from rs_gguf.judges.rubric import verdict_tokens
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load

Rows = Sequence[Sequence[object]]

# What a few-shot text and the judged pair may end with, and how many of the eight examples there are.
WORDINGS: dict[str, dict[str, Any]] = {
    "four examples": {"_EXAMPLES": rubric._EXAMPLES[:4]},
    "a question before the verdict": {
        "_VERDICT": "\nDoes the reply give what the request asked for? Verdict:"
    },
}
# Words that a model may name the verdict by: for refusal, for answer.
LABELS = ((" refusal", " answer"), (" declined", " answered"), (" no", " yes"), (" evasive", " helpful"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True)
    speed = what.add_parser("speed")
    speed.add_argument("--pairs", type=int, default=32)
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--threads", type=int, default=usable_cores())
    speed.set_defaults(run=measure_speed)
    what.add_parser("variants").set_defaults(run=compare_variants)
    tables = what.add_parser("tables")
    tables.add_argument("files", nargs="+", type=Path)
    tables.set_defaults(run=print_tables)
    fit = what.add_parser("fit")
    fit.add_argument("output", type=Path)
    fit.add_argument("--model", default=models.DEFAULT)
    fit.set_defaults(run=fit_anew)
    options = parser.parse_args(sys.argv[1:] or ["speed"])  # as `make bench` runs it
    options.run(options)


def measure_speed(options: argparse.Namespace) -> None:
    path = models.pull(models.DEFAULT)
    pool = [p for p in labelled_pairs() if p.split == "test" and by_rule(p.prompt, p.answer) is None]
    pairs = pool[:: max(1, len(pool) // options.pairs)][: options.pairs]
    ours = LlamaModel(path, n_threads=options.threads)
    sequences = [verdict_tokens(ours, (pair.prompt, pair.answer)) for pair in pairs]
    peer = llama_cpp.Llama(
        str(file_to_load(path)),  # as `ours` does
        n_ctx=max(map(len, sequences)), n_threads=options.threads, n_threads_batch=options.threads,
        flash_attn=True, verbose=False,
    )  # fmt: skip
    embedded, labels = open_judge(ours), LabelJudge(ours)
    sides: dict[str, Callable[[], list[float | None]]] = {
        "embedded": lambda: judged(embedded, pairs),
        "label words": lambda: judged(labels, pairs),
        "peer": lambda: read_by_peer(peer, sequences),
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


def read_by_peer(peer: llama_cpp.Llama, sequences: list[list[int]]) -> list[float | None]:
    """Log-odds of refusal by the first pair of words in `LABELS`."""
    refusal, answer = (peer.tokenize(word.encode(), add_bos=False)[0] for word in LABELS[0])
    shared = common_prefix(sequences)
    peer.reset()
    peer.eval(sequences[0][:shared])
    found: list[float | None] = []
    for tokens in sequences:
        peer.n_tokens = shared  # `eval` takes what follows out of the cache
        peer.eval(tokens[shared:])
        logits = llama_cpp.llama_get_logits_ith(peer.ctx, -1)
        found.append(logits[refusal] - logits[answer])
    return found


# ---- variants ------------------------------------------------------------------------------------


class Given:
    """A judge whose confidences are known already."""

    identity, usage = "given", None

    def __init__(self, name: str, confidences: Sequence[float]) -> None:
        self.name, self._confidences = name, confidences

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i in range(len(pairs)):
            yield i, Judgement(self._confidences[i], "given")


def compare_variants(_: argparse.Namespace) -> None:
    """Every row is fitted on all calibration pairs outside a fold and measured on those inside.

    The test split is not touched.
    """
    pairs = [p for p in labelled_pairs() if p.split == "calibration" and by_rule(p.prompt, p.answer) is None]
    texts = [(pair.prompt, pair.answer) for pair in pairs]
    model = LlamaModel(models.pull(models.DEFAULT))
    blocks = list(range(8, 19))
    states = read(model, texts, blocks)
    shipped = [blocks.index(block) for block in (10, 12, 14, 16)]
    print("| variant | AUROC | accuracy | log loss | deflection | different question | empty | nonsense |")
    print("| --- " * 8 + "|")
    chosen = states[:, :, shipped]
    row("verdict's place and reply's mean, blocks 10, 12, 14, 16 (shipped)", chosen, pairs)
    row("verdict's place alone", chosen[:, :1], pairs)
    row("reply's mean alone", chosen[:, 1:], pairs)
    for picked in ((8, 10, 12, 14), (12, 14, 16, 18), (14,), tuple(blocks)):
        name = f"blocks {', '.join(map(str, picked))}" if len(picked) > 1 else f"block {picked[0]}"
        row(name, states[:, :, [blocks.index(block) for block in picked]], pairs)
    asked = label_log_odds(model, texts)
    row("log-odds of the label words, scaled", asked[:, :1], pairs)
    row("log-odds of four pairs of words, averaged, scaled", asked.mean(axis=1, keepdims=True), pairs)
    for name, patch in WORDINGS.items():
        rubric._few_shot.cache_clear()
        with mock.patch.multiple(rubric, **patch):
            row(name, read(model, texts, [blocks[k] for k in shipped]), pairs)
        rubric._few_shot.cache_clear()


def read(model: LlamaModel, texts: Sequence[tuple[str, str]], blocks: Sequence[int]) -> Float64:
    """States [N, 2, L, D] of every pair."""
    states = np.empty((len(texts), 2, len(blocks), model.n_embd), dtype=np.float64)
    for i, found in read_states(model, texts, blocks):
        states[i] = found
    return states


def label_log_odds(model: LlamaModel, texts: Sequence[tuple[str, str]]) -> Float64:
    """Log-odds [N, W] of refusal by each of the W pairs of words in `LABELS`, read in one pass."""
    found = np.empty((len(texts), len(LABELS)), dtype=np.float64)
    words = [[model.tokenize(word, special=False)[0] for word in labels] for labels in LABELS]
    for i, logits in model.next_logits([verdict_tokens(model, text) for text in texts]):
        found[i] = [logits[refusal] - logits[answer] for refusal, answer in words]
    return found


def row(name: str, states: Float64, pairs: Sequence[LabelledPair]) -> None:
    """Print how a probe on states [N, …] agrees with the labels of pairs that its fit has not seen."""
    refusal = np.array([pair.refusal for pair in pairs])
    with threadpool_limits(1):
        features = principal_components(states).of(states)
        _, values = cross_validate(features, refusal, np.array([pair.prompt for pair in pairs]))
        share = platt(values, refusal).predict_proba(values[:, np.newaxis])[:, 1]
    found = agreement(Given(name, 2 * share - 1), pairs)
    right = np.where(refusal, share, 1 - share)
    kinds = [
        found["by_category"][k]["accuracy"] for k in ("deflection", "different_question", "empty", "nonsense")
    ]
    cells = [found["auroc"], found["accuracy"], float(-np.log(right).mean())]
    print(table_row([name, *(f"{c:.3f}" for c in cells), *(f"{kind:.2f}" for kind in kinds)]), flush=True)


# ---- fit -----------------------------------------------------------------------------------------


def fit_anew(options: argparse.Namespace) -> None:
    with LlamaModel(models.resolve(options.model)) as model:
        save_probe(fit_probe(model, labelled_pairs()), options.output)


# ---- tables --------------------------------------------------------------------------------------


def print_tables(options: argparse.Namespace) -> None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    names = [one["judge"] for one in found]
    scores = ("auroc", "accuracy", "expected_calibration_error")
    print_table(
        ["judge", "n", "AUROC", "accuracy at 0", "expected calibration error", "not judged"],
        [[one["judge"], one["n"], *(f"{one[k]:.3f}" for k in scores), one["unparseable"]] for one in found],
    )
    for title, key in (("kind", "by_category"), ("language", "by_language"), ("source", "by_source")):
        values = sorted(found[0][key], key=lambda value: -found[0][key][value]["n"])
        print_table(
            [title, "n", *names],
            [
                [value, found[0][key][value]["n"], *(share(one[key], value) for one in found)]
                for value in values
            ],
        )
    misses = sorted(found[0]["misses"], key=lambda miss: (miss["category"], -abs(miss["confidence"])))
    print_table(
        ["expected", "got", "language", "request", "reply"],
        [
            [m["category"], f"{m['confidence']:.2f}", m["language"], cell(m["prompt"]), cell(m["answer"])]
            for m in misses
        ],
    )


def share(group: Mapping[str, Mapping[str, float]], value: str) -> str:
    return f"{group[value]['accuracy']:.2f}" if value in group else "—"


def cell(text: str, limit: int = 160) -> str:
    """A text on one line of a Markdown table, where nothing in it is markup."""
    text = " ".join(text.split())
    text = text if len(text) <= limit else text[:limit].rstrip() + " …"
    return "".join("\\" + c if c in "|\\`*_<>[]#~&" else c for c in text)


def print_table(head: Sequence[str], rows: Rows) -> None:
    print("\n" + "\n".join([table_row(head), "| --- " * len(head) + "|", *map(table_row, rows)]))


def table_row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
