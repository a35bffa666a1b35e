"""The `rs-export eval` command: before and after, side by side."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from rs_gguf.cli_vectors import path_and_scale

_FILE = click.Path(path_type=Path)


@click.command("eval")
@click.option("--model", required=True, metavar="M", help="GGUF file, catalogue name or hub id.")
@click.option(
    "--control-vector", "vectors", multiple=True, metavar="F[:SCALE]", help="Repeatable; they add up."
)
@click.option(
    "--layer-range", nargs=2, type=int, metavar="A B", help="Blocks that are steered, both included."
)
@click.option("--lora", "adapters", multiple=True, metavar="F[:SCALE]", help="GGUF LoRA adapter. Repeatable.")
@click.option("--system-prompt", metavar="T", help="Used on both sides.")
@click.option(
    "--prompts",
    "files",
    multiple=True,
    required=True,
    type=_FILE,
    metavar="P",
    help="Prompt file: txt, csv, tsv, json, jsonl or parquet. Repeatable.",
)
@click.option("--judge", metavar="J", help="Model of the judge; by default the embedded one.")
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens of an answer.")
@click.option("--json", "output", type=_FILE, metavar="OUT", help="Also write everything here.")
def evaluate(
    model: str, vectors: tuple[str, ...], layer_range: tuple[int, int] | None, adapters: tuple[str, ...],
    system_prompt: str | None, files: tuple[Path, ...], judge: str | None, tokens: int, output: Path | None,
) -> None:  # fmt: skip
    """Refusals and degenerate answers, drift and speed, unsteered and steered side by side."""
    from rich.console import Console
    from rich.table import Table

    from rs_gguf import models
    from rs_gguf.control_vector import read
    from rs_gguf.evaluation import Steering, compare, summed
    from rs_gguf.files import write_json
    from rs_gguf.judges import open_judge
    from rs_gguf.llama import LlamaModel
    from rs_gguf.prompts import load
    from rs_gguf.terminal import TerminalProgress

    parts = [(read(path), scale) for path, scale in map(path_and_scale, vectors)]
    steering = Steering(summed(parts, layer_range), [path_and_scale(a) for a in adapters])
    # The kind is not known for a stranger's file, and nothing below depends on it.
    sets = {path.stem: load(path, "sensitive") for path in files}
    path = models.resolve(model)
    judge_path = models.resolve(judge or models.DEFAULT)
    progress = TerminalProgress(Console(stderr=True))
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(LlamaModel(path))
        grader = target if judge_path == path else stack.enter_context(LlamaModel(judge_path))
        total = 2 * sum(map(len, sets.values()))
        advance = stack.enter_context(progress.stage("measure", total))
        result = compare(
            target,
            open_judge(grader),
            sets,
            steering,
            max_tokens=tokens,
            system=system_prompt,
            advance=advance,
        )
    result["model"] = str(path)
    result["control_vectors"], result["adapters"] = list(vectors), list(adapters)
    if output is not None:
        write_json(output, result)
    table = Table("set", "n", "refused before", "refused after", "p", "degenerate", "drift", "top-1")
    for name, found in result["sets"].items():
        low, high = found["ci95_steered"]
        low0, high0 = found["ci95_baseline"]
        table.add_row(
            name, str(found["n"]), f"{found['refusal_baseline']:.1%} ({low0:.0%} to {high0:.0%})",
            f"{found['refusal_steered']:.1%} ({low:.0%} to {high:.0%})", f"{found['mcnemar_p']:.2g}",
            f"{found['degenerate_baseline']:.1%} → {found['degenerate_steered']:.1%}",
            _number(found["drift"]), _number(found["top1_agreement"]),
        )  # fmt: skip
    Console().print(table)
    speed = result["tokens_per_second"]
    click.echo(
        f"{speed['baseline']:.0f} tokens/s before, {speed['steered']:.0f} after. Judge: {result['judge']}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
