"""The measure stage: the test split unsteered and under each written file, side by side.

A model, a judge, test prompts, `WrittenFile`s (a control vector, an adapter) and baselines go in; paired rows
and the content of `metrics.json` come out, and each file gets its own figures into its metadata, so that they
travel with it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rs_gguf.engines.answers import logprobs_of
from rs_gguf.engines.engine import NO_STEERING, Engine, LogProbs
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, resume_condition
from rs_gguf.evaluation.paired import (
    SIDES,
    Drift,
    PairedEvaluation,
    bootstrap_intervals,
    changes_of,
    drift_of,
    is_drift_reference,
)
from rs_gguf.evaluation.safety import Allowance
from rs_gguf.judges.registry import Judge
from rs_gguf.methods import baselines as literature
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.costs import NEW, ROW, ROW_TOKEN, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import key_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.file_record import (
    WrittenFile,
    baseline_notes,
    baseline_record,
    file_record,
    llama_cpp_of,
)
from rs_gguf.pipeline.stages.fit import samples
from rs_gguf.pipeline.stages.tune import chosen
from rs_gguf.pipeline.stages.write import files_of, write_files
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.metrics import (
    JudgeRecord,
    ModelRecord,
    RunRecord,
    SetRecord,
    Speed,
)
from rs_gguf.records.rows import Row, RowLog, read_json, write_rows
from rs_gguf.steering import file as steering_file
from rs_gguf.version import __version__

_DRIFT_PAIRS = 128  # conversations, as in the paper


class Measure(Stage):
    """Before and after on the test split, then `metrics.json` and the figures in the files' metadata."""

    info = STAGES["measure"]

    def inputs(self, run: Run) -> list[Any]:
        recipe = run.recipe
        return [
            recipe.answers.test_tokens, recipe.measure.model_dump(), [p.to_row() for p in run.prompts["test"]]
        ]  # fmt: skip

    def work(self, run: Run, key: str) -> None:
        asked, folder, recipe = run.prompts["test"], run.folder, run.recipe
        shown, trials = read_json(folder / "effect_check.json"), chosen(folder)
        for name, trial in trials.items():
            if not all(path.is_file() for path in files_of(run, name)):  # somebody took one away
                write_files(run, name, trial)
        files = {name: WrittenFile(files_of(run, name), trial, shown[name]) for name, trial in trials.items()}
        others = literature.build(
            recipe.measure.baselines, run.prompts["fit"], lambda: samples(run), run.model, folder.path,
            effect=recipe.effect, system=recipe.prompts.system, seed=recipe.seed,
            device=recipe.fit.device,
        )  # fmt: skip
        # A search that was run again may have chosen otherwise: those rows tell nothing of these files.
        key = key_of(key, {name: asdict(trial.candidate) for name, trial in trials.items()})
        log, judge = folder.log("measured.jsonl", key), run.judge
        with run.progress.stage(self.info.name, (1 + len(others) + len(files)) * len(asked)) as advance:
            rows, record = measure(
                run.model, judge, asked, files, others, recipe, log, model_sha256=run.model_hash,
                advance=advance, subset=len(asked) < sum(map(len, run.pool["test"].values())),
            )  # fmt: skip
        write_rows(folder / "test_answers.jsonl", rows)
        tuned = read_json(folder / "tune.json")
        found = {**record.mapping(), "rank_correlation": tuned["rank_correlation"]}
        RunRecord.model_validate(found).write(folder / "metrics.json")
        log.finish(list(log.rows))

    def cost(self, costs: Costs) -> Cost:
        n, limit = costs.count("test"), costs.recipe.answers.test_tokens
        sides = 1 + len(costs.recipe.measure.baselines) + costs.files
        seconds = sides * costs.answers(n, limit) + costs.judgements(n + NEW * (sides - 1) * n, limit)
        seconds += sides * costs.drift(min(_DRIFT_PAIRS, costs.sizes["test"]["benign"]), limit)
        rows = sides * n
        answered = rows * mean_length(limit)
        disk = 2 * (rows * ROW + answered * ROW_TOKEN)
        return Cost(seconds, costs.memory(logits=True), disk, rows * costs.prompt, answered)


def measure(
    model: Engine,
    judge: Judge,
    asked: Sequence[Prompt],
    files: Mapping[str, WrittenFile],
    baselines: Sequence[Condition],
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
    conditions = [Condition("baseline", NO_STEERING, own), *baselines]
    conditions += [Condition(name, file.steering, own) for name, file in files.items()]
    sides = {
        condition.name: resume_condition(model, judge, condition, asked, asking, log, advance)
        for condition in conditions
    }
    before = sides["baseline"]
    moved = _Drifts(model, asked, before, recipe)
    evaluations, drifts, changes = {}, {}, {}
    for condition in conditions[1:]:
        drifts[condition.name], changes[condition.name] = moved.under(condition)
        evaluations[condition.name] = PairedEvaluation(
            asked, before, sides[condition.name], drifts[condition.name]
        )
    others = [
        baseline_record(condition.name, evaluations[condition.name], drifts[condition.name])
        for condition in baselines
    ]
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
            notes=baseline_notes(sets, others, recipe.effect),
            bootstrap=bootstrap_intervals(evaluation, changes[name], seed=recipe.seed),
            speed=Speed(unsteered=before.tokens_per_second, steered=sides[name].tokens_per_second),
            llama_cpp=llama_cpp_of(model.path, file, reasoning_off=reasoning_off),
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


class _Drifts:
    """How far an condition moves the unsteered answers to benign prompts.

    The recipe's system prompt is that which they were given under; their log-probabilities there are known
    once.
    """

    def __init__(self, model: Engine, asked: Sequence[Prompt], before: JudgedAnswers, recipe: Recipe) -> None:
        self._model = model
        sides = zip(asked, before.answers, before.judgements, strict=True)
        answers = {
            prompt.id: answer
            for prompt, answer, judgement in sides
            if prompt.kind == "benign" and is_drift_reference(answer, judgement)
        }
        # Prompts lie sorted by subject: the first of them would be of a few.
        self._prompts = stratified([p for p in asked if p.id in answers], _DRIFT_PAIRS, seed=recipe.seed)
        self._answers = [answers[prompt.id] for prompt in self._prompts]
        self._before = self._logprobs(recipe.prompts.system)

    def under(self, condition: Condition) -> tuple[Drift, list[tuple[Prompt, float]]]:
        """The drift, and of each conversation its |Δ mean log-probability|."""
        with self._model.steered(condition.steering):
            after = self._logprobs(condition.system)
        changes = changes_of(self._before, after).tolist()
        return drift_of(self._before, after), list(zip(self._prompts, changes, strict=True))

    def _logprobs(self, system: str | None) -> LogProbs:
        return logprobs_of(self._model, self._prompts, self._answers, system)


def _record_figures(file: WrittenFile, sets: Mapping[str, SetRecord], moved: float, *, passed: bool) -> None:
    """Put what was measured into the file's own metadata."""
    figures: dict[str, Any] = {"measured": True, "acceptance.passed": passed}
    if math.isfinite(moved):  # no number where no benign prompt was answered
        figures["metrics.benign_drift"] = moved
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found.refusal_unsteered, found.refusal_steered]
    for path, content in file.files.items():
        steering_file.write(content.with_facts(figures), path)
