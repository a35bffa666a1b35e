"""The `rs-export eval` command: before and after, side by side."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.cli.files import path_and_scale
from rs_gguf.errors import InputError, escape_control_chars

if TYPE_CHECKING:
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.engines.engine import Engine, Steering
    from rs_gguf.evaluation.condition import AnswerSource
    from rs_gguf.records.conversation import Prompt

_FILE = click.Path(path_type=Path)
_MOST_SCALES = 100
Parts = list[tuple[Path, float]]


@click.command("eval")
@click.option("--model", required=True, metavar="M",
              help="GGUF file, catalogue name, owner/name/file.gguf, or llama-servers: "
                   "http://host:port,…")  # fmt: skip
@click.option(
    "--control-vector", "vectors", multiple=True, metavar="F[:SCALE]", help="Repeatable; they add up."
)
@click.option("--layer-range", nargs=2, type=int, metavar="A B",
              help="Blocks that the vectors steer, both included.")  # fmt: skip
@click.option("--lora", "adapters", multiple=True, metavar="F[:SCALE]", help="GGUF LoRA adapter. Repeatable.")
@click.option("--scales", metavar="S,S,...",
              help="Factors that multiply all scales, such as 0,0.25,...,2: factor and response.")  # fmt: skip
@click.option("--system-prompt", metavar="T", help="Used on both sides.")
@click.option("--prompts", "files", multiple=True, required=True, type=_FILE, metavar="P",
              help="Prompt file: txt, csv, tsv, json, jsonl or parquet. Repeatable.")  # fmt: skip
@click.option("--judge", metavar="J", help="Who grades, named as for `rs-export judge --judge`.")
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0),
              help="Of answers; 0 is greedy.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 2),
              help="Of every draw.")  # fmt: skip
@click.option(
    "--capability", is_flag=True, help="Also solve the embedded tasks with exact answers, on both sides."
)
@click.option("--json", "output", type=_FILE, metavar="OUT", help="Also write everything here, answers too.")
def evaluate(
    model: str, vectors: tuple[str, ...], layer_range: tuple[int, int] | None, adapters: tuple[str, ...],
    scales: str | None, system_prompt: str | None, files: tuple[Path, ...], judge: str | None, tokens: int,
    temperature: float, seed: int, capability: bool, output: Path | None,
) -> None:  # fmt: skip
    """Measure refusals and more, unsteered and steered.

    Refusals, broken answers, drift, capability and speed, side by side and with intervals.
    """
    from rich.console import Console

    from rs_gguf.cli.tables import print_comparison, print_sweep
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.engines.generation import Sampling
    from rs_gguf.evaluation import capability as capabilities
    from rs_gguf.evaluation.comparison import compare
    from rs_gguf.judges.registry import open_judge_spec
    from rs_gguf.records.files import check_writable
    from rs_gguf.records.rows import write_json

    if output is not None:
        check_writable(output)
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature}: a finite number is needed.")
    parts, added = _parts(vectors), _parts(adapters)
    factors = [1.0] if scales is None else parse_scales(scales)
    if not (parts or added):
        if scales is not None:
            raise InputError(
                "--scales multiplies the scales of --control-vector or --lora, and neither is given."
            )
        click.echo("Nothing is steered: both sides are the model as it is.", err=True)
        factors = [0.0]
    sets = _sets(files)
    tasks, left_out = capabilities.runnable(tokens) if capability else ([], "")
    if left_out:
        click.echo(f"The tasks that run code are left out: {left_out}.", err=True)
    progress = TerminalProgress(Console(stderr=True))
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        respondent, name, loaded = stack.enter_context(
            _respondent(model, parts, layer_range, added, system_prompt, progress)
        )
        grader = stack.enter_context(open_judge_spec(judge, loaded=loaded, progress=progress.download))
        total = (sum(map(len, sets.values())) + len(tasks)) * (1 + sum(factor != 0 for factor in factors))
        advance = stack.enter_context(progress.stage("measure", total))
        found = compare(
            respondent, grader, sets, max_tokens=tokens, factors=factors, tasks=tasks,
            sampling=Sampling(temperature=temperature, seed=seed), advance=advance,
        )  # fmt: skip
        facts: dict[str, Any] = {
            "model": name, "control_vectors": list(vectors), "layer_range": layer_range,
            "adapters": list(adapters), "system_prompt": system_prompt, "judge": grader.name,
            "tokens": tokens, "temperature": temperature, "seed": seed,
        }  # fmt: skip
    console = Console()
    if scales is None:
        print_comparison(console, found[0], tokens)
    else:
        print_sweep(console, found)
    console.print(f"Judge: {escape_control_chars(facts['judge'])}.", markup=False, highlight=False)
    if output is not None:  # last: should it fail, the tables were told
        write_json(output, {**facts, **found[0]} if scales is None else {**facts, "sweep": found})


# ---- what is asked for -------------------------------------------------------------------------------


def _parts(arguments: Sequence[str]) -> Parts:
    parts = [path_and_scale(argument) for argument in arguments]
    for argument, (_, scale) in zip(arguments, parts, strict=True):
        if not math.isfinite(scale):
            raise InputError(f"{argument!r}: the scale must be a finite number.")
    return parts


def parse_scales(text: str) -> list[float]:
    """The factors in `0,0.5,1` or `0,0.25,...,2`: `...` goes on in steps of the two numbers before it."""
    factors: list[float] = []
    fields = [field.strip() for field in text.split(",")]
    for k, field in enumerate(fields):
        if field in ("...", "…"):
            if len(factors) < 2 or k + 1 == len(fields):
                raise InputError(f"--scales {text!r}: two numbers must stand before '...', and one after it.")
            continue
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--scales {text!r}: {field!r} is no finite number.")
        if k and fields[k - 1] in ("...", "…"):
            step = factors[-1] - factors[-2]
            ratio = (value - factors[-1]) / step if step else 0.0
            count = round(ratio) if math.isfinite(ratio) else 0
            if count > _MOST_SCALES:
                raise InputError(f"--scales {text!r}: {count} steps; {_MOST_SCALES} factors are the most.")
            if count < 1 or abs(factors[-1] + count * step - value) > 1e-6:
                raise InputError(
                    f"--scales {text!r}: steps of {step:g} do not lead from {factors[-1]:g} to {value:g}."
                )
            factors += [round(factors[-1] + i * step, 9) for i in range(1, count)]
        factors.append(value)
    if len(factors) > _MOST_SCALES:
        raise InputError(f"--scales {text!r}: {len(factors)} factors; {_MOST_SCALES} are the most.")
    return list(dict.fromkeys(factors))


def _sets(files: Sequence[Path]) -> dict[str, list[Prompt]]:
    """The prompts of each file, under its name without the ending, or its path where names are alike."""
    from rs_gguf.prompts.user_files import load

    stems = Counter(path.stem for path in files)
    # The kind is not known for a stranger's file, and nothing here depends on it.
    return {path.stem if stems[path.stem] == 1 else str(path): load(path, "sensitive") for path in files}


@contextlib.contextmanager
def _respondent(
    model: str,
    parts: Parts,
    layer_range: tuple[int, int] | None,
    adapters: Parts,
    system: str | None,
    progress: TerminalProgress,
) -> Iterator[tuple[AnswerSource, str, Engine | None]]:
    """What answers, its name, and the model where it is loaded here."""
    if model.startswith(("http://", "https://")):
        if parts or layer_range:
            raise InputError(
                "a running server keeps the control vectors that it was started with. Give --model the GGUF "
                "file, or steer the server by --lora."
            )
        from rs_gguf.engines.server.llama_server import LlamaServer

        yield LlamaServer(model, adapters, system), model, None
        return
    from rs_gguf.engines import open_engine
    from rs_gguf.evaluation.condition import SteeredModel
    from rs_gguf.models import resolve as models

    steering = _steering(parts, layer_range, adapters)
    path = models.resolve_gguf(model, progress=progress.download)
    with open_engine(path) as loaded:
        yield SteeredModel(loaded, steering, system), str(path), loaded


def _steering(parts: Parts, layer_range: tuple[int, int] | None, adapters: Parts) -> Steering:
    from rs_gguf.engines.engine import Steering
    from rs_gguf.steering.file import kind_of
    from rs_gguf.steering.lora import LoraAdapter
    from rs_gguf.steering.vector import SteeringVector
    from rs_gguf.steering.vector_file import read

    total = (
        SteeringVector.combined([(read(path), scale) for path, scale in parts]).directions if parts else {}
    )
    directions = dict(total)
    if layer_range:
        first, last = layer_range
        directions = {layer: row for layer, row in total.items() if first <= layer <= last}
        if not directions:
            raise InputError(f"--layer-range {first} {last}: no vector has a direction in there.")
    for path, _ in adapters:
        if kind_of(path) is not LoraAdapter:
            raise InputError(f"{path} is no LoRA adapter. A control vector is given by --control-vector.")
    return Steering(directions, adapters)
