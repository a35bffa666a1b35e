"""The measure stage: the test split unsteered and under each written file, side by side.

A model, a judge, test prompts, `Arm`s (a control vector, an adapter) and baselines go in; paired rows and the
content of `metrics.json` come out, and each file gets its own figures into its metadata, so that they travel
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.engines.answers import logprobs_of
from rs_gguf.engines.engine import NO_STEERING, Engine, LogProbs, Steering
from rs_gguf.engines.llama import log as llama_log
from rs_gguf.evaluation.paired import (
    SIDES,
    Drift,
    answer_and_judge,
    changes_of,
    drift_of,
    must_stay,
    paired,
    side_row,
    spread,
    summarise_kinds,
)
from rs_gguf.evaluation.safety import gate
from rs_gguf.judges.registry import Judge
from rs_gguf.methods.baselines import Side
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records import metrics
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.rows import Row, RowLog
from rs_gguf.records.trials import GATE, Trial
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.file import server_command

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
    model: Engine,
    judge: Judge,
    asked: Sequence[Prompt],
    arms: Mapping[str, Arm],
    baselines: Sequence[Side],
    recipe: Recipe,
    log: RowLog,
    *,
    model_sha256: str,
    subset: bool,
    advance: Callable[[int], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Paired rows of all arms, and the content of `metrics.json` but for `seconds` and `rank_correlation`."""
    own = recipe.prompts.system
    sides = [Side("baseline", NO_STEERING, own), *baselines]
    sides += [Side(name, arm.steering, own) for name, arm in arms.items()]
    for side in sides:
        _answer_side(model, judge, side, asked, recipe, log, advance)
    before = [log.rows[f"baseline:{p.id}"] for p in asked]
    moved = _Drifts(model, asked, before, recipe)
    rows_of, drifts, changes = {}, {}, {}
    for side in sides[1:]:
        pairs = zip(asked, before, strict=True)
        rows_of[side.name] = [
            paired(p, {"baseline": b, "steered": log.rows[f"{side.name}:{p.id}"]}) for p, b in pairs
        ]
        drifts[side.name], changes[side.name] = moved.under(side)
    others = [
        metrics.of_baseline(b.name, summarise_kinds(rows_of[b.name]), drifts[b.name].nats) for b in baselines
    ]
    reasoning_off = ChatFormat.of(model).thinks_in_server
    found = {}
    for name, arm in arms.items():
        sets = summarise_kinds(rows_of[name])
        reasons = gate(sets, drifts[name].nats, recipe.safety, feasible=bool(arm.trial.feasible))
        _record_figures(arm, sets, drifts[name].nats, passed=not reasons)
        found[name] = metrics.of_file(
            path=arm.path,
            trial=arm.trial,
            sets=sets,
            reasons=reasons,
            notes=metrics.beside(sets, others, recipe.effect),
            spread=spread(rows_of[name], changes[name], seed=recipe.seed),
            benign_drift=drifts[name].nats,
            top1_agreement=drifts[name].top1_agreement,
            proof=arm.proof,
            tokens_per_second=(_speed(log, "baseline", asked), _speed(log, name, asked)),
            llama_cpp=_llama_cpp(model.path, arm, reasoning_off=reasoning_off),
        )
    arm_of = {"baseline": "baseline", **{SIDES[name]: name for name in arms}}
    rows = [paired(p, {side: log.rows[f"{name}:{p.id}"] for side, name in arm_of.items()}) for p in asked]
    facts = {
        "name": models.name_of(recipe.model, model.path),
        "sha256": model_sha256,
        "architecture": model.architecture,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
    }
    value = metrics.build(
        effect=recipe.effect, model=facts, judge=judge.name, test_tokens=recipe.answers.test_tokens,
        seed=recipe.seed, found=found, baselines=others, subset=subset,
    )  # fmt: skip
    return rows, value


def _llama_cpp(model: Path, arm: Arm, *, reasoning_off: bool) -> dict[str, Any]:
    """Return how llama.cpp loads the file, and which build of it is here.

    reasoning_off: llama.cpp must be told not to think, as here (`ChatFormat.thinks_in_server`).
    """
    candidate = arm.trial.candidate
    layers = None if candidate.estimator == GATE else (candidate.first, candidate.last)
    return {
        "command": server_command(model, arm.path, layers, reasoning_off=reasoning_off),
        "reasoning_off": reasoning_off,
        "build": llama_log.build(),
    }


class _Drifts:
    """How far a side moves the unsteered answers to benign prompts.

    The recipe's system prompt is that which they were given under; their log-probabilities there are known
    once.
    """

    def __init__(self, model: Engine, asked: Sequence[Prompt], before: Sequence[Row], recipe: Recipe) -> None:
        self._model = model
        answers = {
            prompt.id: Answer.from_row(row)
            for prompt, row in zip(asked, before, strict=True)
            if prompt.kind == "benign" and must_stay(row)
        }
        # Prompts lie sorted by subject: the first of them would be of a few.
        self._quiet = stratified([p for p in asked if p.id in answers], _DRIFT_PAIRS, seed=recipe.seed)
        self._answers = [answers[prompt.id] for prompt in self._quiet]
        self._before = self._logprobs(recipe.prompts.system)

    def under(self, side: Side) -> tuple[Drift, list[tuple[Prompt, float]]]:
        """The drift, and of each conversation its |Δ mean log-probability|."""
        with self._model.steered(side.steering):
            after = self._logprobs(side.system)
        changes = changes_of(self._before, after).tolist()
        return drift_of(self._before, after), list(zip(self._quiet, changes, strict=True))

    def _logprobs(self, system: str | None) -> LogProbs:
        return logprobs_of(self._model, self._quiet, self._answers, system)


def _answer_side(
    model: Engine,
    judge: Judge,
    side: Side,
    asked: Sequence[Prompt],
    recipe: Recipe,
    log: RowLog,
    advance: Callable[[int], None],
) -> None:
    missing = [p for p in asked if f"{side.name}:{p.id}" not in log.rows]
    advance(len(asked) - len(missing))
    for start in range(0, len(missing), _PART):
        part = missing[start : start + _PART]
        answers, graded, speed = answer_and_judge(
            model,
            judge,
            part,
            steering=side.steering,
            max_tokens=recipe.answers.test_tokens,
            system=side.system,
            sampling=recipe.sampling,
            advance=advance,
        )
        for prompt, found, judgement in zip(part, answers, graded, strict=True):
            log.append(
                {
                    "id": f"{side.name}:{prompt.id}",
                    **side_row(found, judgement),
                    "tokens_per_second": round(speed, 1),
                }
            )


def _speed(log: RowLog, side: str, asked: Sequence[Prompt]) -> float:
    return float(np.median([log.rows[f"{side}:{p.id}"]["tokens_per_second"] for p in asked]))


def _record_figures(arm: Arm, sets: Mapping[str, Mapping[str, Any]], moved: float, *, passed: bool) -> None:
    """Put what was measured into the file's own metadata."""
    figures: dict[str, Any] = {"measured": True, "gate.passed": passed}
    if math.isfinite(moved):  # no number where no benign prompt was answered
        figures["metrics.benign_drift"] = moved
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found["refusal_baseline"], found["refusal_steered"]]
    if arm.trial.candidate.estimator == GATE:
        adapter = lora.read(arm.path)
        lora.write(replace(adapter, provenance={**adapter.provenance, **figures}), arm.path)
    else:
        vector = control_vector.read(arm.path)
        control_vector.write(replace(vector, provenance={**vector.provenance, **figures}), arm.path)
