"""What one candidate does on the tune split, by the two rungs of the search (method §6).

A loaded model, the unsteered answers and a `Candidate` go in; a `Trial` comes out. The *probe* asks in one
forward pass whether the model still begins as it did unsteered, and how far benign answers drift; in the
*answers* rung it answers, and a judge grades. Vectors and adapters are swapped in the one context; nothing is
loaded again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rs_gguf import lora
from rs_gguf.adapter import Gates
from rs_gguf.errors import InputError
from rs_gguf.evaluation import (
    Answer,
    LogProbs,
    Model,
    Steering,
    after_trace,
    answer_and_judge,
    chat_tokens,
    mean_change,
)
from rs_gguf.judges import Judge
from rs_gguf.prompts import Prompt
from rs_gguf.recipe import Recipe
from rs_gguf.search_space import GATE, Candidate, Directions, Trial

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a conversation and of its answer

_MORE_DEGENERATE = 0.01  # share of answers that may become degenerate, but one in any case
_OPENING = 6  # tokens of an unsteered answer that the probe looks for
_BENIGN = 32  # benign prompts that a candidate answers
_DRIFT_PAIRS = 32  # benign answers whose drift is taken
_PROBED_PAIRS = 8  # of these, in a probe


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


class Rungs:
    """Measures candidates on one loaded model. Adapters that are tried are written to `folder`.

    Raises:
        InputError: no sensitive prompt to change, no harmful one that is refused, or no benign one answered.
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
    ) -> None:
        self.model = model
        self._judge, self._unsteered = judge, unsteered
        self._directions, self._gates, self._recipe, self._folder = directions, gates, recipe, folder
        self._tokens = chat_tokens(model, unsteered.prompts, recipe.prompts.system)
        remove = recipe.effect == "remove"
        self.wanted = unsteered.refused("sensitive") if remove else unsteered.answered("sensitive")
        refused = set(unsteered.refused("benign"))
        benign = [i for i in unsteered.of("benign") if i not in refused]
        self._openings = self._pairs([*self.wanted, *unsteered.refused("harmful")], _OPENING)
        self._quiet = dict(list(self._pairs(benign).items())[:_DRIFT_PAIRS])
        for kind, verdict, found in (
            ("sensitive", "refuses" if remove else "answers", self.wanted),
            ("harmful", "refuses", unsteered.refused("harmful")),
            ("benign", "answers", self._quiet),
        ):
            if not found:
                raise InputError(
                    f"the model {verdict} none of the {len(unsteered.of(kind))} {kind} prompts of the tune "
                    "split, so there is nothing to search by. Use other prompts or another model."
                )

    def _pairs(self, picked: Sequence[int], length: int | None = None) -> dict[int, Pair]:
        """Conversations with traces, and the beginnings of their unsteered answers, but for empty ones."""
        pairs = {i: after_trace(self.model, self._tokens[i], self._unsteered.answers[i]) for i in picked}
        return {i: (context, tokens[:length]) for i, (context, tokens) in pairs.items() if tokens}

    @cached_property
    def _before(self) -> tuple[LogProbs, LogProbs]:
        """Of openings and of quiet answers, unsteered."""
        return self._logprobs(self._openings), self._logprobs(self._quiet)

    def _logprobs(self, pairs: Mapping[int, Pair]) -> LogProbs:
        return self.model.token_logprobs(list(pairs.values()))

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
            lora.write(lora.LoraAdapter(unit.factors(self._gates), self.model.architecture), path)
        return Steering({}, [(path, candidate.strength)])

    def measure(self, rung: str, number: int, candidate: Candidate) -> Trial:
        """The trial of a candidate on the rung `probe` or `answers`, with the seconds that it took."""
        start = time.perf_counter()
        trial = (self._probe if rung == "probe" else self._answer)(number, candidate)
        return replace(trial, seconds=round(time.perf_counter() - start, 2))

    def _probe(self, number: int, candidate: Candidate) -> Trial:
        openings, quiet = self._before
        few = dict(list(self._quiet.items())[:_PROBED_PAIRS])
        with self.steering(candidate).on(self.model):
            after = self.model.token_logprobs([*self._openings.values(), *few.values()])
        kept = {
            i: min(1.0, math.exp(float(now.sum()) - float(before.sum())))
            for i, (before, _), (now, _) in zip(self._openings, openings, after, strict=False)
        }

        def mean(picked: Sequence[int]) -> float:
            return float(np.mean([kept[i] for i in picked if i in kept]))

        return Trial(
            number,
            candidate,
            "probe",
            mean(self.wanted),
            mean(self._unsteered.refused("harmful")),
            benign_drift=mean_change(quiet[: len(few)], after[len(openings) :]),
        )

    def _answer(self, number: int, candidate: Candidate) -> Trial:
        steering = self.steering(candidate)
        wanted, harmful = self.wanted, self._unsteered.of("harmful")
        benign = self._unsteered.of("benign")[:_BENIGN]
        picked = [*wanted, *harmful, *benign]
        answers, graded, _ = answer_and_judge(
            self.model,
            self._judge,
            [self._unsteered.prompts[i] for i in picked],
            steering=steering,
            max_tokens=self._recipe.answers.tokens,
            system=self._recipe.prompts.system,
        )
        refused = {i for i, j in zip(picked, graded, strict=True) if (j.confidence or 0) > 0}
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
        _, before = self._before  # computed here at the latest, unsteered
        with steering.on(self.model):
            return mean_change(before, self._logprobs(self._quiet))


def may_become_degenerate(more: float, n: int) -> bool:
    """Whether so many more degenerate answers of `n` are within the limit, in the search and in the gate."""
    return more <= max(1, _MORE_DEGENERATE * n)
