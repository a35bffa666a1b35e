"""Compare the search that stops what is decided with searches that answer every prompt, on several seeds.

Takes a fitted run (`rs-export fit`); without one it makes a small one. Each seed draws its own share of the
tune split and proposes its own candidates. Three searches take turns:

- `whole` answers all prompts of a trial at once, and in full with every feasible method;
- `parts` does the same with harmful prompts first, in a batch of their own;
- `stopping` is what `rs-export tune` does: it stops a trial once a limit is broken beyond recovery, and does
  not answer in full with a method that has nothing to win.

Between `whole` and `parts` only the form of the batches differs, so what they do not agree on is chance.
Prints the selected candidates, their figures, the answers and the seconds in Markdown. No judgement of an
earlier search is reused.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rs_gguf.judges.registry import open_judge_spec
from rs_gguf.methods import METHODS
from rs_gguf.methods.method import Space
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.run import open_run, run
from rs_gguf.pipeline.stages.answers import unsteered
from rs_gguf.pipeline.stages.fit import load as load_fit
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.trials import Trial
from rs_gguf.search.budget import Budget
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.choice import summary
from rs_gguf.search.finder import Finder
from rs_gguf.search.stopping import Answering
from rs_gguf.search.unsteered import UnsteeredAnswers

MODES = {"whole": Answering.WHOLE, "parts": Answering.PARTS, "stopping": Answering.STOPPING}
SMALL = [
    "prompts.fit=30", "prompts.gate_only=40", "prompts.tune=24", "fit.estimators=['contrast-wrmd', 'wrmd']",
    "fit.ridges=[1.0]", "tune.logprob_trials=4", "tune.full_prompts=8",
]  # fmt: skip
Evaluators = Callable[[int, Answering], CandidateEvaluator]


class Thorough(Finder):
    """Answers in full with every feasible method, even if it has nothing to win."""

    def _answers_in_full(self, selected: Trial) -> bool:
        return self._budget.full > 0 and bool(selected.feasible)


@dataclass(frozen=True)
class Result:
    """What one search selected for one method, and what it cost.

    reason: why nothing was answered in full; empty if it was. answers, left_out: prompts with and without an
    answer, of all trials.
    """

    seed: int
    mode: str
    method: str
    selected: Trial
    reason: str
    answers: int
    left_out: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, nargs="?", help="folder of a fitted run; by default a small new run"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.75, help="of the tune prompts that a seed draws")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = options.run or scratch / "run"
        if options.run is None:
            run(recipes.load(None, [*SMALL, *options.settings]), folder, until="fit")
        recipe = recipes.load(folder / "recipe.toml", options.settings)
        evaluators, spaces = stack.enter_context(opened(recipe, folder, scratch, options.share))
        print_head()
        results = []
        for result in searches(evaluators, recipe.budget, spaces, range(options.seeds)):
            print(row(result), flush=True)
            results.append(result)
    print_summary(results)


@contextlib.contextmanager
def opened(
    recipe: Recipe, path: Path, scratch: Path, share: float
) -> Iterator[tuple[Evaluators, Mapping[str, Space]]]:
    """Yield what makes an evaluator for a seed, and the spaces of a fitted run."""
    folder = RunFolder(path)
    with (
        folder.locked(),
        open_run(recipe, folder) as fitted_run,
        open_judge_spec(recipe.judge, loaded=fitted_run.model, engine=recipe.engine, cached=False) as judge,
    ):
        model, fitted = fitted_run.model, load_fit(path, recipe.fit_options)
        whole = unsteered(folder, fitted_run.prompts["tune"])

        def evaluator(seed: int, answering: Answering) -> CandidateEvaluator:
            return CandidateEvaluator(
                model, judge, drawn(whole, share, seed), fitted, scratch,
                short=recipe.asking(recipe.answers.tokens), full=recipe.asking(recipe.answers.test_tokens),
                n_full=recipe.tune.full_prompts, rule=recipe.safety, seed=seed, answering=answering,
            )  # fmt: skip

        spaces = {
            name: METHODS[name].space(fit, model.n_layer, recipe.effect) for name, fit in fitted.items()
        }
        yield evaluator, spaces


def drawn(whole: UnsteeredAnswers, share: float, seed: int) -> UnsteeredAnswers:
    """Return a stratified share of the prompts of each kind, in their order."""
    ids: set[str] = set()
    for kind in KINDS:
        prompts = [whole.prompts[i] for i in whole.of(kind)]
        ids |= {prompt.id for prompt in stratified(prompts, round(share * len(prompts)), seed=seed)}
    indices = [i for i, prompt in enumerate(whole.prompts) if prompt.id in ids]
    judged = whole.take(indices)
    return UnsteeredAnswers([whole.prompts[i] for i in indices], judged.answers, judged.judgements)


def searches(
    evaluators: Evaluators, budget: Budget, spaces: Mapping[str, Space], seeds: Sequence[int]
) -> Iterator[Result]:
    """Search with every seed in every mode; the modes take turns. Trials, not seconds, limit a search."""
    budget = replace(budget, seconds=None)
    for seed in seeds:
        turn = seed % len(MODES)
        for mode in [*MODES][turn:] + [*MODES][:turn]:
            finder = (Finder if mode == "stopping" else Thorough)(
                evaluators(seed, MODES[mode]), budget, seed=seed
            )
            for space in spaces.values():
                finder.search(space)
            found = summary(finder.trials, spaces)
            for name, space in spaces.items():
                own = [trial for trial in finder.trials if space.holds(trial.candidate)]
                in_full = any(trial.fidelity == "full" for trial in own)
                yield Result(
                    seed, mode, name,
                    selected=next(trial for trial in own if trial.number == found["selected"][name]),
                    reason="" if in_full else found["no_full_answers"].get(name, "none in the recipe"),
                    answers=sum(trial.answered[0] for trial in own if trial.answered),
                    left_out=sum(trial.left_out for trial in own),
                    seconds=sum(trial.seconds + trial.unsteered_seconds for trial in own),
                )  # fmt: skip


def print_head() -> None:
    print(
        "| seed | method | search | selected | sensitive left | harmful kept | drift | within limits "
        "| answers | left out | seconds | no full answers |"
    )
    print("| --- " * 12 + "|")


def row(result: Result) -> str:
    trial, candidate = result.selected, result.selected.candidate
    left = "–" if trial.left_out else f"{trial.sensitive_remaining:.0%} of {trial.n_sensitive}"
    return (
        f"| {result.seed} | {result.method} | {result.mode} | {candidate.recorded}, λ {candidate.ridge:g}, "
        f"{candidate.first} to {candidate.last}, {candidate.strength:g} ({trial.fidelity}) | {left} "
        f"| {trial.harmful_retention:.0%} | {trial.benign_drift:.3f} | {'yes' if trial.feasible else 'no'} "
        f"| {result.answers} | {result.left_out} | {result.seconds:.0f} | {result.reason} |"
    )


def print_summary(results: Sequence[Result]) -> None:
    """Print how often two searches select the same candidate, and what each cost."""
    by_mode = {mode: [result for result in results if result.mode == mode] for mode in MODES}
    selected = {
        mode: {(one.seed, one.method): one.selected.candidate for one in own} for mode, own in by_mode.items()
    }
    print()
    for one, other in (("whole", "parts"), ("parts", "stopping"), ("whole", "stopping")):
        same = sum(selected[other][key] == candidate for key, candidate in selected[one].items())
        print(f"{one} and {other} select the same candidate {same} times of {len(selected[one])}")
    answers, seconds = (
        {mode: sum(getattr(one, name) for one in own) for mode, own in by_mode.items()}
        for name in ("answers", "seconds")
    )
    for mode in MODES:
        shares = (values[mode] / values["whole"] for values in (answers, seconds) if values["whole"])
        print(f"{mode}: {answers[mode]} answers, {seconds[mode]:.0f} s", *(f"({s:.0%})" for s in shares))


if __name__ == "__main__":
    main()
