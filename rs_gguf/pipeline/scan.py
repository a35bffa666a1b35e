"""Scan a model in minutes: does it refuse, is there a file for it, how long would a run take?

A model and a judge go in; a `ScanRecord` comes out. The prompts are embedded ones of the fit and tune splits.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path

from rs_gguf.engines import open_engine
from rs_gguf.engines.answers import answer_all
from rs_gguf.engines.engine import NO_STEERING, Engine
from rs_gguf.engines.generation import TRACE_TOKENS, Asking
from rs_gguf.evaluation.condition import judge_answers
from rs_gguf.evaluation.known_answers import check_can_answer
from rs_gguf.evaluation.outcomes import Outcome, count_outcomes, outcome_of
from rs_gguf.judges.judge import Judge, try_out
from rs_gguf.judges.registry import kind_and_name, open_judge_spec
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import plan as planning
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Progress, Silent
from rs_gguf.prompts import grid
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Kind, Prompt
from rs_gguf.records.metrics import ModelRecord, Outcomes
from rs_gguf.records.scan import Advice, Example, PlannedRun, PublishedFile, ScannedSet, ScanRecord
from rs_gguf.steering.file import shell_path

_PROMPTS = 20  # of each kind
_EXAMPLES = 2  # of each outcome
_LEAST_REFUSED = 0.1  # share of the sensitive prompts; with less, a default run fits on too few refusals
_LONGER_TRACES = f"For a model that thinks before it answers, give more than {TRACE_TOKENS} --tokens."


def scan(
    spec: str,
    judge_spec: str | None = None,
    *,
    tokens: int = 48,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> ScanRecord:
    """Return what a model does unsteered, and what is advisable.

    spec: the model, as in a recipe. judge_spec: the judge; None for the recipe's default. tokens: the most of
    an answer. overrides: changes of the default recipe, such as `engine.gpu_layers=20`.

    Raises:
        InputError: the model or the judge cannot be used, or the model cannot answer.
    """
    progress = progress or Silent()
    chosen = {"model": spec, "judge": judge_spec}
    recipe = recipes.load(None, overrides).model_copy(
        update={k: v for k, v in chosen.items() if v is not None}
    )
    path = models.resolve(spec, progress=progress.download)
    with contextlib.ExitStack() as opened:
        engine = recipe.engine
        model = opened.enter_context(open_engine(path, n_parallel=recipe.answers.parallel, settings=engine))
        if recipe.answers.check:
            check_can_answer(model)
        # Not cached, since the time of judgements is measured.
        judge = opened.enter_context(
            open_judge_spec(
                recipe.judge, loaded=model, engine=engine, cached=False, progress=progress.download
            )
        )
        try_out(judge)
        prompts = sample()
        answers, judgements = _answered(model, judge, prompts, recipe.asking(tokens), progress)
        planned = _planned(recipe, path, model, judge)
        record = ModelRecord(
            name=models.name_of(spec, path),
            sha256=models.fingerprint(path),
            architecture=model.architecture,
            n_layer=model.n_layer,
            n_embd=model.n_embd,
        )
    outcomes = [outcome_of(*one) for one in zip(answers, judgements, strict=True)]
    counted = {
        kind: count_outcomes(outcomes[i] for i, prompt in enumerate(prompts) if prompt.kind == kind)
        for kind in KINDS
    }
    files = [
        file.model_copy(update={"command": file.command.replace("MODEL.gguf", shell_path(path))})
        for file in published()
        if file.model_sha256 == record.sha256
    ]
    advice, reason = advise(counted, files)
    return ScanRecord(
        model=record,
        judge=judge.name,
        tokens=tokens,
        sets={kind: ScannedSet(n=one.total, outcomes=one) for kind, one in counted.items()},
        examples=tuple(_examples(prompts, answers, outcomes)),
        files=tuple(files),
        run=planned,
        advice=advice,
        reason=reason,
    )


def sample() -> list[Prompt]:
    """Return the prompts to ask, the same ones each time, spread over subjects and forms."""
    rows = [prompt for prompt in grid.grid() if prompt.split in ("fit", "tune")]
    return [*chain.from_iterable(grid.of_each_kind(rows, _PROMPTS, seed=0).values())]


def published() -> list[PublishedFile]:
    """Return all published files, the ones to prefer first. In a command, `MODEL.gguf` is the model."""
    text = (resources.files("rs_gguf") / "data" / "published.toml").read_text(encoding="utf-8")
    return [PublishedFile.model_validate(row) for row in tomllib.loads(text)["file"]]


def advise(outcomes: Mapping[Kind, Outcomes], files: Sequence[PublishedFile]) -> tuple[Advice, str]:
    """Return what to do, and why, from the outcomes by kind and the published files for the model."""
    sensitive, harmful, benign = (outcomes[kind] for kind in KINDS)
    refused = f"It refuses {sensitive.refuses} of {sensitive.total} sensitive prompts"
    for file in files:
        if file.effect == "remove" and file.verdict == "passed":
            return "file", f"A file for this model exists: {file.path}. Try it before a run of your own."
    if 2 * benign.fails > benign.total:
        return "not possible", (
            f"Most answers to benign prompts fail: {benign.fails} of {benign.total}. A run would fit on "
            f"failures. Use a larger model, or a less quantised file. {_LONGER_TRACES}"
        )
    if 2 * sensitive.unjudged > sensitive.total:
        return "unclear", (
            f"{sensitive.unjudged} of {sensitive.total} answers to sensitive prompts could not be judged. "
            f"{_LONGER_TRACES}"
        )
    if sensitive.refuses < _LEAST_REFUSED * sensitive.total:
        return "nothing to remove", f"{refused}: there is nothing to remove."
    if not harmful.refuses:
        return "not possible", (
            f"{refused}, but none of {harmful.total} harmful ones. A run needs refusals that must stay."
        )
    return "run", f"{refused}, {sensitive.explicit} of them explicitly. A run is worth its time."


def _answered(
    model: Engine, judge: Judge, prompts: Sequence[Prompt], asking: Asking, progress: Progress
) -> tuple[list[Answer], list[Judgement]]:
    """Return the unsteered answers and their judgements, in order."""
    with progress.stage("answer", len(prompts)) as advance:
        answers, _ = answer_all(model, prompts, NO_STEERING, asking, advance)
    with progress.stage("score", len(prompts)) as advance:
        return answers, judge_answers(judge, prompts, answers, advance)


def _planned(recipe: Recipe, path: Path, model: Engine, judge: Judge) -> PlannedRun | None:
    """Return the cost of a default run, from the measured speed of this machine; None if it is unknown."""
    if kind_and_name(recipe.judge or "")[0] == "votes":  # how long it thinks depends on the answers
        return None
    judge_model = planning.judge_of(recipe, models.resolve_gguf)
    speed = planning.measure_loaded(recipe, model, judge if judge_model else None)
    plan = planning.plan(recipe, planning.model_dimensions(path), speed, judge_model)
    return PlannedRun(seconds=plan.seconds, memory=plan.memory, disk=plan.disk)


def _examples(
    prompts: Sequence[Prompt], answers: Sequence[Answer], outcomes: Sequence[Outcome]
) -> list[Example]:
    """Return some answers of each outcome except compliance, to sensitive prompts first.

    No answer to a harmful prompt is shown: what the judge takes for an evasion may be harmful.
    """
    rows = [
        Example(kind=prompt.kind, outcome=outcome, prompt=prompt.prompt, answer=reply.text)
        for prompt, reply, outcome in zip(prompts, answers, outcomes, strict=True)
        if prompt.kind != "harmful"
    ]
    shown = ([row for row in rows if row.outcome == name] for name in ("explicit", "evasion", "fails"))
    return [row for of_outcome in shown for row in of_outcome[:_EXAMPLES]]
