"""Measure the judge's speed and variants, print the tables of docs/judge.md and docs/lab, and fit a probe.

speed: judgements/s of this project's batches against label words read by llama-cpp-python, with the same
model, labelled test pairs and tokens. The peer has one sequence per context and gets good conditions. Its
tokens are prepared before, and it keeps one context on all cores with flash attention. It reads the few-shot
text once for all pairs and computes logits of the last token only. (`create_chat_completion(logprobs=True)`
computes them for every token.) The judges take turns. The number of correct verdicts is printed too, since a
fast judge must also be accurate. So is the CPU time, for busy machines.

variants: other inputs of a probe, compared on calibration pairs that were left out of its fit.

tables: the results of `rs-export judge --agreement` for several judges in Markdown, with the first one's
errors.

fit: fit the probe for the default model, or for another one, on the labelled pairs, and write it to a file.
The shipped probes are `rs_gguf/data/judges/MODEL.safetensors`.
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
    agreement,
    cross_validate,
    fit_probe,
    platt,
    principal_components,
)
from rs_gguf.judges.judge import by_rule
from rs_gguf.judges.local import LabelJudge
from rs_gguf.judges.pairs import LabelledPair, held_out_pairs, labelled_pairs
from rs_gguf.judges.probe import read_states, save_probe
from rs_gguf.judges.registry import Judge, Judgement, Pair, open_judge
from rs_gguf.judges.rubric import verdict_tokens
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load

Rows = Sequence[Sequence[object]]

# Variants of the judge's text: fewer of the eight examples, or a question at the end.
WORDINGS: dict[str, dict[str, Any]] = {
    "four examples": {"_EXAMPLES": rubric._EXAMPLES[:4]},
    "a question before the verdict": {
        "_VERDICT": "\nDoes the reply give what the request asked for? Verdict:"
    },
}
# Pairs of words for the verdict: for a refusal and for an answer.
LABELS = ((" refusal", " answer"), (" declined", " answered"), (" no", " yes"), (" evasive", " helpful"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--pairs", type=int, default=32)
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--threads", type=int, default=usable_cores())
    speed.set_defaults(run=measure_speed)
    commands.add_parser("variants").set_defaults(run=compare_variants)
    tables = commands.add_parser("tables")
    tables.add_argument("files", nargs="+", type=Path)
    tables.set_defaults(run=print_tables)
    fit = commands.add_parser("fit")
    fit.add_argument("output", type=Path)
    fit.add_argument("--model", default=models.DEFAULT)
    fit.set_defaults(run=write_probe)
    options = parser.parse_args(sys.argv[1:] or ["speed"])  # `make bench` gives no arguments
    options.run(options)


def measure_speed(options: argparse.Namespace) -> None:
    path = models.pull(models.DEFAULT)
    pool = [p for p in held_out_pairs() if by_rule(p.prompt, p.answer) is None]
    pairs = pool[:: max(1, len(pool) // options.pairs)][: options.pairs]
    ours = LlamaModel(path, n_threads=options.threads)
    sequences = [verdict_tokens(ours, (pair.prompt, pair.answer)) for pair in pairs]
    peer = llama_cpp.Llama(
        str(file_to_load(path)),  # the file that `ours` loads
        n_ctx=max(map(len, sequences)), n_threads=options.threads, n_threads_batch=options.threads,
        flash_attn=True, verbose=False,
    )  # fmt: skip
    embedded, labels = open_judge(ours), LabelJudge(ours)
    judges: dict[str, Callable[[], list[float | None]]] = {
        "embedded": lambda: judged(embedded, pairs),
        "label words": lambda: judged(labels, pairs),
        "peer": lambda: read_by_peer(peer, sequences),
    }
    wall: dict[str, list[float]] = {name: [] for name in judges}
    cpu: dict[str, list[float]] = {name: [] for name in judges}
    for repeat in range(options.repeats):
        for name in list(judges) if repeat % 2 == 0 else reversed(list(judges)):
            start, cpu_start = time.perf_counter(), time.process_time()
            confidences = judges[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
            n_correct = sum(
                c is not None and (c > 0) == p.refusal for c, p in zip(confidences, pairs, strict=True)
            )
            print(
                f"{name:<12} {len(pairs) / wall[name][-1]:6.2f} judgements/s, "
                f"{cpu[name][-1] / len(pairs):6.2f} CPU s each  ({n_correct} of {len(pairs)} correct)",
                flush=True,
            )
    for name in ("embedded", "label words"):
        ratios = [statistics.median(times["peer"]) / statistics.median(times[name]) for times in (wall, cpu)]
        print(
            f"{name} is {ratios[0]:.1f} times as fast, with {ratios[1]:.1f} times less CPU time "
            f"(medians of {options.repeats})"
        )


def judged(judge: Judge, pairs: list[LabelledPair]) -> list[float | None]:
    judgements = dict(judge.judge([(pair.prompt, pair.answer) for pair in pairs]))
    return [judgements[i].confidence for i in range(len(pairs))]


def read_by_peer(peer: llama_cpp.Llama, sequences: list[list[int]]) -> list[float | None]:
    """Return the log-odds of refusal by the first pair of words in `LABELS`."""
    refusal, answer = (peer.tokenize(word.encode(), add_bos=False)[0] for word in LABELS[0])
    shared = common_prefix(sequences)
    peer.reset()
    peer.eval(sequences[0][:shared])
    log_odds: list[float | None] = []
    for tokens in sequences:
        peer.n_tokens = shared  # `eval` removes later tokens from the cache
        peer.eval(tokens[shared:])
        logits = llama_cpp.llama_get_logits_ith(peer.ctx, -1)
        log_odds.append(logits[refusal] - logits[answer])
    return log_odds


# ---- variants ------------------------------------------------------------------------------------


class Fixed:
    """A judge that returns given confidences."""

    identity, usage = "fixed", None

    def __init__(self, name: str, confidences: Sequence[float]) -> None:
        self.name, self._confidences = name, confidences

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i in range(len(pairs)):
            yield i, Judgement(self._confidences[i], "fixed")


def compare_variants(_: argparse.Namespace) -> None:
    """Print a row per variant: fitted on the calibration pairs outside a fold, measured on those inside.

    The test split is not used.
    """
    pairs = [p for p in labelled_pairs() if p.split == "calibration" and by_rule(p.prompt, p.answer) is None]
    texts = [(pair.prompt, pair.answer) for pair in pairs]
    model = LlamaModel(models.pull(models.DEFAULT))
    layers = list(range(8, 19))
    states = read(model, texts, layers)
    shipped = [layers.index(layer) for layer in (10, 12, 14, 16)]
    print("| variant | AUROC | accuracy | log loss | deflection | different question | empty | nonsense |")
    print("| --- " * 8 + "|")
    shipped_states = states[:, :, shipped]
    row("verdict's place and reply's mean, layers 10, 12, 14, 16 (shipped)", shipped_states, pairs)
    row("verdict's place alone", shipped_states[:, :1], pairs)
    row("reply's mean alone", shipped_states[:, 1:], pairs)
    for subset in ((8, 10, 12, 14), (12, 14, 16, 18), (14,), tuple(layers)):
        name = f"layers {', '.join(map(str, subset))}" if len(subset) > 1 else f"layer {subset[0]}"
        row(name, states[:, :, [layers.index(layer) for layer in subset]], pairs)
    log_odds = label_log_odds(model, texts)
    row("log-odds of the label words, scaled", log_odds[:, :1], pairs)
    row("log-odds of four pairs of words, averaged, scaled", log_odds.mean(axis=1, keepdims=True), pairs)
    for name, patch in WORDINGS.items():
        rubric._few_shot.cache_clear()
        with mock.patch.multiple(rubric, **patch):
            row(name, read(model, texts, [layers[k] for k in shipped]), pairs)
        rubric._few_shot.cache_clear()


def read(model: LlamaModel, texts: Sequence[tuple[str, str]], layers: Sequence[int]) -> Float64:
    """Return the hidden states [N, 2, L, D] of every pair."""
    states = np.empty((len(texts), 2, len(layers), model.n_embd), dtype=np.float64)
    for i, pair_states in read_states(model, texts, layers):
        states[i] = pair_states
    return states


def label_log_odds(model: LlamaModel, texts: Sequence[tuple[str, str]]) -> Float64:
    """Return the log-odds [N, W] of refusal by each of the W word pairs in `LABELS`, read in one pass."""
    log_odds = np.empty((len(texts), len(LABELS)), dtype=np.float64)
    words = [[model.tokenize(word, special=False)[0] for word in labels] for labels in LABELS]
    for i, logits in model.next_logits([verdict_tokens(model, text) for text in texts]):
        log_odds[i] = [logits[refusal] - logits[answer] for refusal, answer in words]
    return log_odds


def row(name: str, states: Float64, pairs: Sequence[LabelledPair]) -> None:
    """Print the agreement of a probe on states [N, …] with the labels of pairs outside its fit."""
    refusal = np.array([pair.refusal for pair in pairs])
    with threadpool_limits(1):
        features = principal_components(states).of(states)
        _, values = cross_validate(features, refusal, np.array([pair.prompt for pair in pairs]))
        share = platt(values, refusal).predict_proba(values[:, np.newaxis])[:, 1]
    figures = agreement(Fixed(name, 2 * share - 1), pairs)
    label_probability = np.where(refusal, share, 1 - share)
    categories = [
        figures["by_category"][k]["accuracy"]
        for k in ("deflection", "different_question", "empty", "nonsense")
    ]
    scores = [figures["auroc"], figures["accuracy"], float(-np.log(label_probability).mean())]
    columns = [*(f"{score:.3f}" for score in scores), *(f"{accuracy:.2f}" for accuracy in categories)]
    print(table_row([name, *columns]), flush=True)


# ---- fit -----------------------------------------------------------------------------------------


def write_probe(options: argparse.Namespace) -> None:
    with LlamaModel(models.resolve(options.model)) as model:
        save_probe(fit_probe(model, labelled_pairs()), options.output)


# ---- tables --------------------------------------------------------------------------------------


def print_tables(options: argparse.Namespace) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    names = [report["judge"] for report in reports]
    scores = ("auroc", "accuracy", "expected_calibration_error")
    print_table(
        ["judge", "n", "AUROC", "accuracy at 0", "expected calibration error", "not judged"],
        [
            [report["judge"], report["n"], *(f"{report[k]:.3f}" for k in scores), report["unparseable"]]
            for report in reports
        ],
    )
    for title, key in (("category", "by_category"), ("language", "by_language"), ("source", "by_source")):
        values = sorted(reports[0][key], key=lambda value: -reports[0][key][value]["n"])
        print_table(
            [title, "n", *names],
            [
                [value, reports[0][key][value]["n"], *(share(report[key], value) for report in reports)]
                for value in values
            ],
        )
    print_validation(reports)
    misses = sorted(reports[0]["misses"], key=lambda miss: (miss["category"], -abs(miss["confidence"])))
    print_table(
        ["expected", "got", "language", "request", "reply"],
        [
            [m["category"], f"{m['confidence']:.2f}", m["language"], cell(m["prompt"]), cell(m["answer"])]
            for m in misses
        ],
    )


def print_validation(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print how often each judge gives the labelled class to answers that no judge was fitted on."""
    outcomes = [report["outcomes"] for report in reports]
    rows: list[list[object]] = [
        [name.replace("_", " "), outcomes[0][name]["of"], *(rate(o[name]) for o in outcomes)]
        for name in ("accuracy", "outcome_accuracy", "harmful_compliance_recall")
    ]
    for outcome in ("explicit", "refuses"):
        for name in ("sensitivity", "specificity"):
            rates = [o["rates"][outcome][name] for o in outcomes]
            rows.append([f"{outcome}: {name}", "judged", *map(rate, rates)])  # n differs by judge
    for group, values in outcomes[0]["by"].items():
        rows += [
            [f"{group}: {value}", of["of"], *(rate(o["by"][group][value]) for o in outcomes)]
            for value, of in values.items()
        ]
    print_table(["validation answers", "n", *(report["judge"] for report in reports)], rows)


def rate(figure: Mapping[str, Any]) -> str:
    return f"{figure['n'] / figure['of']:.2f}" if figure["of"] else "—"


def share(group: Mapping[str, Mapping[str, float]], value: str) -> str:
    return f"{group[value]['accuracy']:.2f}" if value in group else "—"


def cell(text: str, limit: int = 160) -> str:
    """Return a text as one line for a Markdown table, with all markup escaped."""
    text = " ".join(text.split())
    text = text if len(text) <= limit else text[:limit].rstrip() + " …"
    return "".join("\\" + c if c in "|\\`*_<>[]#~&" else c for c in text)


def print_table(head: Sequence[str], rows: Rows) -> None:
    print("\n" + "\n".join([table_row(head), "| --- " * len(head) + "|", *map(table_row, rows)]))


def table_row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
