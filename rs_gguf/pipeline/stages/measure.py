"""The measure stage: the test split unsteered and under each written file, side by side.

A model, a judge, test prompts, `WrittenFile`s (a control vector, an adapter) and baselines go in; paired rows
and the content of `metrics.json` come out, and each file gets its own figures into its metadata, so that they
travel with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rs_gguf.engines.answers import logprobs_of
from rs_gguf.engines.engine import NO_STEERING, Engine, LogProbs, Steering
from rs_gguf.engines.llama import log as llama_log
from rs_gguf.evaluation.paired import (
    SIDES,
    Drift,
    PairedEvaluation,
    changes_of,
    drift_of,
    must_stay,
    spread,
)
from rs_gguf.evaluation.safety import Allowance
from rs_gguf.evaluation.side import Arm, Side, resume_side
from rs_gguf.judges.registry import Judge
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records import metrics
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.rows import Row, RowLog
from rs_gguf.records.trials import GATE, Trial
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.file import server_command

_DRIFT_PAIRS = 128  # conversations, as in the paper


@dataclass(frozen=True)
class WrittenFile:
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
    files: Mapping[str, WrittenFile],
    baselines: Sequence[Arm],
    recipe: Recipe,
    log: RowLog,
    *,
    model_sha256: str,
    subset: bool,
    advance: Callable[[int], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Return paired rows of all files, and `metrics.json` without `seconds` and `rank_correlation`."""
    own = recipe.prompts.system
    asking = recipe.asking(recipe.answers.test_tokens)
    arms = [Arm("baseline", NO_STEERING, own), *baselines]
    arms += [Arm(name, file.steering, own) for name, file in files.items()]
    sides = {arm.name: resume_side(model, judge, arm, asked, asking, log, advance) for arm in arms}
    before = sides["baseline"]
    moved = _Drifts(model, asked, before, recipe)
    evaluations, drifts, changes = {}, {}, {}
    for arm in arms[1:]:
        drifts[arm.name], changes[arm.name] = moved.under(arm)
        evaluations[arm.name] = PairedEvaluation(asked, before, sides[arm.name], drifts[arm.name])
    others = [
        metrics.of_baseline(b.name, _figures(evaluations[b.name]), drifts[b.name].nats) for b in baselines
    ]
    reasoning_off = ChatFormat.of(model).thinks_in_server
    found = {}
    for name, file in files.items():
        evaluation = evaluations[name]
        feasible = bool(file.trial.feasible)
        reasons = recipe.safety.reasons(evaluation, Allowance.REPORTED, feasible=feasible)
        sets = _figures(evaluation)
        _record_figures(file, sets, drifts[name].nats, passed=not reasons)
        found[name] = metrics.of_file(
            path=file.path,
            trial=file.trial,
            sets=sets,
            reasons=reasons,
            notes=metrics.beside(sets, others, recipe.effect),
            spread=spread(evaluation, changes[name], seed=recipe.seed),
            benign_drift=drifts[name].nats,
            top1_agreement=drifts[name].top1_agreement,
            proof=file.proof,
            tokens_per_second=(before.tokens_per_second, sides[name].tokens_per_second),
            llama_cpp=_llama_cpp(model.path, file, reasoning_off=reasoning_off),
        )
    columns = [evaluations[name].rows(SIDES[name]) for name in files]
    rows = [{k: v for part in parts for k, v in part.items()} for parts in zip(*columns, strict=True)]
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


def _figures(evaluation: PairedEvaluation) -> dict[str, dict[str, Any]]:
    return {kind: found.figures() for kind, found in evaluation.by_kind().items()}


def _llama_cpp(model: Path, file: WrittenFile, *, reasoning_off: bool) -> dict[str, Any]:
    """Return how llama.cpp loads the file, and which build of it is here.

    reasoning_off: llama.cpp must be told not to think, as here (`ChatFormat.thinks_in_server`).
    """
    candidate = file.trial.candidate
    layers = None if candidate.estimator == GATE else (candidate.first, candidate.last)
    return {
        "command": server_command(model, file.path, layers, reasoning_off=reasoning_off),
        "reasoning_off": reasoning_off,
        "build": llama_log.build(),
    }


class _Drifts:
    """How far an arm moves the unsteered answers to benign prompts.

    The recipe's system prompt is that which they were given under; their log-probabilities there are known
    once.
    """

    def __init__(self, model: Engine, asked: Sequence[Prompt], before: Side, recipe: Recipe) -> None:
        self._model = model
        sides = zip(asked, before.answers, before.judgements, strict=True)
        answers = {
            prompt.id: answer
            for prompt, answer, judgement in sides
            if prompt.kind == "benign" and must_stay(answer, judgement)
        }
        # Prompts lie sorted by subject: the first of them would be of a few.
        self._quiet = stratified([p for p in asked if p.id in answers], _DRIFT_PAIRS, seed=recipe.seed)
        self._answers = [answers[prompt.id] for prompt in self._quiet]
        self._before = self._logprobs(recipe.prompts.system)

    def under(self, arm: Arm) -> tuple[Drift, list[tuple[Prompt, float]]]:
        """The drift, and of each conversation its |Δ mean log-probability|."""
        with self._model.steered(arm.steering):
            after = self._logprobs(arm.system)
        changes = changes_of(self._before, after).tolist()
        return drift_of(self._before, after), list(zip(self._quiet, changes, strict=True))

    def _logprobs(self, system: str | None) -> LogProbs:
        return logprobs_of(self._model, self._quiet, self._answers, system)


def _record_figures(
    file: WrittenFile, sets: Mapping[str, Mapping[str, Any]], moved: float, *, passed: bool
) -> None:
    """Put what was measured into the file's own metadata."""
    figures: dict[str, Any] = {"measured": True, "gate.passed": passed}
    if math.isfinite(moved):  # no number where no benign prompt was answered
        figures["metrics.benign_drift"] = moved
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found["refusal_baseline"], found["refusal_steered"]]
    if file.trial.candidate.estimator == GATE:
        adapter = lora.read(file.path)
        lora.write(replace(adapter, provenance={**adapter.provenance, **figures}), file.path)
    else:
        vector = control_vector.read(file.path)
        control_vector.write(replace(vector, provenance={**vector.provenance, **figures}), file.path)
