"""Define the `rs-export eval` command: measure a model unsteered and steered, side by side.

In: a model, steering files, prompt files and a judge. Out: tables on stdout and, with --json, all figures and
answers in a file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.errors import InputError, escape_control_chars

if TYPE_CHECKING:
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.engines.engine import Engine, Steering
    from rs_gguf.engines.settings import EngineSettings
    from rs_gguf.evaluation.condition import AnswerSource
    from rs_gguf.records.metrics import Effect

_FILE = click.Path(path_type=Path)
_MOST_SCALES = 100
Parts = list[tuple[Path, float]]


def _capability_was_removed(_context: click.Context, _option: click.Parameter, given: bool) -> None:
    if given:
        raise InputError(
            "--capability was removed, with its embedded tasks. Leave it away, and run Inspect or "
            "lm-evaluation-harness against a llama-server: docs/howto/capability.md has the commands."
        )


@click.command("eval")
@click.option("--model", required=True, metavar="M",
              help="GGUF file, catalogue name, owner/name/file.gguf, or llama-servers: "
                   "http://host:port,…")  # fmt: skip
@click.option(
    "--control-vector",
    "vectors",
    multiple=True,
    metavar="F[:SCALE]",
    help="GGUF control vector and its scale, 1 by default. Repeatable; vectors add up.",
)
@click.option("--layer-range", nargs=2, type=int, metavar="A B",
              help="First and last layer that the vectors steer; by default all.")  # fmt: skip
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="F[:SCALE]",
    help="GGUF LoRA adapter and its scale, 1 by default. Repeatable.",
)
@click.option("--scales", metavar="S,S,...",
              help="Scale factors to sweep, such as 0,0.25,...,2; each multiplies every scale.")  # fmt: skip
@click.option("--system-prompt", metavar="T", help="System prompt for both sides.")
@click.option("--prompts", "files", multiple=True, type=_FILE, metavar="P",
              help="Prompt file: txt, csv, tsv, json, jsonl or parquet. Repeatable.")  # fmt: skip
@click.option("--suite", "suites", multiple=True, metavar="NAME",
              help="Public suite from the hub in place of --prompts. Repeatable. An unknown name lists "
                   "all.")  # fmt: skip
@click.option("--suite-file", "copies", multiple=True, type=_FILE, metavar="P",
              help="Local copy of the suite's file. Repeatable for a suite of several files.")  # fmt: skip
@click.option("--protocol", type=click.Choice(["compactifai"]),
              help="Measure as the authors of the method: the majority of 5 answers at temperature "
                   "0.6.")  # fmt: skip
@click.option("--effect", default="remove", show_default=True, type=click.Choice(["remove", "induce"]),
              help="Effect that the acceptance criteria ask for.")  # fmt: skip
@click.option("--contexts", multiple=True, metavar="NAME,…|all",
              help="Also ask the prompts in these contexts, such as second-turn,role. An unknown name lists "
                   "all.")  # fmt: skip
@click.option("--judge", metavar="J", help="Judge of the answers, named as for `rs-export judge --judge`.")
@click.option("--second-judge", metavar="J",
              help="Second judge, a local model; the agreement is printed.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), show_default="128; 512 with --protocol",
              help="Maximum tokens of an answer.")  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0),
              help="Sampling temperature; 0 is greedy decoding.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 2),
              help="Random seed for sampling.")  # fmt: skip
@click.option("--capability", is_flag=True, hidden=True, is_eager=True, expose_value=False,
              callback=_capability_was_removed)  # fmt: skip
@click.option("--json", "output", type=_FILE, metavar="OUT", help="File for all figures and answers as JSON.")
@engine_options
def evaluate(
    model: str, vectors: tuple[str, ...], layer_range: tuple[int, int] | None, adapters: tuple[str, ...],
    scales: str | None, system_prompt: str | None, files: tuple[Path, ...], suites: tuple[str, ...],
    copies: tuple[Path, ...], protocol: str | None, effect: Effect, contexts: tuple[str, ...],
    judge: str | None, second_judge: str | None, tokens: int | None, temperature: float, seed: int,
    output: Path | None, engine: EngineOptions,
) -> None:  # fmt: skip
    """Measure refusals and more, unsteered and steered.

    Prints refusals, degenerate answers, drift and speed side by side, with 95% intervals.
    """
    from rich.console import Console

    from rs_gguf.cli.eval_prompts import prompt_sets, shown_contexts
    from rs_gguf.cli.tables import print_comparison, print_suites, print_sweep
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.engines.generation import TRACE_TOKENS, Asking, Sampling
    from rs_gguf.evaluation.acceptance import SafetyRule
    from rs_gguf.evaluation.comparison import compare_in_contexts
    from rs_gguf.evaluation.majority import PROTOCOLS, Protocol
    from rs_gguf.judges.registry import open_judge_spec, open_second_judge
    from rs_gguf.prompts.contexts import named
    from rs_gguf.records.files import check_writable
    from rs_gguf.records.rows import write_json

    if output is not None:
        check_writable(output)
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature}: give a finite number of at least 0.")
    vector_parts, adapter_parts = _parts(vectors), _parts(adapters)
    factors = [1.0] if scales is None else parse_scales(scales)
    if not (vector_parts or adapter_parts):
        if scales is not None:
            raise InputError(
                "--scales multiplies the scales of --control-vector or --lora; give at least one of them."
            )
        click.echo("No steering file is given: both columns show the unsteered model.", err=True)
        factors = [0.0]
    if protocol and temperature:
        raise InputError(f"--temperature {temperature:g}: --protocol {protocol} sets it. Leave one away.")
    how = PROTOCOLS[protocol] if protocol else Protocol(draws=1, temperature=temperature, tokens=128)
    temperature, tokens = how.temperature, tokens or how.tokens
    prompts = prompt_sets(files, suites, copies)
    asked_in = named([name.strip() for value in contexts for name in value.split(",")])
    settings = engine.settings()
    progress = TerminalProgress()
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        source, name, loaded = stack.enter_context(
            _answer_source(model, vector_parts, layer_range, adapter_parts, settings, progress)
        )
        judge_model = stack.enter_context(
            open_judge_spec(judge, loaded=loaded, engine=settings, progress=progress.download)
        )
        second = second_judge and stack.enter_context(
            open_second_judge(second_judge, loaded=loaded, engine=settings, progress=progress.download)
        )
        asked_in = shown_contexts(asked_in, loaded)
        conditions = 1 + sum(factor != 0 for factor in factors)
        total = sum(map(len, prompts.sets.values())) * (1 + len(asked_in)) * conditions * how.draws
        advance = stack.enter_context(progress.stage("measure", total))
        results = compare_in_contexts(
            source, judge_model, prompts.sets,
            Asking(
                system_prompt, tokens, Sampling(temperature=temperature, seed=seed), trace_tokens=TRACE_TOKENS
            ), asked_in,
            factors=factors, draws=how.draws, known=prompts.known, rule=SafetyRule(effect),
            second=second or None, advance=advance,
        )  # fmt: skip
        facts: dict[str, Any] = {
            "model": name, "control_vectors": list(vectors), "layer_range": layer_range,
            "adapters": list(adapters), "system_prompt": system_prompt,
            "contexts": [context.name for context in asked_in], "judge": judge_model.name,
            "tokens": tokens, "temperature": temperature, "seed": seed, "effect": effect,
            "protocol": protocol, "draws": how.draws, "suites": prompts.suites, "engine": dict(engine.given),
        }  # fmt: skip
    console = Console()
    if scales is None:
        print_comparison(console, results[0], tokens)
    else:
        print_sweep(console, results)
    print_suites(console, prompts.suites)
    console.print(f"Judge: {escape_control_chars(facts['judge'])}.", markup=False, highlight=False)
    if output is not None:  # written last, so that the tables are printed even if writing fails
        write_json(output, {**facts, **results[0]} if scales is None else {**facts, "sweep": results})


# ---- options -------------------------------------------------------------------------------


def _parts(arguments: Sequence[str]) -> Parts:
    """Return path and scale of each argument. Raise `InputError` for a scale that is not finite."""
    from rs_gguf.steering.file import path_and_scale

    parts = [path_and_scale(argument) for argument in arguments]
    for argument, (_, scale) in zip(arguments, parts, strict=True):
        if not math.isfinite(scale):
            raise InputError(f"{argument!r}: the scale is not finite; give a finite number.")
    return parts


def parse_scales(text: str) -> list[float]:
    """Return the factors in `0,0.5,1` or `0,0.25,...,2`, where `...` repeats the step before it.

    Equal factors are kept once. Raise `InputError` for anything else, and for more than 100 factors.
    """
    factors: list[float] = []
    fields = [field.strip() for field in text.split(",")]
    for k, field in enumerate(fields):
        if field in ("...", "…"):
            if len(factors) < 2 or k + 1 == len(fields):
                raise InputError(f"--scales {text!r}: give two numbers before '...' and one after it.")
            continue
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--scales {text!r}: {field!r} is not a finite number; give one.")
        if k and fields[k - 1] in ("...", "…"):
            step = factors[-1] - factors[-2]
            ratio = (value - factors[-1]) / step if step else 0.0
            count = round(ratio) if math.isfinite(ratio) else 0
            if count > _MOST_SCALES:
                raise InputError(
                    f"--scales {text!r}: {count} steps; at most {_MOST_SCALES} factors are accepted."
                )
            if count < 1 or abs(factors[-1] + count * step - value) > 1e-6:
                raise InputError(
                    f"--scales {text!r}: steps of {step:g} do not lead from {factors[-1]:g} to {value:g}. "
                    "Give a last number that they reach."
                )
            factors += [round(factors[-1] + i * step, 9) for i in range(1, count)]
        factors.append(value)
    if len(factors) > _MOST_SCALES:
        raise InputError(f"--scales {text!r}: {len(factors)} factors; at most {_MOST_SCALES} are accepted.")
    return list(dict.fromkeys(factors))


@contextlib.contextmanager
def _answer_source(
    model: str,
    vectors: Parts,
    layer_range: tuple[int, int] | None,
    adapters: Parts,
    settings: EngineSettings,
    progress: TerminalProgress,
) -> Iterator[tuple[AnswerSource, str, Engine | None]]:
    """Yield the source of answers, its name, and the model if this process loads it, else None."""
    if model.startswith(("http://", "https://")):
        if vectors or layer_range:
            raise InputError(
                "a running server keeps the control vectors that it was started with. Give the GGUF file as "
                "--model, or steer the server with --lora."
            )
        from rs_gguf.engines.server.llama_server import LlamaServer

        yield LlamaServer(model, adapters), model, None
        return
    from rs_gguf.engines import open_engine
    from rs_gguf.evaluation.condition import SteeredModel
    from rs_gguf.models import resolve as models

    steering = _steering(vectors, layer_range, adapters)
    path = models.resolve_gguf(model, progress=progress.download)
    with open_engine(path, settings=settings) as loaded:
        yield SteeredModel(loaded, steering), str(path), loaded


def _steering(vectors: Parts, layer_range: tuple[int, int] | None, adapters: Parts) -> Steering:
    """Return the steering by all files. Raise `InputError` for a file of another kind or an empty range."""
    from rs_gguf.engines.engine import Steering
    from rs_gguf.steering.file import kind_of
    from rs_gguf.steering.lora import LoraAdapter
    from rs_gguf.steering.vector import SteeringVector
    from rs_gguf.steering.vector_file import read

    total = (
        SteeringVector.combined([(read(path), scale) for path, scale in vectors]).directions
        if vectors
        else {}
    )
    directions = dict(total)
    if layer_range:
        first, last = layer_range
        directions = {layer: row for layer, row in total.items() if first <= layer <= last}
        if not directions:
            raise InputError(
                f"--layer-range {first} {last}: no vector has a direction in this range. "
                f"The vectors steer layers {sorted(total)}."
            )
    for path, _ in adapters:
        if kind_of(path) is not LoraAdapter:
            raise InputError(f"{path} is not a LoRA adapter. Give a control vector with --control-vector.")
    return Steering(directions, adapters)
