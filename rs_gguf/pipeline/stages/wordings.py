"""The part of the measure stage that selects the system prompt of the baseline, on the tune split.

A run and the unsteered answers to its tune prompts go in; the `Condition` of the best wording comes out. The
answers stay in the stage's log.
"""

from __future__ import annotations

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.evaluation.condition import Condition, resume_condition
from rs_gguf.methods import baselines
from rs_gguf.pipeline.costs import CHANGED, NEW, ROW, ROW_TOKEN, Cost, Costs, mean_length
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages.answers import unsteered
from rs_gguf.records.rows import RowLog
from rs_gguf.search.system_prompts import sample, select_system_prompt
from rs_gguf.search.unsteered import UnsteeredAnswers

_PROMPTS = 16  # of each kind, where the recipe has no full answers


def _size(recipe: Recipe) -> int:
    return recipe.tune.full_prompts or _PROMPTS


def _wordings(run: Run) -> list[Condition]:
    recipe = run.recipe
    return baselines.system_prompts(
        run.prompts["fit"], recipe.effect, recipe.prompts.system, seed=recipe.seed
    )


def tune_answers(run: Run, log: RowLog) -> UnsteeredAnswers:
    """Return the unsteered answers to the tune prompts, on which the system prompt is selected.

    A run folder has them; a published folder does not, so there the model answers again.
    """
    prompts = run.prompts["tune"]
    if run.folder.is_done("score", run.key("score")):
        return unsteered(run.folder, prompts)
    plain = Condition("tune", NO_STEERING, run.recipe.prompts.system)
    asking = run.recipe.asking(run.recipe.answers.tokens)
    with run.progress.stage("answer", len(prompts)) as advance:
        judged = resume_condition(run.model, run.judge, plain, prompts, asking, log, advance)
    return UnsteeredAnswers(prompts, judged.answers, judged.judgements)


def count(run: Run, before: UnsteeredAnswers) -> int:
    """Return how many prompts all wordings together answer."""
    recipe = run.recipe
    return len(_wordings(run)) * len(sample(before, recipe.effect, _size(recipe), recipe.seed))


def select(run: Run, before: UnsteeredAnswers, log: RowLog, advance: Advance) -> Condition:
    """Return the best wording; `advance` counts answers."""
    recipe = run.recipe
    return select_system_prompt(
        run.model, run.judge, before, _wordings(run),
        recipe.asking(recipe.answers.tokens), recipe.safety, log,
        n=_size(recipe), seed=recipe.seed, advance=advance,
    )  # fmt: skip


def cost(costs: Costs) -> Cost:
    """Return the cost of the selection; nothing where the recipe has no such baseline."""
    recipe, sizes = costs.recipe, costs.sizes["tune"]
    if "system-prompt" not in recipe.measure.baselines:
        return Cost(0.0, 0.0, 0.0)
    limit, size = recipe.answers.tokens, _size(recipe)
    wordings = len(baselines.system_prompts([], recipe.effect, None, seed=recipe.seed))
    # Of the sensitive prompts, those that are to change.
    n = wordings * sum(
        min(size, rows) for rows in (CHANGED * sizes["sensitive"], sizes["harmful"], sizes["benign"])
    )
    seconds = costs.answers(n, limit) + costs.judgements(NEW * n, limit)
    seconds += costs.drift((1 + wordings) * min(size, sizes["benign"]), limit)
    answered = n * mean_length(limit)
    return Cost(
        seconds, costs.memory(logits=True), n * ROW + answered * ROW_TOKEN, n * costs.prompt, answered
    )
