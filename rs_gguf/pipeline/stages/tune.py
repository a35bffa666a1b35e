"""The tune stage: a search for each file that the run writes, kept trial by trial, and what it chose.

A fitted run goes in; `trials.jsonl` and `tune.json` in its folder come out.
The search itself is in `rs_gguf.search.finder`.
"""

from __future__ import annotations

from typing import Any

from rs_gguf.methods import METHODS
from rs_gguf.pipeline.costs import CHANGED, KEPT, NEW, ROW, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import RunFolder, key_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Progress, Run, Stage
from rs_gguf.pipeline.stages.answers import unsteered
from rs_gguf.pipeline.stages.fit import load
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.rows import read_json, write_json
from rs_gguf.records.trials import Trial, load_trials
from rs_gguf.search.candidate_evaluation import BENIGN, LOGPROB_PAIRS, PREFIX_TOKENS, CandidateEvaluator
from rs_gguf.search.choice import summary
from rs_gguf.search.finder import Finder
from rs_gguf.search.stopping import Answering

_ANSWERED = 0.6  # share of its prompts that a candidate answers: most break a limit beyond recovery before


class Tune(Stage):
    """The search for the layers and the strength of each file."""

    info = STAGES["tune"]

    def inputs(self, run: Run) -> list[Any]:
        recipe = run.recipe
        used = recipe.tune.model_dump(exclude={"min_top1"})  # a limit of the measurement alone
        return [used, recipe.tune.full_prompts and recipe.answers.test_tokens]

    def work(self, run: Run, key: str) -> None:
        tune(evaluator(run), run.recipe, run.folder, run.progress, fit_key=run.key("fit"))

    def cost(self, costs: Costs) -> Cost:
        recipe, sizes = costs.recipe, costs.sizes["tune"]
        tokens, long, benign = recipe.answers.tokens, recipe.answers.test_tokens, min(BENIGN, sizes["benign"])
        wanted = CHANGED * sizes["sensitive"]
        opened, asked = wanted + KEPT * sizes["harmful"], _ANSWERED * (wanted + sizes["harmful"] + benign)
        probe = costs.reading(opened * (costs.prompt + PREFIX_TOKENS))
        probe += costs.drift(min(LOGPROB_PAIRS, benign), tokens)
        candidate = costs.answers(asked, tokens) + costs.judgements(NEW * asked, tokens)
        # The drift also reads those that a second run confirms.
        candidate += _ANSWERED * costs.drift(benign + CHANGED * wanted, tokens)
        probes: float = costs.files * recipe.tune.logprob_trials
        candidates: float = costs.files * recipe.tune.finalists
        # At full length the unsteered model answers too, and each file at two strengths.
        full: float = sum(min(recipe.tune.full_prompts, size) for size in sizes.values())
        full *= 1 + 2 * costs.files * _ANSWERED
        in_full = costs.answers(full, long) + costs.judgements(full, long)
        in_full += 2 * costs.files * costs.drift(benign if full else 0, tokens)
        seconds = probes * probe + candidates * candidate
        if recipe.tune.budget is not None:
            share = max(0.0, recipe.tune.budget - in_full) / seconds if seconds else 0.0
            seconds, probes, candidates = share * seconds, share * probes, share * candidates
        return Cost(
            seconds + in_full,
            costs.memory(logits=True),
            (probes + candidates) * ROW + costs.adapter() * probes / costs.files,
            (probes * opened + candidates * asked + full) * costs.prompt,
            candidates * asked * mean_length(tokens) + full * mean_length(long),
        )


def evaluator(run: Run, answering: Answering = Answering.STOPPING) -> CandidateEvaluator:
    """Return what measures candidates of this run, once it is fitted."""
    recipe, fitted = run.recipe, load(run.folder.path, run.recipe.fit_options)
    return CandidateEvaluator(
        run.model, run.judge, unsteered(run.folder, run.prompts["tune"]), fitted, run.folder.path,
        short=recipe.asking(recipe.answers.tokens), full=recipe.asking(recipe.answers.test_tokens),
        n_full=recipe.tune.full_prompts, rule=recipe.safety, seed=recipe.seed, answering=answering,
    )  # fmt: skip


def tune(
    evaluator: CandidateEvaluator, recipe: Recipe, folder: RunFolder, progress: Progress, *, fit_key: str
) -> None:
    """Search for the best candidate of each method that was fitted.

    `fit_key` is that of the fit stage: under it and the recipe's limits, trials of an earlier search count.
    """
    # A measured candidate stays what it is when the search gets more time or less; one that answered in full
    # tells for how many prompts and tokens that was.
    limits = recipe.tune.model_dump(include={"min_retention", "max_benign_drift"})
    key, path = key_of(fit_key, limits), folder / "tune.json"
    log = folder.log("trials.jsonl", key)
    if path.is_file() and (ended := read_json(path)).get("key") == key:
        for row in ended["trials"]:
            if str(row["number"]) not in log.rows:  # the log may have been cut short right here
                log.append({"id": str(row["number"]), **row})
    spaces = {
        name: METHODS[name].space(fitted, evaluator.model.n_layer, recipe.effect)
        for name, fitted in evaluator.fitted.items()
    }
    with progress.stage("tune", Finder.effort(recipe.budget, len(spaces))) as advance:
        finder = Finder(
            evaluator,
            recipe.budget,
            seed=recipe.seed,
            known=load_trials(list(log.rows.values())),
            record=lambda trial: log.append({"id": str(trial.number), **trial.to_row()}),
            advance=advance,
        )
        budget = recipe.tune.budget
        try:
            for space in spaces.values():
                finder.search(space, None if budget is None else budget / len(spaces))
        finally:  # also when interrupted: the best so far is kept, and the search goes on from there
            found = summary(finder.comparable, spaces)
            found["trials"] = [trial.to_row() for trial in finder.trials]
            write_json(path, {"key": key, **found})
    log.finish(list(log.rows))


def chosen(folder: RunFolder) -> dict[str, Trial]:
    """The chosen trial of each method that was searched, by its name."""
    tuned = read_json(folder / "tune.json")
    trials = {trial.number: trial for trial in load_trials(tuned["trials"])}
    numbers = tuned["selected"]
    return {name: trials[numbers[name]] for name in METHODS if name in numbers}
