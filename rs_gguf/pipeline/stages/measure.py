"""The measure stage: the validation prompts unsteered and under each written file, side by side.

A model, a judge, prompts, `WrittenFile`s and baselines go in. Paired rows and the content of `metrics.json`
come out.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.engine import NO_STEERING, Engine
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, resume_condition
from rs_gguf.evaluation.gate_activation import gate_activation_by_kind, minimal_pairs
from rs_gguf.evaluation.kl import kl_divergences, tokens_read
from rs_gguf.evaluation.outcomes import corrected
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.evaluation.second_judge import second_opinion
from rs_gguf.judges.accuracy import known_accuracy
from rs_gguf.judges.registry import Judge, SecondJudge
from rs_gguf.methods import METHODS
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.costs import NEW, ROW, ROW_TOKEN, Cost, Costs, mean_length
from rs_gguf.pipeline.drifts import DRIFT_PAIRS, BenignDrifts
from rs_gguf.pipeline.folder import key_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages import baselines as baseline_conditions
from rs_gguf.pipeline.stages import wordings
from rs_gguf.pipeline.stages.file_record import (
    WrittenFile,
    baseline_notes,
    file_record,
    llama_cpp_of,
    record_figures,
    search_notes,
)
from rs_gguf.pipeline.stages.tune import chosen
from rs_gguf.pipeline.stages.write import path_of, write_file
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.metrics import (
    BaselineRecord,
    FileRecord,
    JudgeRecord,
    ModelRecord,
    RunRecord,
    Speed,
)
from rs_gguf.records.rows import Row, RowLog, read_json, write_rows
from rs_gguf.version import __version__

_CHANGED = 0.18  # share of the prompts of a side that a second run answers


class Measure(Stage):
    """Measure the validation split; write `metrics.json` and the figures in the files' metadata."""

    info = STAGES["measure"]

    def inputs(self, run: Run) -> list[Any]:
        recipe = run.recipe
        return [
            recipe.answers.test_tokens, recipe.measure.model_dump(), recipe.judge_second,
            run.second_judge_hash, recipe.tune.min_top1, [p.to_row() for p in run.prompts["validation"]],
        ]  # fmt: skip

    def work(self, run: Run, key: str) -> None:
        prompts, folder, recipe = run.prompts["validation"], run.folder, run.recipe
        effects, trials = read_json(folder / "effect_check.json"), chosen(folder)
        for name, trial in trials.items():
            if not path_of(run, name).is_file():  # somebody took it away
                write_file(run, name, trial)
        files = {
            name: WrittenFile(METHODS[name].word, path_of(run, name), trial, effects[name])
            for name, trial in trials.items()
        }
        log = folder.log("measured.jsonl", answers_key(run, prompts, files))
        measured = measure_files(run, prompts, files, log)
        write_rows(folder / "test_answers.jsonl", measured.rows)
        RunRecord(
            date=datetime.date.today().isoformat(),
            tool=f"rs-gguf {__version__}",
            effect=recipe.effect,
            model=ModelRecord(
                name=models.name_of(recipe.model, run.model.path),
                sha256=run.model_hash,
                architecture=run.model.architecture,
                n_layer=run.model.n_layer,
                n_embd=run.model.n_embd,
            ),
            judge=measured.judge,
            test_tokens=recipe.answers.test_tokens,
            subset=len(prompts) < sum(map(len, run.pool["validation"].values())),
            seed=recipe.seed,
            files=measured.files,
            baselines=tuple(measured.baselines),
        ).write(folder / "metrics.json")
        log.keep()

    def cost(self, costs: Costs) -> Cost:
        n, limit = costs.count("validation"), costs.recipe.answers.test_tokens
        sides = 1 + len(costs.recipe.measure.baselines) + costs.files
        seconds = sides * costs.answers(n, limit) + costs.judgements(n + NEW * (sides - 1) * n, limit)
        seconds += sides * costs.drift(min(DRIFT_PAIRS, costs.sizes["validation"]["benign"]), limit)
        seconds += costs.reading(tokens_read(costs.prompt, costs.files))
        again = sides * _CHANGED * n
        seconds += costs.answers(again, limit)
        rows = sides * n + again
        answered = rows * mean_length(limit)
        disk = 2 * (rows * ROW + answered * ROW_TOKEN)
        selection = wordings.cost(costs)
        return Cost(
            seconds + selection.seconds,
            costs.memory(logits=True),
            disk + selection.disk,
            rows * costs.prompt + selection.read,
            answered + selection.answered,
        )


class Measured(NamedTuple):
    """Paired rows of all files, and what metrics.json holds of files and baselines."""

    rows: list[Row]
    files: dict[str, FileRecord]
    baselines: list[BaselineRecord]
    judge: JudgeRecord


def answers_key(run: Run, prompts: Sequence[Prompt], files: Mapping[str, WrittenFile]) -> str:
    """Return a hash of what changes a measured answer or its judgement; files count by their tensors.

    The key of the fit holds the model, the seed, how prompts are answered, and all that baselines are made
    from. Only a part of the search's options decides on the wording of the system prompt.
    """
    recipe = run.recipe
    return key_of(
        run.key("fit"), run.judge.identity, recipe.answers.test_tokens,
        recipe.tune.model_dump(exclude={"logprob_trials", "finalists", "budget", "min_top1"}),
        baseline_conditions.vector_layers(files), [p.to_row() for p in prompts],
        {name: file.weights_hash for name, file in files.items()},
    )  # fmt: skip


def measure_files(
    run: Run,
    prompts: Sequence[Prompt],
    files: Mapping[str, WrittenFile],
    log: RowLog,
    *,
    into_files: bool = True,
) -> Measured:
    """Measure the files of a run beside the baselines of its recipe, with a bar that counts answers.

    log, into_files: as for `measure`.
    """
    names = baseline_conditions.usable(run)
    tuned = wordings.tune_answers(run, log) if "system-prompt" in names else None
    n = wordings.count(run, tuned) if tuned else 0
    judge, second = run.judge, run.second_judge  # loaded before the bar starts: a download has its own
    with run.progress.stage("measure", n + (1 + len(names) + len(files)) * len(prompts)) as advance:
        others = baseline_conditions.build(run, names, files, tuned, log, advance)
        return measure(
            run.model, judge, prompts, files, others, run.recipe, log,
            second=second, advance=advance, into_files=into_files,
        )  # fmt: skip


def measure(
    model: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    files: Mapping[str, WrittenFile],
    baselines: Sequence[Condition],
    recipe: Recipe,
    log: RowLog,
    *,
    second: SecondJudge | None = None,
    advance: Advance,
    into_files: bool = True,
) -> Measured:
    """Answer the prompts under every condition, confirm the changes and apply the acceptance criteria.

    into_files: put the figures into the metadata of each file too, so that they travel with it.
    """
    own = recipe.prompts.system
    asking = recipe.asking(recipe.answers.test_tokens)
    unsteered = Condition("unsteered", NO_STEERING, own)
    steered = {name: Condition(name, file.steering, own) for name, file in files.items()}
    # A baseline may be called as a method is: answers and rows are kept by name.
    baselines = [replace(c, name=f"baseline {c.name}") for c in baselines]
    before = resume_condition(model, judge, unsteered, prompts, asking, log, advance)
    answers = {
        c.name: resume_condition(
            model, judge, c, prompts, asking, log, advance, drafts=before.answers, timed=c.name in steered
        )
        for c in (*baselines, *steered.values())
    }
    drifts = BenignDrifts(model, prompts, before, recipe)
    evaluations = {
        c.name: PairedEvaluation(prompts, before, answers[c.name], drifts.under(c))
        for c in (*baselines, *steered.values())
    }
    for c in (*steered.values(), *baselines):  # files are compared with baselines
        evaluations[c.name] = _confirmed(model, judge, evaluations[c.name], unsteered, c, recipe, log)
    others = [
        BaselineRecord(
            name=c.name.removeprefix("baseline "),
            sets=evaluations[c.name].by_kind(),
            benign_drift=drifts.of[c.name].nats,
            system_prompt=None if c.system == own else c.system,
        )
        for c in baselines
    ]
    opinion = second_opinion(judge, second, {name: evaluations[name] for name in files}) if second else None
    accuracy = known_accuracy(judge)
    kls = kl_divergences(model, [file.steering for file in files.values()], own, drifts.conversations())
    reasoning_off = ChatFormat.of(model).thinks_in_server
    records = {}
    for (name, file), kl in zip(files.items(), kls, strict=True):
        evaluation = evaluations[name]
        decision = recipe.safety.decide(evaluation, Allowance.REPORTED, feasible=bool(file.trial.feasible))
        sets = {kind: corrected(one, accuracy) for kind, one in evaluation.by_kind().items()}
        if into_files:
            record_figures(file, sets, drifts.of[name], decision)
        records[name] = file_record(
            file,
            sets,
            drifts.of[name],
            kl=kl,
            gate_activation=gate_activation_by_kind(
                model, file.steering, file.gates, prompts, answers[name].answers, own, seed=recipe.seed
            ),
            minimal_pairs=minimal_pairs(model, file.steering, file.gates, prompts, own),
            opened_on_subject=opinion.on_subject[name] if opinion else None,
            acceptance=decision.acceptance,
            notes=[
                *search_notes(file.trial, recipe.tune.full_prompts),
                *baseline_notes(sets, others, recipe.effect),
            ],
            drift_ci95=drifts.interval(name),
            speed=Speed(unsteered=before.tokens_per_second, steered=answers[name].tokens_per_second),
            llama_cpp=llama_cpp_of(model.path, file, recipe.engine, reasoning_off=reasoning_off),
        )
    columns = [evaluations[name].rows(name) for name in files] + ([opinion.rows] if opinion else [])
    rows = [{k: v for part in parts for k, v in part.items()} for parts in zip(*columns, strict=True)]
    return Measured(rows, records, others, opinion.judge if opinion else JudgeRecord(name=judge.name))


def _confirmed(
    model: Engine,
    judge: Judge,
    evaluation: PairedEvaluation,
    unsteered: Condition,
    steered: Condition,
    recipe: Recipe,
    log: RowLog,
) -> PairedEvaluation:
    """Answer the changed prompts again on both sides and keep the changes seen twice.

    Prompts and sums have another order, and the seed is the next one: otherwise a run could confirm itself.
    """
    asking = recipe.asking(recipe.answers.test_tokens).again()

    def once_more(condition: Condition, prompts: Sequence[Prompt], first: JudgedAnswers) -> JudgedAnswers:
        twice, drafts = replace(condition, name=f"{condition.name} again"), asking.drafts(first.answers)
        return resume_condition(model, judge, twice, prompts, asking, log, lambda n: None, drafts=drafts)

    def again(indices: Sequence[int]) -> tuple[JudgedAnswers, JudgedAnswers]:
        first = evaluation.take(indices)
        return (
            once_more(unsteered, first.prompts, first.before),
            once_more(steered, first.prompts, first.after),
        )

    return evaluation.confirmed(again)
