"""The `rs-export` commands that measure: eval and judge."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from rs_gguf.cli_vectors import path_and_scale
from rs_gguf.errors import InputError

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


@click.command("judge")
@click.option(
    "--input", "source", default="-", metavar="F.jsonl", help="Rows with prompt and answer; - is stdin."
)
@click.option("--output", "target", default="-", metavar="G.jsonl", help="- is stdout.")
@click.option(
    "--judge", "judge_spec", metavar="J", help="A model, or `keywords`; by default the embedded judge."
)
@click.option("--show-rubric", is_flag=True, help="Print the rubric and stop.")
@click.option(
    "--agreement", is_flag=True, help="Print how the judge agrees with the labelled test pairs, and stop."
)
@click.option(
    "--fit-probe", type=_FILE, metavar="OUT", help="Fit a probe for this judge on the labelled pairs."
)
def judge(
    source: str,
    target: str,
    judge_spec: str | None,
    show_rubric: bool,
    agreement: bool,
    fit_probe: Path | None,
) -> None:
    """Grade answers: adds confidence (−1 … 1), verdict and mode to each row, in order."""
    from rs_gguf import judge_probe, judges, models
    from rs_gguf.llama import LlamaModel

    if show_rubric:
        click.echo(json.dumps(judges.rubric(), indent=2, ensure_ascii=False))
        return
    rows = [] if agreement or fit_probe else _rows(source)
    with contextlib.ExitStack() as stack:
        grader: judges.Judge
        if judge_spec == "keywords":
            grader = judges.KeywordJudge()
        else:
            model = stack.enter_context(LlamaModel(models.resolve(judge_spec or models.DEFAULT)))
            if fit_probe:
                judge_probe.save_probe(judge_probe.fit_probe(model, judge_probe.labelled_pairs()), fit_probe)
                click.echo(fit_probe)
                return
            grader = judges.open_judge(model)
        if agreement:
            pairs = [pair for pair in judge_probe.labelled_pairs() if pair.split == "test"]
            click.echo(json.dumps(judge_probe.agreement(grader, pairs), indent=2, ensure_ascii=False))
            return
        graded = dict(grader.judge([(row["prompt"], row["answer"]) for row in rows]))
    lines = [
        json.dumps(
            {**row, "confidence": graded[i].confidence, "verdict": graded[i].verdict, "mode": graded[i].mode},
            ensure_ascii=False,
        )
        + "\n"
        for i, row in enumerate(rows)
    ]
    if target == "-":
        click.echo("".join(lines), nl=False)
    else:
        from rs_gguf.files import write_text

        write_text(Path(target), "".join(lines))


def _rows(source: str) -> list[dict[str, Any]]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source}: {error}.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["prompt"], str) or not isinstance(row["answer"], str):
                raise TypeError("prompt and answer must be text")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{source}:{number}: expected a JSON object with prompt and answer ({error})."
            ) from error
        rows.append(row)
    if not rows:
        raise InputError(f"{source} holds no rows to judge.")
    return rows
