"""The tune stage: a search for each file that the run writes, kept trial by trial, and what it chose.

The `Rungs` of a fitted run and its recipe go in; `trials.jsonl` and `tune.json` in the run folder come out.
The search itself is in `rs_gguf.search.finder`.
"""

from __future__ import annotations

from rs_gguf.methods import METHODS
from rs_gguf.pipeline.folder import RunFolder, key_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Progress
from rs_gguf.records.rows import read_json, write_json
from rs_gguf.records.trials import Trial, chosen_of, load_trials
from rs_gguf.search.choice import summary
from rs_gguf.search.finder import Finder
from rs_gguf.search.rungs import Rungs


def tune(rungs: Rungs, recipe: Recipe, folder: RunFolder, progress: Progress, *, fit_key: str) -> None:
    """Search for the best candidate of each method that was fitted.

    `fit_key` is that of the fit stage: under it and the recipe's limits, trials of an earlier search count.
    """
    # A measured candidate stays what it is when the search gets more time or less; one that answered in full
    # tells for how many prompts and tokens that was.
    limits = recipe.tune.model_dump(exclude={"trials", "finalists", "budget", "full"})
    key, path = key_of(fit_key, limits), folder / "tune.json"
    log = folder.log("trials.jsonl", key)
    if path.is_file() and (ended := read_json(path)).get("key") == key:
        for row in ended["trials"]:
            if str(row["number"]) not in log.rows:  # the log may have been cut short right here
                log.append({"id": str(row["number"]), **row})
    spaces = {
        name: METHODS[name].space(fitted, rungs.model.n_layer, recipe.effect)
        for name, fitted in rungs.fitted.items()
    }
    with progress.stage("tune", Finder.effort(recipe.budget, len(spaces))) as advance:
        finder = Finder(
            rungs,
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
            found = summary(finder.trials, spaces)
            write_json(path, {"key": key, **found})
    log.finish(list(log.rows))


def chosen(folder: RunFolder) -> dict[str, Trial]:
    """The chosen trial of each method that was searched, by its name."""
    tuned = read_json(folder / "tune.json")
    trials = {trial.number: trial for trial in load_trials(tuned["trials"])}
    numbers = chosen_of(tuned)
    return {name: trials[numbers[name]] for name in METHODS if name in numbers}
