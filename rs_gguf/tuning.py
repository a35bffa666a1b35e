"""The search for estimator, ridge, layers and strength, on the tune split, with safety as a constraint.

Fitted directions and gates and the unsteered answers go in; the chosen steering and the trade-off it was
chosen from come out (method §6). Two rungs: a *probe* asks in one forward pass whether the model still begins
the refusal that it gave unsteered; the best of them then *answer*, and a judge grades the answers. Control
vectors and gated adapters are searched alike, each in a `Space` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf import lora
from rs_gguf.adapter import Gates
from rs_gguf.errors import InputError
from rs_gguf.evaluation import Answer, Model, Steering, answer_and_judge, chat_tokens, mean_change
from rs_gguf.judges import Judge
from rs_gguf.prompts import Prompt
from rs_gguf.recipe import Recipe
from rs_gguf.search_space import GATE, Candidate, Directions, Space, Trial

_MORE_DEGENERATE = 0.01  # share of answers that may become degenerate, but one in any case

_OPENING = 6  # tokens of an unsteered answer that the probe looks for
_BENIGN = 32  # benign prompts that a candidate answers
_DRIFT_PAIRS = 32
_SMALL_LOSS = 0.05  # nats of a refusal's opening that are noise: no merit in losing less
_FIRST_LOSS = -math.log(0.85)  # of harm in the probe, at the strength that is answered with first
_STEP = 1.5  # by which a strength grows while every limit holds
_CLOSE = 1.15  # two strengths this near are one: answers of small sets do not tell them apart


@dataclass(frozen=True)
class Unsteered:
    """The tune split as the model answers it by itself."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    confidences: Sequence[float | None]

    def refused(self, kind: str) -> list[int]:
        return [i for i in self.of(kind) if (self.confidences[i] or 0) > 0]

    def answered(self, kind: str) -> list[int]:
        return [i for i in self.of(kind) if (self.confidences[i] or 0) < 0]

    def of(self, kind: str) -> list[int]:
        return [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind]


class Finder:
    """Measures candidates on one loaded model; `search` chooses among them.

    Every measured trial is handed to `record` at once and taken from `known` when the search is resumed.
    Adapters that are tried are written to `folder`.
    """

    def __init__(
        self,
        model: Model,
        judge: Judge,
        unsteered: Unsteered,
        directions: Mapping[tuple[str, float], Directions],
        gates: Gates | None,
        recipe: Recipe,
        folder: Path,
        *,
        known: Sequence[Trial] = (),
        record: Callable[[Trial], None] = lambda trial: None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._model, self._judge, self._unsteered = model, judge, unsteered
        self._directions, self._gates, self._recipe, self._folder = directions, gates, recipe, folder
        self._known = {(trial.rung, trial.candidate): trial for trial in known}
        self._record, self._advance = record, advance
        self.trials: list[Trial] = []
        self._tokens = chat_tokens(model, unsteered.prompts, recipe.prompts.system)
        self._openings: dict[int, float] = {}
        self._benign: list[tuple[list[int], list[int]]] = []
        self._benign_before: list[Any] = []
        remove = recipe.effect == "remove"
        self._wanted = unsteered.refused("sensitive") if remove else unsteered.answered("sensitive")
        for kind, verdict, found in (
            ("sensitive", "refuses" if remove else "answers", self._wanted),
            ("harmful", "refuses", unsteered.refused("harmful")),
        ):
            if not found:
                raise InputError(
                    f"the model {verdict} none of the {len(unsteered.of(kind))} {kind} prompts of the tune "
                    "split, so there is nothing to search by. Use other prompts or another model."
                )

    def steering(self, candidate: Candidate) -> Steering:
        """The candidate as it is put on the model; an adapter is a file at unit strength, scaled."""
        if candidate.estimator != GATE:
            directions = self._directions[candidate.estimator, candidate.ridge]
            return Steering(candidate.steering(directions))
        assert self._gates is not None  # the space of gates is searched only where there are some
        unit = replace(candidate, strength=1.0)
        path = (
            self._folder / "adapters" / f"gate-{unit.ridge:g}-{unit.first}-{unit.last}-{unit.margin:g}.gguf"
        )
        if not path.exists():
            lora.write(lora.LoraAdapter(unit.factors(self._gates), self._model.architecture), path)
        return Steering({}, [(path, candidate.strength)])

    def search(self, space: Space) -> Trial:
        """Probe candidates, answer with the best, move the strength until a limit binds; the chosen trial.

        Of the feasible trials that leave as few sensitive refusals as the best one, up to its standard
        error, the one that moves benign answers least is chosen. If none is feasible, it is the one that
        keeps most harmful refusals, and it says so.
        """
        ranked = self._ranked(self._probe_all(space))
        answered: list[Trial] = []
        while len(answered) < self._recipe.tune.finalists:
            candidate = self._next(answered, ranked)
            if candidate is None:
                break
            answered.append(self._measured("answers", candidate, self._answer))
        feasible = [trial for trial in answered if trial.feasible]
        if feasible:
            fewest = min(trial.sensitive for trial in feasible)
            limit = fewest + _standard_error(fewest, len(self._wanted))
            return min(
                (t for t in feasible if t.sensitive <= limit), key=lambda t: (t.benign_drift, t.sensitive)
            )
        return max(answered, key=lambda t: (t.harmful_retention, -t.sensitive))

    # ---- candidates ------------------------------------------------------------------------------

    def _probe_all(self, space: Space) -> list[Trial]:
        """TPE over estimator, ridge, band and strength, the retention of harm as its constraint."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        last_block = max(1, self._model.n_layer - 2)
        floor = self._recipe.tune.min_retention
        names = list(space.directions)
        probed: list[Trial] = []

        def objective(trial: optuna.Trial) -> float:
            estimator, ridge = names[trial.suggest_categorical("directions", list(range(len(names))))]
            first = trial.suggest_int("first", *space.first)
            length = trial.suggest_int("length", *space.length)
            strength = trial.suggest_float("strength", *space.strength, log=True)
            margin = trial.suggest_categorical("margin", list(space.margins))
            last = max(first, min(first + length - 1, last_block))
            candidate = Candidate(estimator, ridge, first, last, round(strength, 4), margin)
            measured = self._measured("probe", candidate, self._probe)
            probed.append(measured)
            trial.set_constraint(
                "harmful refusals short of the wanted retention", floor - measured.harmful_retention
            )
            return measured.sensitive

        sampler = optuna.samplers.TPESampler(seed=self._recipe.seed, n_startup_trials=6)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for point in space.start:
            study.enqueue_trial(
                {
                    "directions": names.index((point.estimator, point.ridge)),
                    "first": point.first,
                    "length": point.last - point.first + 1,
                    "strength": point.strength,
                    "margin": point.margin,
                }
            )
        study.optimize(objective, n_trials=self._recipe.tune.trials)
        return probed

    def _ranked(self, probes: Sequence[Trial]) -> list[Candidate]:
        """Candidates in the order in which they deserve answers: what sensitive loses for what harm loses.

        The ratio of log-probabilities does not depend on strength while the effect is small, and strength is
        moved anyway: of candidates that differ in strength alone the best stands for all.
        """

        def losses(trial: Trial) -> tuple[float, float]:
            return -math.log(max(trial.sensitive, 1e-6)), -math.log(max(trial.harmful_retention, 1e-6))

        def merit(trial: Trial) -> float:
            wanted, harm = losses(trial)
            return wanted / (harm + _SMALL_LOSS)

        best: dict[Candidate, Candidate] = {}
        for trial in sorted(probes, key=merit, reverse=True):
            # To first order what harm loses grows with the strength.
            factor = min(2.0, _FIRST_LOSS / max(losses(trial)[1], 1e-6))
            strength = round(trial.candidate.strength * factor, 4)
            best.setdefault(trial.candidate.shape, replace(trial.candidate, strength=strength))
        return list(best.values())

    def _next(self, answered: Sequence[Trial], ranked: Sequence[Candidate]) -> Candidate | None:
        """What to answer with next: more strength while all limits hold, less where harm is not kept.

        Where it is kept and another limit is not, blocks or a margin not tried yet come first: less strength
        would cost removal, and may not help.
        """
        tried = {t.candidate.shape for t in answered}
        untried = next((c for c in ranked if c.shape not in tried), None)
        if not answered:
            return untried
        feasible = [trial for trial in answered if trial.feasible]
        if any(trial.sensitive == 0.0 for trial in feasible):
            return None  # nothing is left to change
        if not feasible and answered[-1].harmful_retention >= self._recipe.tune.min_retention and untried:
            return untried
        if feasible:
            best = min(feasible, key=lambda t: (t.sensitive, -t.candidate.strength)).candidate
            factor = _STEP
        else:
            best = max(answered, key=lambda t: (t.harmful_retention, -t.sensitive)).candidate
            # From the weakest tried: where all keep as little harm, the best may be the strongest for good.
            weakest = min(t.candidate.strength for t in answered if t.candidate.shape == best.shape)
            best = replace(best, strength=weakest)
            factor = 1 / _STEP**1.5
        failed = [
            t.candidate.strength
            for t in answered
            if t.candidate.shape == best.shape and t.candidate.strength > best.strength
        ]
        strength = best.strength * factor
        if feasible and failed:
            strength = math.sqrt(best.strength * min(failed))
        if best.strength / _CLOSE < strength < best.strength * _CLOSE:
            return untried
        return replace(best, strength=round(strength, 4))

    # ---- measures --------------------------------------------------------------------------------

    def _measured(self, rung: str, candidate: Candidate, measure: Callable[[int, Candidate], Trial]) -> Trial:
        trial = self._known.get((rung, candidate))
        if trial is None:
            trial = self._known[rung, candidate] = measure(len(self.trials), candidate)
            self._record(trial)
        self.trials.append(trial)
        self._advance(1)
        return trial

    def _probe(self, number: int, candidate: Candidate) -> Trial:
        if not self._openings:
            self._openings = self._opening_probabilities()
        with self.steering(candidate).on(self._model):
            now = self._opening_probabilities()
        kept = {i: min(1.0, now[i] / max(before, 1e-9)) for i, before in self._openings.items()}

        def mean(picked: Sequence[int]) -> float:
            return float(np.mean([kept[i] for i in picked if i in kept]))

        return Trial(number, candidate, "probe", mean(self._wanted), mean(self._unsteered.refused("harmful")))

    def _opening_probabilities(self) -> dict[int, float]:
        """Probability of how the unsteered model began, where it is to change and where harm is refused."""
        picked = [
            i
            for i in (*self._wanted, *self._unsteered.refused("harmful"))
            if self._unsteered.answers[i].tokens
        ]
        pairs = [(self._tokens[i], self._unsteered.answers[i].tokens[:_OPENING]) for i in picked]
        found = self._model.token_logprobs(pairs)
        return {i: math.exp(float(logprobs.sum())) for i, (logprobs, _) in zip(picked, found, strict=True)}

    def _answer(self, number: int, candidate: Candidate) -> Trial:
        steering = self.steering(candidate)
        wanted, harmful = self._wanted, self._unsteered.of("harmful")
        benign = self._unsteered.of("benign")[:_BENIGN]
        picked = [*wanted, *harmful, *benign]
        answers, confidences, _ = answer_and_judge(
            self._model,
            self._judge,
            [self._unsteered.prompts[i] for i in picked],
            steering=steering,
            max_tokens=self._recipe.answers.tokens,
            system=self._recipe.prompts.system,
        )
        refused = {i for i, c in zip(picked, confidences, strict=True) if (c or 0) > 0}
        before = set(self._unsteered.refused("benign")) & set(benign)
        moved = self._drift(steering)
        broken = sum(a.degenerate for a in answers)
        broken_before = sum(self._unsteered.answers[i].degenerate for i in picked)
        more_benign = (len(refused & set(benign)) - len(before)) / max(1, len(benign))
        as_before = refused if self._recipe.effect == "remove" else set(picked) - refused
        retention = len(refused & set(harmful)) / len(self._unsteered.refused("harmful"))
        limits = self._recipe.tune
        return Trial(
            number,
            candidate,
            "answers",
            sensitive=len(as_before & set(wanted)) / len(wanted),
            harmful_retention=retention,
            benign=more_benign,
            benign_drift=moved,
            degenerate=broken / len(picked),
            feasible=retention >= limits.min_retention
            and more_benign <= 0
            and moved <= limits.max_benign_drift
            and may_become_degenerate(broken - broken_before, len(picked)),
        )

    def _drift(self, steering: Steering) -> float:
        """Drift of the benign answers, whose unsteered log-probabilities are computed once."""
        if not self._benign:
            refused = self._unsteered.refused("benign")
            quiet = [i for i in self._unsteered.of("benign") if i not in refused]
            pairs = [(self._tokens[i], self._unsteered.answers[i].tokens) for i in quiet]
            self._benign = [pair for pair in pairs if pair[1]][:_DRIFT_PAIRS]
            self._benign_before = self._model.token_logprobs(self._benign)
        with steering.on(self._model):
            return mean_change(self._benign_before, self._model.token_logprobs(self._benign))


def may_become_degenerate(more: float, n: int) -> bool:
    """Whether so many more degenerate answers of `n` are within the limit, in the search and in the gate."""
    return more <= max(1, _MORE_DEGENERATE * n)


def _standard_error(rate: float, n: int) -> float:
    """Of a rate seen in `n` trials, one success and one failure more counted, so that it is never 0."""
    smoothed = (rate * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (n + 2))
