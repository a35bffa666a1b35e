"""What one candidate does on the tune split, by the three evaluator of the search (method §7).

A loaded model, the unsteered answers and a `Candidate` go in; a `Trial` comes out. The *probe* asks in one
forward pass whether the model still begins as it did unsteered, and how far benign answers drift; in the
*answers* fidelity it answers briefly, and a judge grades; in the *full* fidelity it answers at the length that is
reported, where answers that break down do so. Vectors and adapters are swapped on the one model, which is not
loaded again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.engines.answers import after_trace, chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Engine, LogProbs, Steering
from rs_gguf.engines.generation import Asking
from rs_gguf.errors import InputError
from rs_gguf.evaluation.acceptance import Allowance, SafetyRule
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, answer_condition
from rs_gguf.evaluation.drift import Drift, drift_of, is_drift_reference, mean_change
from rs_gguf.evaluation.outcomes import Outcome, outcome_of
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.judges.registry import Judge
from rs_gguf.methods import METHODS
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Prompt
from rs_gguf.records.trials import Candidate, Trial

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a conversation and of its answer

_FAR = 1e9  # nats a token; an infinity is no JSON
PREFIX_TOKENS = 6  # tokens of an unsteered answer that the probe looks for
BENIGN = 64  # benign prompts that a candidate answers, and benign answers whose drift is taken
LOGPROB_PAIRS = 8  # of these, in a probe


@dataclass(frozen=True)
class UnsteeredAnswers:
    """The unsteered answers to the prompts of the tune split, with their judgements, in order."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    judgements: Sequence[Judgement]

    @cached_property
    def outcomes(self) -> list[Outcome]:
        return [*map(outcome_of, self.answers, self.judgements)]

    def refused(self, kind: str) -> list[int]:
        """Return the indices of the prompts of a kind that are refused, explicitly or by evasion."""
        return [i for i in self.of(kind) if self.outcomes[i] in ("explicit", "evasion")]

    def complied(self, kind: str) -> list[int]:
        """Return the indices of the prompts of a kind that are complied with."""
        return [i for i in self.of(kind) if self.outcomes[i] == "complies"]

    def of(self, kind: str) -> list[int]:
        """Return the indices of the prompts of a kind."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind]

    def take(self, indices: Sequence[int]) -> JudgedAnswers:
        """Return the answers at these indices."""
        return JudgedAnswers([self.answers[i] for i in indices], [self.judgements[i] for i in indices])


class CandidateEvaluator:
    """Measures candidates on one loaded model. Files that are tried are written below `folder`.

    `fitted` is what each method fitted, by its name.
    `short` and `full` say how the evaluator `answers` and `full` ask; `full` asks `n_full` prompts of each kind.
    `seed` is that of the samples of prompts.

    Raises:
        InputError: no sensitive prompt to change, no harmful one that is refused, or no benign one answered.
    """

    def __init__(
        self,
        model: Engine,
        judge: Judge,
        unsteered: UnsteeredAnswers,
        fitted: Mapping[str, Any],
        folder: Path,
        *,
        short: Asking,
        full: Asking,
        n_full: int,
        rule: SafetyRule,
        seed: int,
    ) -> None:
        self.model = model
        self._judge, self._unsteered = judge, unsteered
        self.fitted, self._folder = fitted, folder
        self._short, self._full, self._n_full, self.rule, self._seed = short, full, n_full, rule, seed
        self._tokens = chat_tokens(model, unsteered.prompts, short.system)
        remove = rule.effect == "remove"
        # What is to change: refusals that are to go, or answers that are to become refusals.
        self.targets = (unsteered.refused if remove else unsteered.complied)("sensitive")
        benign = [
            i
            for i in unsteered.of("benign")
            if is_drift_reference(unsteered.answers[i], unsteered.judgements[i])
        ]
        self._prefixes = self._pairs([*self.targets, *unsteered.refused("harmful")], PREFIX_TOKENS)
        self._drift_answers = self._pairs(self._sample(benign, BENIGN))
        for kind, verdict, found in (
            ("sensitive", "refuses" if remove else "answers", self._prefixes.keys() & self.targets),
            ("harmful", "refuses", self._prefixes.keys() & unsteered.refused("harmful")),
            ("benign", "answers", self._drift_answers),
        ):
            if not found:
                raise InputError(
                    f"the model {verdict} none of the {len(unsteered.of(kind))} {kind} prompts of the tune "
                    "split in words, so there is nothing to search by. Use other prompts or another model."
                )

    def _sample(self, picked: Sequence[int], size: int) -> list[int]:
        """At most so many of these places, forms and subjects alike: prompts lie sorted by subject."""
        place = {self._unsteered.prompts[i].id: i for i in picked}
        chosen = stratified([self._unsteered.prompts[i] for i in picked], size, seed=self._seed)
        return [place[prompt.id] for prompt in chosen]

    def _pairs(self, picked: Sequence[int], length: int | None = None) -> dict[int, Pair]:
        """Conversations with traces, and the beginnings of their unsteered answers, but for empty ones."""
        pairs = {i: after_trace(self.model, self._tokens[i], self._unsteered.answers[i]) for i in picked}
        return {i: (context, tokens[:length]) for i, (context, tokens) in pairs.items() if tokens}

    @cached_property
    def _unsteered_logprobs(self) -> tuple[LogProbs, LogProbs]:
        """Of openings and of quiet answers, unsteered."""
        return self._logprobs(self._prefixes), self._logprobs(self._drift_answers)

    @cached_property
    def _logprob_drift_answers(self) -> dict[int, Pair]:
        """The quiet answers whose drift a probe takes."""
        return {i: self._drift_answers[i] for i in self._sample(list(self._drift_answers), LOGPROB_PAIRS)}

    @cached_property
    def _short_unsteered(self) -> tuple[list[int], JudgedAnswers]:
        """UnsteeredAnswers, as the search has it: what is to change, all harmful prompts and some benign ones."""
        unsteered = self._unsteered
        benign = self._sample(unsteered.of("benign"), BENIGN)
        picked = [*self.targets, *unsteered.of("harmful"), *benign]
        return picked, unsteered.take(picked)

    @cached_property
    def _full_unsteered(self) -> tuple[list[int], JudgedAnswers]:
        """UnsteeredAnswers, at full length: some of what is to change, and of the harmful and benign prompts."""
        return self._full_prompt_indices, self._side(self._full_prompt_indices, NO_STEERING, self._full)

    @cached_property
    def _full_prompt_indices(self) -> list[int]:
        """Places of the prompts that are answered in full."""
        # Of so weak a model one answer in six falls apart, whatever the steering. Sensitive prompts that need
        # no change would bring as many such verdicts as there are refusals left: they hid what did change.
        of_kind = (self.targets if kind == "sensitive" else self._unsteered.of(kind) for kind in KINDS)
        return [i for picked in of_kind for i in self._sample(picked, self._n_full)]

    @property
    def full_size(self) -> tuple[int, int]:
        """Prompts that a full trial answers, and tokens of each answer: another size, another trial."""
        return len(self._full_prompt_indices), self._full.max_tokens

    @property
    def n_harmful(self) -> int:
        """Harmful prompts that are refused unsteered, at least one."""
        return len(self._unsteered.refused("harmful"))

    def _side(self, picked: Sequence[int], steering: Steering, asking: Asking) -> JudgedAnswers:
        """What the prompts at these places are answered under a steering."""
        prompts = [self._unsteered.prompts[i] for i in picked]
        condition = Condition("candidate", steering, asking.system)
        return answer_condition(self.model, self._judge, condition, prompts, asking)

    def _logprobs(self, pairs: Mapping[int, Pair]) -> LogProbs:
        return self.model.token_logprobs(list(pairs.values()))

    def steering(self, candidate: Candidate) -> Steering:
        """The candidate as it is put on the model."""
        method, fitted = METHODS[candidate.method], self.fitted[candidate.method]
        return method.steering(fitted, candidate, self.model.architecture, self._folder / "adapters")

    def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        """The trial of a candidate on the fidelity `probe`, `answers` or `full`, with the seconds it took."""
        measured = {"logprob": self._logprob_trial, "short": self._short_trial, "full": self._full_trial}[
            fidelity
        ]
        start = time.perf_counter()
        _ = self._unsteered_logprobs
        if fidelity == "full":
            _ = self._full_unsteered
        asked = time.perf_counter()
        trial = measured(number, candidate)
        return replace(
            trial,
            seconds=round(time.perf_counter() - asked, 2),
            unsteered_seconds=round(asked - start, 2),
        )

    def _logprob_trial(self, number: int, candidate: Candidate) -> Trial:
        openings, quiet = self._unsteered_logprobs
        unmoved = [
            found
            for i, found in zip(self._drift_answers, quiet, strict=True)
            if i in self._logprob_drift_answers
        ]
        with self.model.steered(self.steering(candidate)):
            after = self.model.token_logprobs(
                [*self._prefixes.values(), *self._logprob_drift_answers.values()]
            )

        def kept_of(change: float) -> float:
            """Of an opening, from its Δ log-probability; none where the model gives no numbers any more."""
            return math.exp(min(0.0, change)) if math.isfinite(change) else 0.0

        kept = {
            i: kept_of(float(now.sum()) - float(before.sum()))
            for i, (before, _), (now, _) in zip(self._prefixes, openings, after, strict=False)
        }

        def of(picked: Sequence[int]) -> list[float]:
            return [kept[i] for i in picked if i in kept]

        sensitive = of(self.targets)
        return Trial(
            number,
            candidate,
            "logprob",
            float(np.mean(sensitive)),
            float(np.mean(of(self._unsteered.refused("harmful")))),
            n_sensitive=len(sensitive),
            benign_drift=_moved(unmoved, after[len(openings) :]),
        )

    def _short_trial(self, number: int, candidate: Candidate) -> Trial:
        return self._compared("short", number, candidate, Allowance.SHORT)

    def _full_trial(self, number: int, candidate: Candidate) -> Trial:
        return self._compared("full", number, candidate, Allowance.FULL)

    def _compared(self, fidelity: str, number: int, candidate: Candidate, allowance: Allowance) -> Trial:
        """What the candidate makes of the unsteered answers of the fidelity, with as many tokens."""
        in_full = fidelity == "full"
        asking = self._full if in_full else self._short
        picked, before = self._full_unsteered if in_full else self._short_unsteered
        steering = self.steering(candidate)
        after = self._side(picked, steering, asking)
        drift = self._drift(steering)
        evaluation = PairedEvaluation([self._unsteered.prompts[i] for i in picked], before, after, drift)
        sensitive, harmful, benign = (evaluation.part(kind=kind) for kind in KINDS)
        remove = self.rule.effect == "remove"
        targets = sensitive.refused if remove else sensitive.count("complies")
        changed = sensitive.opened if remove else sensitive.closed
        return Trial(
            number,
            candidate,
            fidelity,
            sensitive_remaining=1 - changed / targets if targets else 1.0,  # nothing to change
            n_sensitive=targets,
            # A sample may hold no harmful prompt that is refused: nothing is lost there.
            harmful_retention=harmful.kept / harmful.refused if harmful.refused else 1.0,
            benign_closed=(benign.closed - benign.opened) / max(1, len(benign.prompts)),
            benign_drift=drift.nats,
            degenerate=sum(answer.degenerate for answer in after.answers) / len(picked),
            answered=(len(picked), asking.max_tokens),
            feasible=self.rule.decide(evaluation, allowance).verdict != "failed",
        )

    def _drift(self, steering: Steering) -> Drift:
        _, before = self._unsteered_logprobs
        with self.model.steered(steering):
            found = drift_of(before, self._logprobs(self._drift_answers))
        return replace(found, nats=found.nats if math.isfinite(found.nats) else _FAR)


def _moved(before: LogProbs, after: LogProbs) -> float:
    """The drift, in nats a token; of a model that gives no numbers any more farther than any bound."""
    found = mean_change(before, after)
    return found if math.isfinite(found) else _FAR
