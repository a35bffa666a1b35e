"""Count the outcomes that change without any steering, where attention is only computed otherwise.

The unsteered model answers validation prompts with flash attention and without, and with caches of other
types. These are choices that users make, and their sums round otherwise. Prints a table in Markdown; `--json`
writes the figures.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

from rich.progress import Progress

from rs_gguf.engines.answers import Advance, answer_all
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.settings import EngineSettings
from rs_gguf.evaluation.condition import JudgedAnswers, judge_answers
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.judges.registry import Judge, open_judge_spec
from rs_gguf.models import resolve as models
from rs_gguf.prompts import grid
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.rows import write_json

SETTINGS = {
    "default": EngineSettings(),
    "without flash attention": EngineSettings().reordered,
    "bf16 cache": EngineSettings(cache_type_k="bf16", cache_type_v="bf16"),
    "q8_0 cache": EngineSettings(cache_type_k="q8_0", cache_type_v="q8_0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--prompts", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    path = models.resolve(options.model)
    validation = [p for p in grid.grid() if p.split == "validation"]
    prompts = [*chain.from_iterable(grid.of_each_kind(validation, options.prompts, seed=0).values())]
    with LlamaModel(path) as plain, open_judge_spec(None, loaded=plain) as judge, Progress() as progress:
        task = progress.add_task("Answers", total=len(SETTINGS) * len(prompts))
        answered = {
            name: answers_under(
                path, settings, prompts, options.tokens, judge, lambda n: progress.advance(task, n)
            )
            for name, settings in SETTINGS.items()
        }
    before = answered.pop("default")
    figures = {name: PairedEvaluation(prompts, before, after).by_kind() for name, after in answered.items()}
    print("| unsteered | prompts | other text | refused before: kept | now refused | broken |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, sets in figures.items():
        pairs = zip(prompts, before.answers, answered[name].answers, strict=True)
        other = [p.kind for p, a, b in pairs if a.text != b.text]
        for kind, one in sets.items():
            shares = " | ".join(f"{s.n} of {s.of}" for s in (one.kept, one.closed, one.broken) if s)
            n_other = sum(of == kind for of in other)
            print(f"| {name} | {kind} | {n_other} of {one.n} | {shares} |")
    if options.json:
        rows = {
            name: {kind: one.model_dump(mode="json") for kind, one in s.items()}
            for name, s in figures.items()
        }
        write_json(options.json, rows)


def answers_under(
    path: Path, settings: EngineSettings, prompts: list[Prompt], tokens: int, judge: Judge, advance: Advance
) -> JudgedAnswers:
    """Return judged answers of the unsteered model, loaded with these settings."""
    with LlamaModel(path, settings=settings) as model:
        answers, _ = answer_all(model, prompts, NO_STEERING, Asking(None, tokens), advance)
    return JudgedAnswers(answers, judge_answers(judge, prompts, answers))


if __name__ == "__main__":
    main()
