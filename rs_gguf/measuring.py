"""The measure stage: the test split unsteered and under each written file, side by side.

A model, a judge, test prompts and `Arm`s (a control vector, an adapter) go in; paired rows and the content of
`metrics.json` come out, and each file gets its own figures into its metadata, so that they travel with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf import control_vector, lora, metrics
from rs_gguf.evaluation import (
    NO_STEERING,
    Model,
    Steering,
    answer_and_judge,
    chat_tokens,
    drift,
    paired,
    side_row,
)
from rs_gguf.judges import Judge
from rs_gguf.llama import Sampling
from rs_gguf.prompts import Prompt
from rs_gguf.recipe import Recipe
from rs_gguf.run_folder import Row, RowLog
from rs_gguf.search_space import GATE, Trial
from rs_gguf.steering import SteeringVector

_PART = 64  # prompts that are answered and judged together, and lost at most when a run is killed
_DRIFT_PAIRS = 128  # conversations, as in the paper


@dataclass(frozen=True)
class Arm:
    """A written file, the trial that it was chosen by, and what its proof showed."""

    path: Path
    trial: Trial
    proof: Mapping[str, Any]

    @property
    def steering(self) -> Steering:
        if self.trial.candidate.estimator == GATE:
            return Steering({}, [(self.path, 1.0)])
        return Steering(control_vector.read(self.path).directions)


def measure(
    model: Model,
    judge: Judge,
    asked: Sequence[Prompt],
    arms: Mapping[str, Arm],
    recipe: Recipe,
    log: RowLog,
    *,
    model_sha256: str,
    subset: bool,
    advance: Callable[[int], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Paired rows of all arms, and the content of `metrics.json` but for `seconds`."""
    sides = {"baseline": NO_STEERING, **{name: arm.steering for name, arm in arms.items()}}
    for side, steering in sides.items():
        _answer_side(model, judge, side, steering, asked, recipe, log, advance)
    before = [log.rows[f"baseline:{p.id}"] for p in asked]
    tokens = chat_tokens(model, asked, recipe.prompts.system)
    quiet = [
        (conversation, row["tokens"])
        for p, row, conversation in zip(asked, before, tokens, strict=True)
        if p.kind == "benign" and (row["confidence"] or 0) <= 0
    ][:_DRIFT_PAIRS]
    found = {}
    for name, arm in arms.items():
        rows = [
            paired(p, {"baseline": b, "steered": log.rows[f"{name}:{p.id}"]})
            for p, b in zip(asked, before, strict=True)
        ]
        moved = drift(model, quiet, sides[name])
        sets = metrics.summarise_kinds(rows)
        reasons = metrics.gate(sets, moved.nats, recipe)
        _record_figures(arm, sets, moved.nats, passed=not reasons)
        found[name] = metrics.of_file(
            model=model,
            path=arm.path,
            trial=arm.trial,
            sets=sets,
            reasons=reasons,
            benign_drift=moved.nats,
            top1_agreement=moved.top1_agreement,
            proof=arm.proof,
            tokens_per_second={side: _speed(log, side, asked) for side in ("baseline", name)},
        )
    # The page shows the control vector as what is steered, and beside it the adapter, where there is one.
    arm_of = {"baseline": "baseline", "steered": "vector"}
    if "adapter" in arms:
        arm_of["adapter"] = "adapter"
    rows = [paired(p, {side: log.rows[f"{name}:{p.id}"] for side, name in arm_of.items()}) for p in asked]
    value = metrics.build(
        recipe=recipe, model=model, model_sha256=model_sha256, judge=judge.name, found=found, subset=subset
    )
    return rows, value


def _answer_side(
    model: Model,
    judge: Judge,
    side: str,
    steering: Steering,
    asked: Sequence[Prompt],
    recipe: Recipe,
    log: RowLog,
    advance: Callable[[int], None],
) -> None:
    missing = [p for p in asked if f"{side}:{p.id}" not in log.rows]
    advance(len(asked) - len(missing))
    for start in range(0, len(missing), _PART):
        part = missing[start : start + _PART]
        answers, confidences, speed = answer_and_judge(
            model,
            judge,
            part,
            steering=steering,
            max_tokens=recipe.answers.test_tokens,
            system=recipe.prompts.system,
            sampling=Sampling(temperature=recipe.answers.temperature, seed=recipe.seed),
            advance=advance,
        )
        for prompt, found, confidence in zip(part, answers, confidences, strict=True):
            log.append(
                {
                    "id": f"{side}:{prompt.id}",
                    **side_row(found, confidence),
                    "tokens_per_second": round(speed, 1),
                }
            )


def _speed(log: RowLog, side: str, asked: Sequence[Prompt]) -> float:
    return float(np.median([log.rows[f"{side}:{p.id}"]["tokens_per_second"] for p in asked]))


def _record_figures(arm: Arm, sets: Mapping[str, Mapping[str, Any]], moved: float, *, passed: bool) -> None:
    """Put what was measured into the file's own metadata."""
    figures: dict[str, Any] = {"measured": True, "gate.passed": passed, "metrics.benign_drift": moved}
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found["refusal_baseline"], found["refusal_steered"]]
    if arm.trial.candidate.estimator == GATE:
        adapter = lora.read(arm.path)
        lora.write(replace(adapter, provenance={**adapter.provenance, **figures}), arm.path)
        return
    vector = control_vector.read(arm.path)
    control_vector.write(
        SteeringVector(vector.directions, {**vector.provenance, **figures}, vector.architecture), arm.path
    )
