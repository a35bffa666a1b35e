"""Measure how the cost of each stage grows, estimate large models, and compare plans with finished runs.

Prints three tables. The first has the growth of the stages with samples N, layers L and width D, beside the
growth that `rs-export plan` computes. It uses real runs on small random models and fits of random
activations. The second is the plan for large models from their published configurations, at the stored speed
of as many cores. With `--run`, the third compares the plan of a run's recipe, at the speed measured here,
with the seconds in the run's folder. With `--gpus`, it prints only the plan for a machine with several GPUs,
at an assumed speed: nothing was measured there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from rs_gguf.activations.activations import MatrixInputs
from rs_gguf.machine import usable_cores
from rs_gguf.methods.samples import Samples
from rs_gguf.models.dimensions import ModelDimensions, of_config
from rs_gguf.pipeline import recipe
from rs_gguf.pipeline.plan import Plan, judge_of, measure, model_dimensions, model_file, plan, stored
from rs_gguf.pipeline.run import run
from rs_gguf.pipeline.speed import JudgeModel, Speed, stored_speed
from rs_gguf.pipeline.stages.fit import fit
from rs_gguf.records.conversation import KINDS, Prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.tiny_gguf import write_tiny_qwen2

BITS = 4.85  # bits per weight in Q4_K_M
TOLERANCE = 0.3

# Values of the configurations that were published with the weights.
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
LARGE: dict[str, transformers.PretrainedConfig] = {
    "Qwen3-8B": transformers.Qwen3Config(
        **_QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen3-32B": transformers.Qwen3Config(
        **_QWEN3, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "Qwen3-Next-80B-A3B": transformers.Qwen3NextConfig(
        **_QWEN3 | {"head_dim": 256}, hidden_size=2048, intermediate_size=5120, num_hidden_layers=48,
        num_attention_heads=16, num_key_value_heads=2, num_experts=512, num_experts_per_tok=10,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    ),
    "Qwen3-235B-A22B": transformers.Qwen3MoeConfig(
        **_QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    ),
}  # fmt: skip

# What one GPU is assumed to do in a second: a tenth of the operations and a third of the bytes that the data
# sheet of an NVIDIA H100 SXM names (989e12 in bf16, 3.35e12). Sampling on the host and starting the kernels
# take STEP seconds of a decoding step; files are read at LOADING bytes/s; the fit has CORES cores.
GPU_OPERATIONS, GPU_BANDWIDTH, GPU_MEMORY = 100e12, 1e12, 80e9
STEP, LOADING, CORES = 0.02, 2e9, 16
CONTEXT = 100  # mean number of tokens before a token, as in the stored speed
COMMANDS = 3  # of docs/howto/several-gpus.md, each of which loads the model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, nargs="*", default=[], metavar="DIR", help="folders of finished runs"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="only plan large models on N GPUs of 80 GB")
    options = parser.parse_args()
    if options.gpus:
        on_gpus(options.gpus)
        return
    for folder in options.run:
        compare(folder)
    extrapolate()
    growth()


# ---- the plan beside a run ---------------------------------------------------------------------------


def compare(folder: Path) -> None:
    """Print the planned and the real seconds of a run, stage by stage."""
    settings = recipe.load(folder / "recipe.toml")
    state = json.loads((folder / "state.json").read_text())
    path, judge = model_file(settings), judge_of(settings)
    speed = measure(settings, path, judge)
    print(
        f"Milliseconds per token on {path.name}, {usable_cores()} cores: {speed.read * 1e3:.2f} read, "
        f"{speed.begin * 1e3:.2f} for prompts that are answered, {speed.answer * 1e3:.2f} answered, "
        f"{speed.judge * 1e3:.2f} judged; {speed.algebra / 1e9:.0f} GFLOP/s in the fit"
    )
    estimate = plan(settings, model_dimensions(path), speed, judge)
    print(f"\n| {folder.name} | planned, s | real, s | planned / real | within 30 % |")
    print("| --- | --- | --- | --- | --- |")
    real = {name: state[name]["seconds"] for name in estimate.stages if name in state}
    seconds = {name: estimate.stages[name].seconds for name in real}
    for name in real:
        print(plan_row(name, seconds[name], real[name]))
    print(plan_row("all", sum(seconds.values()), sum(real.values())), flush=True)


def plan_row(name: str, planned: float, real: float) -> str:
    """Return a row: planned and real seconds, their ratio, and whether it is within `TOLERANCE`."""
    ratio = planned / real
    within = "yes" if abs(ratio - 1) <= TOLERANCE else "**no**"
    return f"| {name} | {planned:.1f} | {real:.1f} | {ratio:.2f} | {within} |"


# ---- large models ------------------------------------------------------------------------------------


def extrapolate() -> None:
    """Print the plan of the default recipe for the default model and for large models."""
    default = recipe.load()
    judge = judge_of(default)
    dimensions = {"the default model": model_dimensions(model_file(default))}
    dimensions |= {name: of_config(config, BITS) for name, config in LARGE.items()}
    plans = {name: planned(default, model, judge) for name, model in dimensions.items()}
    stages = list(plans["the default model"].stages)
    print(f"\n| model | weights | {' | '.join(stages)} | all | memory | disk |")
    print("| --- |" + " --- |" * (len(stages) + 4))
    for name, model in dimensions.items():
        estimate = plans[name]
        times = " | ".join(hours(stage.seconds) for stage in estimate.stages.values())
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (estimate.memory, estimate.disk))
        print(f"| {name} | {model.weights / 1e9:.1f} GB | {times} | {hours(estimate.seconds)} | {sizes} |")
    print(end="", flush=True)


def planned(settings: recipe.Recipe, model: ModelDimensions, judge: JudgeModel | None) -> Plan:
    """Return the plan at the stored speed for this machine's number of cores."""
    return plan(settings, model, stored(settings, model, judge), judge)


def on_gpus(gpus: int) -> None:
    """Print the plan of the default recipe for the models of experts, at the assumed speed of the GPUs.

    Each copy of the model takes as many GPUs as it needs. All copies answer and capture; one does the rest.
    """
    default = recipe.load()
    judge = judge_of(default)
    shown = ("answer", "capture", "fit", "tune", "measure")
    print(f"| minutes | GPUs a copy | loading | {' | '.join(shown)} | all | memory | disk |")
    print("| --- |" + " ---: |" * (len(shown) + 5))
    for name in ("Qwen3-Next-80B-A3B", "Qwen3-235B-A22B"):
        model = of_config(LARGE[name], BITS)
        estimate = plan(default, model, gpu_speed(model, judge, default), judge)
        per_copy = math.ceil(estimate.memory / GPU_MEMORY)
        copies = gpus // per_copy
        if not copies:
            print(f"| {name} | {per_copy} |")
            continue
        seconds = {
            stage: cost.seconds / (copies if stage in ("answer", "capture") else 1)
            for stage, cost in estimate.stages.items()
        }
        loading = COMMANDS * model.weights / LOADING
        times = [loading, *(seconds[stage] for stage in shown), loading + sum(seconds.values())]
        minutes = [f"{second / 60:.1f}" for second in times]
        sizes = [f"{size / 1e9:.1f} GB" for size in (estimate.memory, estimate.disk)]
        cells = [name, str(per_copy), *minutes, *sizes]
        print(f"| {' | '.join(cells)} |", flush=True)


def gpu_speed(model: ModelDimensions, judge: JudgeModel | None, settings: recipe.Recipe) -> Speed:
    """Return the speed of one copy of a model, whose layers its GPUs compute one after the other."""
    answers, batch = settings.answers.parallel, settings.engine.batch_size

    def weights(tokens: int) -> float:
        """Return the seconds per token to read the weights in a step of `tokens` tokens."""
        return model.bytes_read(tokens) / tokens / GPU_BANDWIDTH

    operations = model.flops(CONTEXT) / GPU_OPERATIONS
    read = operations + weights(batch)
    return Speed(
        read=read,
        begin=read,
        answer=operations + 2 * model.head / GPU_OPERATIONS + weights(answers) + STEP / answers,
        judge=judge.depth * judge.model.flops(CONTEXT) / GPU_OPERATIONS if judge else 0.0,
        algebra=stored_speed(CORES, model, judge, answers).algebra,
        source="assumed",
    )


def hours(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# ---- growth ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Number of prompts of each kind, of layers, and the width."""

    per_kind: int
    layers: int
    width: int

    def times(self, varied: str, step: int) -> Size:
        """Return the size with the field `varied` `step` times as large."""
        return replace(self, **{varied: step * getattr(self, varied)})


LETTERS = {"per_kind": "N", "layers": "L", "width": "D"}
STEPS = (1, 2, 4)
RUN, FIT = Size(32, 8, 256), Size(120, 16, 512)
SMALLEST = Size(8, 1, 64)  # its fit takes only the constant time of the figures


def growth() -> None:
    """Print the seconds at 1, 2 and 4 times a size, and the measured and planned exponent over that range."""
    print("\n| stage | grows with | at 1, 2 and 4 times | seconds | exponent | planned |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_seconds = cache(lambda size: seconds_of_run(size, folder))
        fit_seconds = cache(lambda size: seconds_of_fit(size, folder))
        for stage, start in (("answer", RUN), ("capture", RUN), ("fit", FIT)):
            for varied, letter in LETTERS.items():
                sizes = [start.times(varied, step) for step in STEPS]
                real = [fit_seconds(size) if stage == "fit" else run_seconds(size)[stage] for size in sizes]
                estimated = [seconds_planned(size)[stage] for size in sizes]
                if stage == "fit":  # subtract the constant part
                    real = [value - fit_seconds(SMALLEST) for value in real]
                    estimated = [value - seconds_planned(SMALLEST)[stage] for value in estimated]
                first = 3 * start.per_kind if letter == "N" else getattr(start, varied)
                times = ", ".join(f"{value:.2f}" for value in real)
                both = f"{exponent(real):.1f} | {exponent(estimated):.1f}"
                print(f"| {stage} | {letter} | {first} | {times} | {both} |", flush=True)


def exponent(values: Sequence[float]) -> float:
    return math.log(values[-1] / values[0]) / math.log(STEPS[-1] / STEPS[0])


def recipe_of(size: Size, model: str) -> recipe.Recipe:
    sizes = [f"prompts.fit={size.per_kind}", "prompts.gate_only=0", "prompts.tune=4"]
    # Random weights answer no question, so that is not checked.
    values = ["answers.check=false", "judge=keywords", "fit.estimators=['wrmd']"]
    return recipe.load(None, [*sizes, *values, f"model={model}"])


def seconds_of_run(size: Size, folder: Path) -> dict[str, float]:
    """Return the seconds of each stage up to `capture`, on a random model."""
    path = folder / f"{size.layers}-{size.width}.gguf"
    if not path.exists():
        write_tiny_qwen2(path, n_layer=size.layers, n_embd=size.width)
    out = folder / f"{size.per_kind}-{path.stem}"
    run(recipe_of(size, str(path)), out, until="capture")
    state = json.loads((out / "state.json").read_text())
    return {stage: entry["seconds"] for stage, entry in state.items()}


def seconds_of_fit(size: Size, folder: Path) -> float:
    """Return the seconds of the fit stage on random activations with shifted means of the classes."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"{kind} {i}", kind) for kind in KINDS for i in range(size.per_kind)]
    harmful = np.array([prompt.kind == "harmful" for prompt in prompts])
    sensitive = np.array([prompt.kind == "sensitive" for prompt in prompts])
    refused = harmful | (sensitive & (np.arange(len(prompts)) % 2 == 0))

    def rows(width: int, n: int) -> Any:
        return rng.standard_normal((n, size.layers, width), dtype=np.float32)

    def separated(width: int) -> Any:
        activations = rows(width, len(prompts))
        for axis, mask in enumerate((refused, harmful, sensitive)):
            activations[mask, :, axis] += 3
        return activations

    inputs = {
        name: MatrixInputs(
            separated(width), rows(width, len(prompts)), rows(width, 3 * len(prompts)), rows(width, 25)
        )
        for name, width in matrix_widths(size).items()
    }
    samples = Samples(prompts, separated(size.width), np.where(refused, 0.9, -0.9), inputs, folder)
    start = time.perf_counter()
    fit(samples, recipe_of(size, "none").fit_options, folder / "fit", advance=lambda n: None)
    return time.perf_counter() - start


def matrix_widths(size: Size) -> dict[str, int]:
    """Return the input widths of the output matrices in the random models."""
    return {"attn_output": size.width, "ffn_down": 2 * size.width}


def seconds_planned(size: Size) -> dict[str, float]:
    """Return the planned seconds of each stage on a random model."""
    layer = 9 * size.width**2  # weights: three matrices of the inner width 2D, two of D, two of D/2
    model = ModelDimensions(
        n_layer=size.layers, width=size.width, n_vocab=300, dense=size.layers * layer, experts=0, used=0.0,
        head=300 * size.width, weights=4 * size.layers * layer, attention=size.layers * size.width,
        cache=size.layers * size.width, output_matrices=matrix_widths(size),
    )  # fmt: skip
    estimate = planned(recipe_of(size, "none"), model, None)
    return {name: stage.seconds for name, stage in estimate.stages.items()}


if __name__ == "__main__":
    main()
