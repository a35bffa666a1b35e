"""Search for estimator, ridge, layers and strength on the tune split, with safety as a constraint.

A `Space` and a `CandidateEvaluator` go in. The selected trial comes out, and every trial is kept. TPE
proposes estimators and layers. Each proposal is brought to the strength at which it loses as much harm as
every other, by trials at the level `logprob`, so that proposals can be compared. The best of them then give
short answers, and their strength is moved until a limit binds. The selected candidate answers in full, at
lower strengths until all limits hold, and once more. All methods are searched alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rs_gguf.methods.method import Space
from rs_gguf.models.architecture import searched_layers
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.budget import Budget
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.choice import reason_against_full, select_candidate, select_final
from rs_gguf.search.strength import FARTHEST, STEP, next_candidate

_LEVEL = -math.log(0.9)  # nats that harmful refusal prefixes lose at the strength of a comparison
_NEAR = 1.3  # a loss within this factor of the level is near enough
_STEPS = 3  # `logprob` trials that bring one proposal to the level, at most
_IDLE = 20  # proposals in a row without a new trial: the space is exhausted
_LOGPROB_SHARE, _SHORT_SHARE = 0.25, 0.8  # of a budget: after it no more trials of that level begin
_FULL = 3  # strengths that answer in full, at most, each lower by STEP
_COST = {"logprob": 1, "short": 10, "full": 10}  # of a trial, about, in `logprob` trials


class Finder:
    """Search spaces with one loaded model.

    Every trial is handed to `record` at once, and taken from `known` when the search is resumed: the sampler
    is seeded, so it proposes the same again. `advance` counts seconds if the budget has them, else `effort`.
    """

    def __init__(
        self,
        evaluator: CandidateEvaluator,
        budget: Budget,
        *,
        seed: int,
        known: Sequence[Trial] = (),
        record: Callable[[Trial], None] = lambda trial: None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._evaluator, self._budget, self._seed = evaluator, budget, seed
        self._trials = list(known)
        # Full answers of another number or length say nothing of this search.
        self._known = {
            (trial.fidelity, trial.candidate): trial
            for trial in known
            if trial.fidelity != "full" or trial.size == evaluator.full_size
        }
        self._record, self._advance = record, advance
        self._counted: set[tuple[str, Candidate]] = set()
        self._spent = 0.0  # seconds of the trials that this search is made of, earlier runs included

    @staticmethod
    def effort(budget: Budget, spaces: int) -> int:
        """Return what `advance` counts up to."""
        if budget.seconds is not None:
            return math.ceil(budget.seconds)
        effort = budget.trials * _COST["logprob"] + budget.finalists * _COST["short"]
        return spaces * (effort + (_FULL * _COST["full"] if budget.full else 0))

    @property
    def trials(self) -> list[Trial]:
        """All trials in their order, also of earlier runs."""
        return list(self._trials)

    @property
    def comparable(self) -> list[Trial]:
        """The trials without those whose full answers have another number or length."""
        return list(self._known.values())

    def search(self, space: Space, seconds: float | None = None) -> Trial:
        """Search one space and return the selected trial.

        seconds: time for it, in place of the budget's numbers of trials; at least one candidate answers.
        """
        start = self._spent
        shares = (_LOGPROB_SHARE, _SHORT_SHARE if self._budget.full else 1.0)
        until = [None if seconds is None else start + share * seconds for share in shares]
        proposals = self._proposals(space, until[0])
        ranked = self._ranked([*proposals, *self._of_longer_searches(space, proposals)], space)
        known = [
            candidate for fidelity, candidate in self._known if fidelity == "short" and space.holds(candidate)
        ]
        answered = [self._measured("short", candidate) for candidate in known]
        # Short trials from before the last proposal are of a shorter search, and do not use up this budget.
        newest = max(trial.number for trial in proposals)
        due = self._budget.finalists + sum(trial.number < newest for trial in answered)
        while self._goes_on(answered, due, until[1]):
            candidate = next_candidate(
                answered, ranked, space.most, self._evaluator.rule, self._evaluator.n_harmful
            )
            if candidate is None:
                break
            answered.append(self._measured("short", candidate))
        selected = select_candidate(answered)
        if self._answers_in_full(selected):
            self._answer_in_full(selected, space, None if seconds is None else start + seconds)
        return select_final([trial for trial in self.comparable if space.holds(trial.candidate)])

    def _answers_in_full(self, selected: Trial) -> bool:
        return self._budget.full > 0 and not reason_against_full(selected)

    def _answer_in_full(self, selected: Trial, space: Space, until: float | None) -> None:
        """Answer in full with the selected candidate, at lower strengths until all limits hold, then once.

        Long answers degenerate under too much strength. A feasible strength below `space.least` is the last.
        """
        tried: list[Trial] = []
        for k in range(_FULL):
            strength = round(selected.candidate.strength / STEP**k, 4)
            feasible = [trial.feasible for trial in tried]
            enough = any(feasible[:-1]) or (any(feasible) and strength < space.least)
            if tried and (enough or not self._goes_on(tried, _FULL, until)):
                break
            tried.append(self._measured("full", replace(selected.candidate, strength=strength)))
        if self._budget.seconds is None:
            self._advance((_FULL - len(tried)) * _COST["full"])

    def _goes_on(self, done: Sequence[Trial], number: int, until: float | None) -> bool:
        """Tell whether one more trial is due: up to a number, or while one of mean cost ends in time."""
        if until is None or not done:
            return len(done) < number
        return self._spent + float(np.mean([trial.seconds for trial in done])) <= until

    def _measured(self, fidelity: str, candidate: Candidate) -> Trial:
        trial = self._known.get((fidelity, candidate))
        if trial is None:
            number = 1 + max((trial.number for trial in self._trials), default=-1)
            trial = self._evaluator.measure(fidelity, number, candidate)
            # A resumed search measures the unsteered side again, which counts once.
            if any((known.fidelity == "full") == (fidelity == "full") for known in self._known.values()):
                trial = replace(trial, unsteered_seconds=0.0)
            self._known[fidelity, candidate] = trial
            self._trials.append(trial)
            self._record(trial)
        if (fidelity, candidate) not in self._counted:
            self._counted.add((fidelity, candidate))
            before, self._spent = self._spent, self._spent + trial.seconds + trial.unsteered_seconds
            in_seconds = self._budget.seconds is not None
            self._advance(int(self._spent) - int(before) if in_seconds else _COST[fidelity])
        return trial

    # ---- candidates ------------------------------------------------------------------------------

    def _proposals(self, space: Space, until: float | None) -> list[Trial]:
        """Run TPE over estimator, ridge and layers, with retention and drift as its constraints.

        Returns the trial of each proposal that is nearest to the level.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        last_layer = searched_layers(self._evaluator.model.n_layer)[-1]
        names = list(space.directions)
        sampler = optuna.samplers.TPESampler(seed=self._seed, n_startup_trials=len(space.start))
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for point in space.start:
            study.enqueue_trial(
                {
                    "directions": names.index((point.estimator, point.ridge)),
                    "first": point.first,
                    "length": point.last - point.first + 1,
                }
            )
        strengths: dict[tuple[str, float], float] = {}
        trials: list[Trial] = []
        levelled: dict[Candidate, Trial] = {}
        idle = n_proposals = 0
        while idle < _IDLE and self._goes_on(trials, self._budget.trials, until):
            trial, before = study.ask(), len(self._counted)
            name = estimator, ridge = names[trial.suggest_categorical("directions", list(range(len(names))))]
            first = trial.suggest_int("first", *space.first)
            length = trial.suggest_int("length", *space.length)
            last = max(first, min(first + length - 1, last_layer))
            # The best guess is the strength that brought this direction to the level in other layers. All are
            # calibrated alike, so for a new direction it is the strength of the one before.
            strength = strengths.get(name) or next(reversed(strengths.values()), space.start[0].strength)
            candidate = Candidate(space.method, estimator, ridge, first, last, strength, space.benign_target)
            if candidate.without_strength() in levelled:
                candidate = levelled[candidate.without_strength()].candidate
            steps = self._level(candidate, space, self._steps(space, len(trials), n_proposals, until))
            n_proposals += 1
            idle = 0 if len(self._counted) > before else idle + 1
            trials += steps if idle == 0 else []
            best = min(steps, key=self._distance)
            strengths[name] = best.candidate.strength
            levelled[best.candidate.without_strength()] = best
            trial.set_constraint("harm and drift above the level", self._loss(best) - _NEAR)
            study.tell(trial, best.sensitive_remaining)
        return list(levelled.values())

    def _steps(self, space: Space, n_trials: int, n_proposals: int, until: float | None) -> int:
        """Return the most trials for a proposal; each start candidate after it needs at least one."""
        if until is not None:
            return _STEPS
        starts_left = max(0, len(space.start) - n_proposals - 1)
        return max(1, min(_STEPS, self._budget.trials - n_trials - starts_left))

    def _level(self, candidate: Candidate, space: Space, most: int) -> list[Trial]:
        """Return at most `most` trials that bring a proposal to the level, within the space's strengths."""
        steps: list[Trial] = []
        while len(steps) < most:
            low, high = space.strength
            candidate = replace(candidate, strength=round(min(max(candidate.strength, low), high), 4))
            if any(step.candidate == candidate for step in steps):
                break
            steps.append(self._measured("logprob", candidate))
            loss = self._loss(steps[-1])
            if 1 / _NEAR <= loss <= _NEAR:
                break
            power = 1.0  # to first order a loss grows with the strength
            if len(steps) > 1:
                (s0, l0), (s1, l1) = ((t.candidate.strength, self._loss(t)) for t in steps[-2:])
                power = min(4.0, max(0.5, math.log(l1 / l0) / math.log(s1 / s0)))
            factor = min(FARTHEST, max(1 / FARTHEST, loss ** (-1 / power)))
            candidate = replace(candidate, strength=candidate.strength * factor)
        return steps

    def _distance(self, trial: Trial) -> float:
        """Return the distance from the level, as the logarithm of a factor."""
        return abs(math.log(self._loss(trial)))

    def _loss(self, trial: Trial) -> float:
        """Return the loss of harmful refusals, or the drift, as a positive multiple of the level."""
        harm = -math.log(max(trial.harmful_retention, 1e-6)) / _LEVEL
        return max(harm, (trial.benign_drift or 0.0) / self._evaluator.rule.max_benign_drift, 1e-3)

    def _of_longer_searches(self, space: Space, proposals: Sequence[Trial]) -> list[Trial]:
        """Return the trials of an earlier, longer search in other layers that are nearest to the level."""
        closest: dict[Candidate, Trial] = {}
        for (fidelity, candidate), trial in self._known.items():
            if fidelity == "logprob" and space.holds(candidate):
                known = closest.setdefault(candidate.without_strength(), trial)
                closest[candidate.without_strength()] = min(known, trial, key=self._distance)
        for trial in proposals:
            closest.pop(trial.candidate.without_strength(), None)
        return list(closest.values())

    def _ranked(self, trials: Sequence[Trial], space: Space) -> list[Candidate]:
        """Return candidates, best first, by what sensitive refusals lose for what harmful ones lose.

        Each has the strength of its trial, but at least `space.least`.
        """

        def strong_enough(candidate: Candidate) -> Candidate:
            return replace(candidate, strength=max(candidate.strength, space.least))

        def merit(trial: Trial) -> float:
            # Losing less than the level has no merit: early layers do, and change little at any strength.
            return -math.log(max(trial.sensitive_remaining, 1e-6)) / max(1.0, self._loss(trial))

        return [strong_enough(trial.candidate) for trial in sorted(trials, key=merit, reverse=True)]
