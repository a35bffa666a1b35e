"""Measure whether an adapter or vector keeps its effect in contexts that its fit did not have.

The model answers validation prompts of each kind, unsteered and steered. It does so without a context and in
each context of `rs-export eval --contexts` (docs/eval.md). The prompts of the grid in other languages are
asked too. Prints a table in Markdown, row by row; `--json` writes the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation.comparison import compare
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
HEAD = (
    "| context | explicit, sensitive | sensitive opened | explicit, harmful | harmful kept | benign closed "
    "| broken, all kinds |\n"
    "| --- | --- | ---: | --- | ---: | ---: | ---: |"
)


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
    about = {"file": options.file.name, "prompts": options.prompts, "tokens": options.tokens}
    figures: dict[str, dict[str, Any]] = {}
    with (
        LlamaModel(models.resolve(options.model)) as model,
        open_judge_spec(None, loaded=model) as judge,
        # Rich would print the rows of a redirected stdout to stderr.
        Progress(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress,
    ):
        chat = ChatFormat.of(model)
        chosen = [c for c in contexts.named(options.context or ["all"]) if c.suits(chat)]
        asked = {c.name: (english, asking.within(c)) for c in (contexts.PLAIN, *chosen)}
        asked[LANGUAGES] = others, asking
        source = SteeredModel(model, steering_file.read(options.file).steering(options.file))
        n = sum(len(prompts) for sets, _ in asked.values() for prompts in sets.values())
        task = progress.add_task("Answers", total=2 * n)

        def advance(count: int) -> None:
            progress.advance(task, count)

        print(HEAD)
        for name, (sets, how) in asked.items():
            (found,) = compare(source, judge, sets, how, divergence=False, advance=advance)
            figures[name] = found["sets"]
            print(row(name, figures[name]), flush=True)
            if options.json:  # after each, so that a killed run leaves what it measured
                write_json(options.json, {**about, "contexts": figures})


def row(name: str, figures: Mapping[str, Any]) -> str:
    """Return a row of a Markdown table: transitions, and explicit refusals unsteered and steered."""
    sensitive, harmful, benign = (SetRecord.model_validate(figures[kind]) for kind in KINDS)
    broken = [one.broken for one in (sensitive, harmful, benign) if one.broken]
    cells = [
        name, explicit(sensitive), of(sensitive.opened), explicit(harmful), of(harmful.kept),
        of(benign.closed),
        f"{sum(share.n for share in broken)} of {sum(share.of for share in broken)}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def explicit(one: SetRecord) -> str:
    return f"{one.outcomes_unsteered.explicit} → {one.outcomes_steered.explicit}"


def of(share: Share | None) -> str:
    return "–" if share is None else f"{share.n} of {share.of}"


if __name__ == "__main__":
    main()
