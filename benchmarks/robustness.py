"""Measure whether an adapter or vector keeps its effect in contexts that its fit did not have.

The model answers validation prompts of each kind, unsteered and steered. It does so without a context and in
each context of `rs-export eval --contexts` (docs/eval.md). The prompts of the grid in other languages are
asked too. Prints a table in Markdown; `--json` writes the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation.comparison import compare, compare_in_contexts
from rs_gguf.evaluation.condition import SteeredModel
from rs_gguf.judges.registry import open_judge_spec
from rs_gguf.models import resolve as models
from rs_gguf.prompts import contexts, grid
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import SetRecord, Share
from rs_gguf.records.rows import write_json
from rs_gguf.steering import file as steering_file

PUBLISHED = Path(__file__).parent.parent / "vectors" / "qwen2.5-coder-0.5b-remove" / "remove-adapter.gguf"
LANGUAGES = "prompts in other languages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", type=Path, nargs="?", default=PUBLISHED, help="vector or adapter, at scale 1.0"
    )
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each kind in each context")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of an answer")
    names = [context.name for context in contexts.evaluation()]
    parser.add_argument("--context", action="append", choices=names, help="only this context; repeatable")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    validation = [p for p in grid.grid() if p.split == "validation"]
    size = options.prompts
    english = grid.of_each_kind([p for p in validation if p.language == "en"], size, seed=0)
    others = grid.of_each_kind([p for p in validation if p.language != "en"], size, seed=0)
    asking = Asking(None, options.tokens)
    with (
        LlamaModel(models.resolve(options.model)) as model,
        open_judge_spec(None, loaded=model) as judge,
        Progress() as progress,
    ):
        chat = ChatFormat.of(model)
        chosen = [c for c in contexts.named(options.context or ["all"]) if c.suits(chat)]
        source = SteeredModel(model, steering_file.read(options.file).steering(options.file))
        n = sum(map(len, english.values())) * (1 + len(chosen)) + sum(map(len, others.values()))
        task = progress.add_task("Answers", total=2 * n)

        def advance(count: int) -> None:
            progress.advance(task, count)

        (measured,) = compare_in_contexts(source, judge, english, asking, chosen, advance=advance)
        (foreign,) = compare(source, judge, others, asking, advance=advance)
    rows: dict[str, dict[str, Any]] = {
        context.name: {
            kind: measured["sets"][kind if context is contexts.PLAIN else f"{kind}, {context.name}"]
            for kind in KINDS
        }
        for context in (contexts.PLAIN, *chosen)
    }
    rows[LANGUAGES] = {kind: foreign["sets"][kind] for kind in KINDS}
    print(table(rows))
    if options.json:
        write_json(options.json, {"file": options.file.name, "prompts": options.prompts, "contexts": rows})


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of transitions, with explicit refusals unsteered and steered."""
    lines = [
        "| context | explicit, sensitive | sensitive opened | explicit, harmful | harmful kept "
        "| benign closed | broken, all kinds |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, figures in rows.items():
        sensitive, harmful, benign = (SetRecord.model_validate(figures[kind]) for kind in KINDS)
        broken = [one.broken for one in (sensitive, harmful, benign) if one.broken]
        cells = [
            explicit(sensitive), of(sensitive.opened), explicit(harmful), of(harmful.kept), of(benign.closed),
            f"{sum(share.n for share in broken)} of {sum(share.of for share in broken)}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def explicit(one: SetRecord) -> str:
    return f"{one.outcomes_unsteered.explicit} → {one.outcomes_steered.explicit}"


def of(share: Share | None) -> str:
    return "–" if share is None else f"{share.n} of {share.of}"


if __name__ == "__main__":
    main()
