"""The measure stage: the test split unsteered and under each written file, side by side.

A model, a judge, test prompts, `WrittenFile`s (a control vector, an adapter) and baselines go in; paired rows
and the content of `metrics.json` come out, and each file gets its own figures into its metadata, so that they
travel with it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
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
from rs_gguf.evaluation.safety import Allowance, Effect
from rs_gguf.evaluation.side import Arm, Side, resume_side
from rs_gguf.judges.registry import Judge
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import (
    Acceptance,
    BaselineRecord,
    BaselineSet,
    EffectCheck,
    FileRecord,
    JudgeRecord,
    LlamaCpp,
    ModelRecord,
    RunRecord,
    SetRecord,
    Speed,
)
from rs_gguf.records.rows import Row, RowLog
from rs_gguf.records.trials import Trial
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.file import SteeringFile
from rs_gguf.version import __version__

_DRIFT_PAIRS = 128  # conversations, as in the paper


@dataclass(frozen=True)
class WrittenFile:
    """The written files of a method, the trial that they were chosen by, and what their proof showed."""

    paths: Sequence[Path]
    trial: Trial
    proof: Mapping[str, Any]

    @property
    def steering(self) -> Steering:
        return reduce(Steering.with_added, [found.steering(path) for path, found in self.files.items()])

    @property
    def files(self) -> dict[Path, SteeringFile]:
        """What stands in the files now."""
        return {path: steering_file.read(path) for path in self.paths}


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
) -> tuple[list[Row], RunRecord]:
    """Return paired rows of all files, and the record without `seconds` and `rank_correlation`."""
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
    others = [_baseline(arm.name, evaluations[arm.name], drifts[arm.name]) for arm in baselines]
    reasoning_off = ChatFormat.of(model).thinks_in_server
    found = {}
    for name, file in files.items():
        evaluation, drift = evaluations[name], drifts[name]
        feasible = bool(file.trial.feasible)
        reasons = recipe.safety.reasons(evaluation, Allowance.REPORTED, feasible=feasible)
        sets = evaluation.by_kind()
        _record_figures(file, sets, drift.nats, passed=not reasons)
        found[name] = file_record(
            file,
            sets,
            drift,
            reasons=reasons,
            notes=beside(sets, others, recipe.effect),
            bootstrap=spread(evaluation, changes[name], seed=recipe.seed),
            speed=Speed(unsteered=before.tokens_per_second, steered=sides[name].tokens_per_second),
            llama_cpp=_llama_cpp(model.path, file, reasoning_off=reasoning_off),
        )
    columns = [evaluations[name].rows(SIDES[name]) for name in files]
    rows = [{k: v for part in parts for k, v in part.items()} for parts in zip(*columns, strict=True)]
    record = RunRecord(
        date=datetime.date.today().isoformat(),
        tool=f"rs-gguf {__version__}",
        effect=recipe.effect,
        model=ModelRecord(
            name=models.name_of(recipe.model, model.path),
            sha256=model_sha256,
            architecture=model.architecture,
            n_layer=model.n_layer,
            n_embd=model.n_embd,
        ),
        judge=JudgeRecord(name=judge.name),
        test_tokens=recipe.answers.test_tokens,
        subset=subset,
        seed=recipe.seed,
        files=found,
        baselines=tuple(others),
    )
    return rows, record


def file_record(
    file: WrittenFile,
    sets: Mapping[str, SetRecord],
    drift: Drift,
    *,
    reasons: Sequence[str],
    notes: Sequence[str],
    bootstrap: Mapping[str, tuple[float, float] | None],
    speed: Speed,
    llama_cpp: LlamaCpp,
) -> FileRecord:
    """Return what was measured of one written file, and how to use it.

    reasons: why it fails the safety rule, empty where it passes.
    """
    candidate, harmful = file.trial.candidate, sets["harmful"]
    before, after = harmful.refused_unsteered, harmful.refused_steered
    return FileRecord(
        file=file.paths[0].name,
        sha256=sha256(file.paths[0]),
        estimator=candidate.recorded,
        ridge=candidate.ridge,
        layers=(candidate.first, candidate.last),
        strength=candidate.strength,
        margin=candidate.margin,
        scale=1.0,
        sets=dict(sets),
        benign_drift=drift.nats,
        top1_agreement=drift.top1_agreement,
        harmful_refusal_ratio=after / before if before else None,
        bootstrap_ci95=dict(bootstrap),
        effect_check=EffectCheck.model_validate(dict(file.proof)),
        acceptance=Acceptance(verdict="failed" if reasons else "passed", reasons=tuple(reasons)),
        notes=tuple(notes),
        tokens_per_second=speed,
        llama_cpp=llama_cpp,
    )


def beside(sets: Mapping[str, SetRecord], baselines: Sequence[BaselineRecord], effect: Effect) -> list[str]:
    """Return a sentence for each baseline that a file with these `sets` does not beat.

    To beat it is to change refusals of sensitive prompts, and more of them, while no fewer harmful ones stay
    refused; above the unsteered share of these nothing is gained.
    """
    notes = []
    sensitive, harmful = sets["sensitive"], sets["harmful"]
    sign = 1 if effect == "remove" else -1
    for baseline in baselines:
        other = baseline.sets
        least = (sign * other["sensitive"].refusal, sign * sensitive.refusal_unsteered)
        changes_more = sign * sensitive.refusal_steered < min(least)
        needed = min(other["harmful"].refusal, harmful.refusal_unsteered)
        if not changes_more or harmful.refusal_steered < needed:
            notes.append(
                f"does not beat the baseline “{baseline.name}”: sensitive prompts refused "
                f"{sensitive.refusal_steered:.0%} against {other['sensitive'].refusal:.0%}, harmful "
                f"ones {harmful.refusal_steered:.0%} against {other['harmful'].refusal:.0%} "
                f"(unsteered {sensitive.refusal_unsteered:.0%} and {harmful.refusal_unsteered:.0%})"
            )
    return notes


def _baseline(name: str, evaluation: PairedEvaluation, drift: Drift) -> BaselineRecord:
    sets = {
        kind: BaselineSet(
            kind=kind,
            n=found.n,
            refusal=found.refusal_steered,
            ci95=found.ci95_steered,
            degenerate=found.degenerate_steered,
        )
        for kind, found in evaluation.by_kind().items()
    }
    return BaselineRecord(name=name, sets=sets, benign_drift=drift.nats)


def _llama_cpp(model: Path, file: WrittenFile, *, reasoning_off: bool) -> LlamaCpp:
    """Return how llama.cpp loads the file, and which build of it is here.

    reasoning_off: llama.cpp must be told not to think, as here (`ChatFormat.thinks_in_server`).
    """
    return LlamaCpp(
        command=steering_file.server_command(model, file.files, reasoning_off=reasoning_off),
        build=llama_log.build(),
        reasoning_off=reasoning_off,
    )


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


def _record_figures(file: WrittenFile, sets: Mapping[str, SetRecord], moved: float, *, passed: bool) -> None:
    """Put what was measured into the file's own metadata."""
    figures: dict[str, Any] = {"measured": True, "gate.passed": passed}
    if math.isfinite(moved):  # no number where no benign prompt was answered
        figures["metrics.benign_drift"] = moved
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found.refusal_unsteered, found.refusal_steered]
    for path, content in file.files.items():
        steering_file.write(content.with_facts(figures), path)
