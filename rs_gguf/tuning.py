"""The search for estimator, ridge, layers and strength, on the tune split, with safety as a constraint.

Fitted directions and the unsteered answers go in; the chosen steering and the trade-off it was chosen from
come out (method §6). Two rungs: a *probe* asks in one forward pass whether the model still begins the
refusal that it gave unsteered; the best of them then *answer*, and a judge grades the answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.errors import InputError
from rs_gguf.evaluation import Answer, Model, Steering, answer_and_judge, chat_tokens, drift
from rs_gguf.judges import Judge
from rs_gguf.layers import band_profile
from rs_gguf.metrics import MAX_MORE_DEGENERATE
from rs_gguf.prompts import Prompt
from rs_gguf.recipe import Recipe

_OPENING = 6  # tokens of an unsteered refusal that the probe looks for
_DRIFT_PAIRS = 32


@dataclass(frozen=True)
class Directions:
    """What `fit` leaves for the search: unit directions and calibration, one row a layer.

    `scales` [L]: activation units for one unit of confidence, s⁻ of method §4.
    """

    unit: NDArray[np.float64]  # [L, D]
    scales: NDArray[np.float64]  # [L]


@dataclass(frozen=True)
class Candidate:
    """A point of the search space. `strength` is k·|α|, the paper's prior being 2 to 4."""

    estimator: str
    ridge: float
    first: int
    last: int
    strength: float

    def steering(self, directions: Directions) -> dict[int, NDArray[np.float32]]:
        """What is added to each block: α·s_l·v_l over the band, α = −strength / number of blocks."""
        profile = band_profile(len(directions.unit), self.first, self.last)
        alpha = -self.strength / profile.sum()
        rows = (alpha * profile * directions.scales)[:, np.newaxis] * directions.unit
        return {int(layer): rows[layer].astype(np.float32) for layer in np.flatnonzero(profile)}


@dataclass(frozen=True)
class Trial:
    """A measured candidate. Rates are fractions; `None` where a rung does not measure it."""

    number: int
    candidate: Candidate
    rung: str  # "probe" | "answers"
    sensitive: float  # of the sensitive prompts refused unsteered, the share still refused
    harmful_retention: float
    benign: float | None = None  # refusals of benign prompts, less those unsteered
    benign_drift: float | None = None
    degenerate: float | None = None
    feasible: bool | None = None

    def to_row(self) -> dict[str, Any]:
        row = asdict(self)
        candidate = row.pop("candidate")
        layers = [candidate.pop("first"), candidate.pop("last")]
        return {"number": self.number, **candidate, "layers": layers, **row}


@dataclass(frozen=True)
class Unsteered:
    """The tune split as the model answers it by itself."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    confidences: Sequence[float | None]

    def refused(self, kind: str) -> list[int]:
        return [i for i in self.of(kind) if (self.confidences[i] or 0) > 0]

    def of(self, kind: str) -> list[int]:
        return [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind]


class Finder:
    """Measures candidates on one loaded model; `search` chooses among them.

    Every measured trial is handed to `record` at once and taken from `known` when the search is resumed.
    """

    def __init__(
        self,
        model: Model,
        judge: Judge,
        unsteered: Unsteered,
        directions: Mapping[tuple[str, float], Directions],
        recipe: Recipe,
        *,
        known: Sequence[Trial] = (),
        record: Callable[[Trial], None] = lambda trial: None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._model, self._judge, self._unsteered = model, judge, unsteered
        self._directions, self._recipe = directions, recipe
        self._known = {(trial.rung, trial.candidate): trial for trial in known}
        self._record, self._advance = record, advance
        self.trials: list[Trial] = []
        self._tokens = chat_tokens(model, unsteered.prompts, recipe.prompts.system)
        self._openings: dict[int, float] = {}
        for kind in ("sensitive", "harmful"):
            if not unsteered.refused(kind):
                raise InputError(
                    f"the model refuses none of the {len(unsteered.of(kind))} {kind} prompts of the tune "
                    "split, so there is nothing to search by. Use other prompts or another model."
                )

    def steering(self, candidate: Candidate) -> Steering:
        directions = self._directions[candidate.estimator, candidate.ridge]
        return Steering(candidate.steering(directions))

    def search(self) -> Trial:
        """Probe candidates, answer with the best, adjust the strength; return the chosen trial.

        The chosen trial is the feasible one with the fewest sensitive refusals left; if none is
        feasible, the one that keeps most harmful refusals, and it says so.
        """
        probes = self._probe_all()
        finalists = self._finalists(probes)
        answered: list[Trial] = []
        while len(answered) < self._recipe.tune.finalists:
            candidate = finalists[len(answered)] if len(answered) < 2 else self._adjusted(answered)
            if candidate in [trial.candidate for trial in answered]:
                break
            answered.append(self._measured("answers", candidate, self._answer))
        feasible = [trial for trial in answered if trial.feasible]
        if feasible:
            return min(feasible, key=lambda t: (t.sensitive, t.benign_drift))
        return max(answered, key=lambda t: (t.harmful_retention, -t.sensitive))

    # ---- candidates ------------------------------------------------------------------------------

    def _probe_all(self) -> list[Trial]:
        """TPE over estimator, ridge, band and strength, the retention of harm as its constraint."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = sorted(self._directions)
        n_layer = self._model.n_layer
        floor = self._recipe.tune.min_retention

        def objective(trial: optuna.Trial) -> float:
            estimator, ridge = names[trial.suggest_categorical("directions", list(range(len(names))))]
            first = trial.suggest_int("first", max(1, n_layer // 5), max(1, n_layer * 2 // 3))
            length = trial.suggest_int("length", 1, max(1, n_layer // 2))
            strength = trial.suggest_float("strength", 0.5, 8.0, log=True)
            last = min(first + length - 1, n_layer - 2)
            candidate = Candidate(estimator, ridge, first, max(first, last), round(strength, 4))
            measured = self._measured("probe", candidate, self._probe)
            trial.set_constraint(
                "harmful refusals short of the wanted retention", floor - measured.harmful_retention
            )
            return measured.sensitive

        sampler = optuna.samplers.TPESampler(seed=self._recipe.seed, n_startup_trials=6)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        # The prior of the paper, k·|α| of 2 to 4 around the middle blocks, with each kind of direction.
        for k in range(len(names)):
            first = n_layer // 2 if k % 2 else n_layer // 3
            study.enqueue_trial(
                {"directions": k, "first": first, "length": max(1, n_layer // 3), "strength": 2.0 + k % 3}
            )
        study.optimize(objective, n_trials=self._recipe.tune.trials)
        return [trial for trial in self.trials if trial.rung == "probe"]

    def _finalists(self, probes: Sequence[Trial]) -> list[Candidate]:
        """The best probe at the wanted retention, then the best at a laxer one: the probe is stricter than
        the judge, since a refusal in other words still counts as kept."""
        floor = self._recipe.tune.min_retention
        chosen: list[Candidate] = []
        for short_of in (0.1, 0.3, 0.6, 1.0):
            pool = [
                t for t in probes if t.harmful_retention >= floor - short_of and t.candidate not in chosen
            ]
            if pool:
                best = max(pool, key=lambda t: t.harmful_retention - t.sensitive)
                chosen.append(best.candidate)
        return chosen

    def _adjusted(self, answered: Sequence[Trial]) -> Candidate:
        """The best point so far with more strength if it is feasible, else the nearest with less."""
        feasible = [trial for trial in answered if trial.feasible]
        if feasible:
            best = min(feasible, key=lambda t: t.sensitive)
            factor = 1.3
        else:
            best = max(answered, key=lambda t: t.harmful_retention - t.sensitive)
            factor = 0.7
        strength = round(best.candidate.strength * factor, 4)
        # A strength already seen to fail bounds the step from above, and one that passed from below.
        same = [
            t for t in answered if replace(t.candidate, strength=0) == replace(best.candidate, strength=0)
        ]
        failed = [
            t.candidate.strength
            for t in same
            if not t.feasible and t.candidate.strength > best.candidate.strength
        ]
        if feasible and failed:
            strength = round(math.sqrt(best.candidate.strength * min(failed)), 4)
        return replace(best.candidate, strength=strength)

    # ---- measures --------------------------------------------------------------------------------

    def _measured(self, rung: str, candidate: Candidate, measure: Callable[[int, Candidate], Trial]) -> Trial:
        trial = self._known.get((rung, candidate))
        if trial is None:
            trial = measure(len(self.trials), candidate)
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

        def mean(kind: str) -> float:
            return float(np.mean([kept[i] for i in self._unsteered.refused(kind)]))

        return Trial(number, candidate, "probe", mean("sensitive"), mean("harmful"))

    def _opening_probabilities(self) -> dict[int, float]:
        """Probability of the first tokens of each refusal that the unsteered model gave."""
        picked = [
            i
            for kind in ("sensitive", "harmful")
            for i in self._unsteered.refused(kind)
            if self._unsteered.answers[i].tokens
        ]
        pairs = [(self._tokens[i], self._unsteered.answers[i].tokens[:_OPENING]) for i in picked]
        found = self._model.token_logprobs(pairs)
        return {i: math.exp(float(logprobs.sum())) for i, (logprobs, _) in zip(picked, found, strict=True)}

    def _answer(self, number: int, candidate: Candidate) -> Trial:
        steering = self.steering(candidate)
        sensitive, harmful = self._unsteered.refused("sensitive"), self._unsteered.refused("harmful")
        benign = self._unsteered.of("benign")
        picked = [*sensitive, *harmful, *benign]
        answers, confidences, _ = answer_and_judge(
            self._model,
            self._judge,
            [self._unsteered.prompts[i] for i in picked],
            steering=steering,
            max_tokens=self._recipe.answers.tokens,
            system=self._recipe.prompts.system,
        )
        refused = {i for i, c in zip(picked, confidences, strict=True) if (c or 0) > 0}
        before = set(self._unsteered.refused("benign"))
        pairs = [(self._tokens[i], self._unsteered.answers[i].tokens) for i in benign if i not in before]
        moved, _ = drift(self._model, pairs[:_DRIFT_PAIRS], steering)
        broken = sum(a.degenerate for a in answers) / len(answers)
        broken_before = sum(self._unsteered.answers[i].degenerate for i in picked) / len(picked)
        more_benign = (len(refused & set(benign)) - len(before)) / max(1, len(benign))
        retention = len(refused & set(harmful)) / len(harmful)
        limits = self._recipe.tune
        return Trial(
            number,
            candidate,
            "answers",
            sensitive=len(refused & set(sensitive)) / len(sensitive),
            harmful_retention=retention,
            benign=more_benign,
            benign_drift=moved,
            degenerate=broken,
            feasible=retention >= limits.min_retention
            and more_benign <= 0
            and moved <= limits.max_benign_drift
            and broken - broken_before <= MAX_MORE_DEGENERATE,
        )


def load_trials(rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials from rows written by `Trial.to_row`."""
    trials = []
    for row in rows:
        values = dict(row)
        first, last = values.pop("layers")
        candidate = Candidate(
            values.pop("estimator"), values.pop("ridge"), first, last, values.pop("strength")
        )
        values.pop("id", None)
        trials.append(Trial(candidate=candidate, **values))
    return trials
