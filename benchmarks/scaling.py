"""How the cost of each stage grows, what large models will take, and how far off the plan of a run was.

Three tables. The growth of the stages with samples N, blocks L and width D: real runs on random models small
enough for any machine, and the fit of random activations, beside the growth that `rs-export plan` reckons
with. Its plan for large models, from their published configurations alone, at the stored speed of as many
cores. With `--run`, the plan of a run's recipe, at the speed that is measured here, beside the seconds that
the run's folder tells.
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
from rs_gguf.pipeline.speed import JudgeModel
from rs_gguf.pipeline.stages.fit import fit
from rs_gguf.records.conversation import KINDS, Prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.tiny_gguf import write_tiny_qwen2

BITS = 4.85  # a weight, in Q4_K_M
TOLERANCE = 0.3

# From the configurations that were published with the weights.
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
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, nargs="*", default=[], metavar="DIR", help="folders of runs")
    options = parser.parse_args()
    for folder in options.run:
        compare(folder)
    extrapolate()
    growth()


# ---- the plan beside a run ---------------------------------------------------------------------------


def compare(folder: Path) -> None:
    """Planned and real seconds of a run, stage by stage."""
    ran = recipe.load(folder / "recipe.toml")
    state = json.loads((folder / "state.json").read_text())
    path, judge = model_file(ran), judge_of(ran)
    speed = measure(ran, path, judge)
    print(
        f"Milliseconds a token on {path.name}, {usable_cores()} cores: {speed.read * 1e3:.2f} read, "
        f"{speed.begin * 1e3:.2f} of prompts that are answered, {speed.answer * 1e3:.2f} answered, "
        f"{speed.judge * 1e3:.2f} judged; {speed.algebra / 1e9:.0f} GFLOP/s in the fit"
    )
    found = plan(ran, model_dimensions(path), speed, judge)
    print(f"\n| {folder.name} | planned, s | real, s | planned / real | within 30 % |")
    print("| --- | --- | --- | --- | --- |")
    real = {name: state[name]["seconds"] for name in found.stages if name in state}
    told = {name: found.stages[name].seconds for name in real}
    for name in real:
        print(judged(name, told[name], real[name]))
    print(judged("all", sum(told.values()), sum(real.values())), flush=True)


def judged(name: str, planned: float, real: float) -> str:
    ratio = planned / real
    verdict = "yes" if abs(ratio - 1) <= TOLERANCE else "**no**"
    return f"| {name} | {planned:.1f} | {real:.1f} | {ratio:.2f} | {verdict} |"


# ---- large models ------------------------------------------------------------------------------------


def extrapolate() -> None:
    default = recipe.load()
    judge = judge_of(default)
    shapes = {"the default model": model_dimensions(model_file(default))}
    shapes |= {name: of_config(config, BITS) for name, config in LARGE.items()}
    plans = {name: planned(default, shape, judge) for name, shape in shapes.items()}
    stages = list(plans["the default model"].stages)
    print(f"\n| model | weights | {' | '.join(stages)} | all | memory | disk |")
    print("| --- |" + " --- |" * (len(stages) + 4))
    for name, shape in shapes.items():
        found = plans[name]
        times = " | ".join(hours(stage.seconds) for stage in found.stages.values())
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (found.memory, found.disk))
        print(f"| {name} | {shape.weights / 1e9:.1f} GB | {times} | {hours(found.seconds)} | {sizes} |")
    print(end="", flush=True)


def planned(chosen: recipe.Recipe, shape: ModelDimensions, judge: JudgeModel | None) -> Plan:
    """At the stored speed of this machine's number of cores."""
    return plan(chosen, shape, stored(chosen, shape, judge), judge)


def hours(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# ---- growth ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Prompts of each kind, blocks and width."""

    per_kind: int
    blocks: int
    width: int

    def times(self, varied: str, step: int) -> Size:
        """The same with one of the three `step` times as large."""
        return replace(self, **{varied: step * getattr(self, varied)})


LETTERS = {"per_kind": "N", "blocks": "L", "width": "D"}
STEPS = (1, 2, 4)
RUN, FIT = Size(32, 8, 256), Size(120, 16, 512)
SMALLEST = Size(8, 1, 64)  # a fit whose time is that of its figures


def growth() -> None:
    """Seconds at 1, 2 and 4 times a size, and the exponent over that range, measured and planned."""
    print("\n| stage | grows with | at 1, 2 and 4 times | seconds | exponent | planned |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ran = cache(lambda size: seconds_of_run(size, folder))
        fitted = cache(lambda size: seconds_of_fit(size, folder))
        for stage, start in (("answer", RUN), ("capture", RUN), ("fit", FIT)):
            for varied, letter in LETTERS.items():
                sizes = [start.times(varied, step) for step in STEPS]
                real = [fitted(size) if stage == "fit" else ran(size)[stage] for size in sizes]
                reckoned = [seconds_planned(size)[stage] for size in sizes]
                if stage == "fit":  # what grows of it
                    real = [value - fitted(SMALLEST) for value in real]
                    reckoned = [value - seconds_planned(SMALLEST)[stage] for value in reckoned]
                first = 3 * start.per_kind if letter == "N" else getattr(start, varied)
                times = ", ".join(f"{value:.2f}" for value in real)
                both = f"{exponent(real):.1f} | {exponent(reckoned):.1f}"
                print(f"| {stage} | {letter} | {first} | {times} | {both} |", flush=True)


def exponent(values: Sequence[float]) -> float:
    return math.log(values[-1] / values[0]) / math.log(STEPS[-1] / STEPS[0])


def recipe_of(size: Size, model: str) -> recipe.Recipe:
    sizes = [f"prompts.fit={size.per_kind}", "prompts.gate_only=0", "prompts.tune=4"]
    return recipe.load(None, [*sizes, f"model={model}", "judge=keywords", "fit.estimators=['wrmd']"])


def seconds_of_run(size: Size, folder: Path) -> dict[str, float]:
    """Seconds of each stage until the capture, on a random model."""
    path = folder / f"{size.blocks}-{size.width}.gguf"
    if not path.exists():
        write_tiny_qwen2(path, n_layer=size.blocks, n_embd=size.width)
    out = folder / f"{size.per_kind}-{path.stem}"
    run(recipe_of(size, str(path)), out, until="capture")
    state = json.loads((out / "state.json").read_text())
    return {stage: found["seconds"] for stage, found in state.items()}


def seconds_of_fit(size: Size, folder: Path) -> float:
    """Seconds of the fit stage on random activations in which the refused samples stand apart."""
    rng = np.random.default_rng(0)
    asked = [Prompt(f"{kind} {i}", kind) for kind in KINDS for i in range(size.per_kind)]
    harmful = np.array([prompt.kind == "harmful" for prompt in asked])
    sensitive = np.array([prompt.kind == "sensitive" for prompt in asked])
    refused = harmful | (sensitive & (np.arange(len(asked)) % 2 == 0))

    def rows(width: int, n: int) -> Any:
        return rng.standard_normal((n, size.blocks, width), dtype=np.float32)

    def told_apart(width: int) -> Any:
        found = rows(width, len(asked))
        for axis, kind in enumerate((refused, harmful, sensitive)):
            found[kind, :, axis] += 3
        return found

    inputs = {
        name: MatrixInputs(
            told_apart(width), rows(width, len(asked)), rows(width, 3 * len(asked)), rows(width, 25)
        )
        for name, width in writers(size).items()
    }
    samples = Samples(asked, told_apart(size.width), np.where(refused, 0.9, -0.9), inputs, folder)
    start = time.perf_counter()
    fit(samples, recipe_of(size, "none").fit_options, folder / "fit", advance=lambda n: None)
    return time.perf_counter() - start


def writers(size: Size) -> dict[str, int]:
    """As in the random models."""
    return {"attn_output": size.width, "ffn_down": 2 * size.width}


def seconds_planned(size: Size) -> dict[str, float]:
    block = 9 * size.width**2  # three matrices of the inner width 2D, two of D, two of D/2
    shape = ModelDimensions(
        n_layer=size.blocks, width=size.width, n_vocab=300, dense=size.blocks * block, experts=0, used=0.0,
        head=300 * size.width, weights=4 * size.blocks * block, attention=size.blocks * size.width,
        cache=size.blocks * size.width, output_matrices=writers(size),
    )  # fmt: skip
    found = planned(recipe_of(size, "none"), shape, None)
    return {name: stage.seconds for name, stage in found.stages.items()}


if __name__ == "__main__":
    main()
