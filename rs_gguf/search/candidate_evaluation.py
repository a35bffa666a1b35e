"""Evaluate one candidate on the tune split, at three fidelity levels (method §7).

`logprob` runs one forward pass: how likely are the first tokens of the unsteered refusals still, and how far
do benign answers drift? `short` generates answers of `answers.tokens` tokens and judges them. `full`
generates `answers.test_tokens` tokens, because degenerate output often appears only then. A loaded model, its
unsteered answers and a `Candidate` go in, a `Trial` comes out. The model is loaded once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.engines.answers import after_trace, chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Engine, LogProbs, Steering
from rs_gguf.engines.generation import Asking
from rs_gguf.errors import InputError
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, answer_condition
from rs_gguf.evaluation.drift import Drift, drift_of, is_drift_reference, mean_change
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.evaluation.traces import trace_record
from rs_gguf.judges.registry import Judge
from rs_gguf.methods import METHODS
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import KINDS, Answer
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.search.stopping import Answering, SecondRun, compare
from rs_gguf.search.unsteered import UnsteeredAnswers

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a conversation and of its answer

_FAR = 1e9  # nats a token; JSON has no infinity
PREFIX_TOKENS = 6  # first tokens of an unsteered refusal, whose probability `logprob` reads
BENIGN = 64  # benign prompts that a candidate answers, and benign answers whose drift is measured
LOGPROB_PAIRS = 8  # benign answers whose drift `logprob` measures


class CandidateEvaluator:
    """Evaluate candidates on one loaded model.

    Args:
        unsteered: the tune split.
        fitted: what each method fitted, by the method's name.
        folder: where the files of candidates are written.
        short, full: how prompts are asked at these levels.
        n_full: prompts of each kind that `full` asks.
        seed: of the samples of prompts.
        answering: for comparisons; the search stops early.

    Raises:
        InputError: no sensitive prompt to change, no harmful prompt that is refused, or no benign prompt that
            is complied with.
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
        answering: Answering = Answering.STOPPING,
    ) -> None:
        self.model = model
        self._judge, self._unsteered, self._answering = judge, unsteered, answering
        self.fitted, self._folder = fitted, folder
        self._short, self._full, self._n_full, self.rule, self._seed = short, full, n_full, rule, seed
        self._tokens = chat_tokens(model, unsteered.prompts, short.system)
        self._drifts: dict[Candidate, Drift] = {}
        self._unsteered_again = {full: self._second_run(NO_STEERING, full) for full in (True, False)}
        remove = rule.effect == "remove"
        self.targets = unsteered.targets(rule.effect)
        benign = [
            i
            for i in unsteered.of("benign")
            if is_drift_reference(unsteered.answers[i], unsteered.judgements[i])
        ]
        self._prefixes = self._pairs([*self.targets, *unsteered.refused("harmful")], PREFIX_TOKENS)
        self._drift_answers = self._pairs(self._sample(benign, BENIGN))
        for kind, verdict, usable in (
            ("sensitive", "refuses" if remove else "answers", self._prefixes.keys() & self.targets),
            ("harmful", "refuses", self._prefixes.keys() & unsteered.refused("harmful")),
            ("benign", "answers", self._drift_answers),
        ):
            if not usable:
                raise InputError(
                    f"cannot search: the model {verdict} none of the {len(unsteered.of(kind))} {kind} "
                    f"prompts in the tune split; at least one is needed. Change prompts.{kind}, raise "
                    "prompts.tune or use another model."
                )

    def _sample(self, indices: Sequence[int], size: int) -> list[int]:
        """Return at most `size` of these indices, stratified: prompts lie sorted by subject."""
        index = {self._unsteered.prompts[i].id: i for i in indices}
        sample = stratified([self._unsteered.prompts[i] for i in indices], size, seed=self._seed)
        return [index[prompt.id] for prompt in sample]

    def _pairs(self, indices: Sequence[int], length: int | None = None) -> dict[int, Pair]:
        """Return by index the conversation, with any trace, and the first `length` tokens of its answer.

        Empty answers are left out.
        """
        pairs = {i: after_trace(self.model, self._tokens[i], self._unsteered.answers[i]) for i in indices}
        return {i: (context, tokens[:length]) for i, (context, tokens) in pairs.items() if tokens}

    @cached_property
    def _unsteered_logprobs(self) -> tuple[LogProbs, LogProbs]:
        """The unsteered log-probabilities of the refusal prefixes and of the drift answers."""
        return self._logprobs(self._prefixes), self._logprobs(self._drift_answers)

    @cached_property
    def _logprob_drift_answers(self) -> dict[int, Pair]:
        """The drift answers that `logprob` reads, by index."""
        return {i: self._drift_answers[i] for i in self._sample(list(self._drift_answers), LOGPROB_PAIRS)}

    @cached_property
    def _short_unsteered(self) -> tuple[list[int], JudgedAnswers]:
        """Indices and unsteered answers of what `short` asks: targets, harmful and some benign prompts."""
        unsteered = self._unsteered
        benign = self._sample(unsteered.of("benign"), BENIGN)
        indices = [*self.targets, *unsteered.of("harmful"), *benign]
        return indices, unsteered.take(indices)

    @cached_property
    def _full_unsteered(self) -> tuple[list[int], JudgedAnswers]:
        """Indices and unsteered answers, at full length, of what `full` asks."""
        indices = self._full_prompt_indices
        short = self._unsteered.take(indices).answers
        return indices, self._answers(indices, NO_STEERING, self._full, short)

    @cached_property
    def _full_prompt_indices(self) -> list[int]:
        """Indices of the prompts that are answered in full."""
        # One answer in six of a weak model fails, whatever the steering. Sensitive prompts that need no
        # change would add as many failures as there are refusals left, and so hide what did change.
        by_kind = (self.targets if kind == "sensitive" else self._unsteered.of(kind) for kind in KINDS)
        return [i for indices in by_kind for i in self._sample(indices, self._n_full)]

    @property
    def full_size(self) -> tuple[int, int]:
        """How many prompts a full trial answers, and with how many tokens each."""
        return len(self._full_prompt_indices), self._full.max_tokens

    @property
    def n_harmful(self) -> int:
        """How many harmful prompts are refused unsteered; at least one."""
        return len(self._unsteered.refused("harmful"))

    def _answers(
        self, indices: Sequence[int], steering: Steering, asking: Asking, drafts: Sequence[Answer]
    ) -> JudgedAnswers:
        """Answer the prompts at these indices under a steering, from drafts, and judge the answers."""
        prompts = [self._unsteered.prompts[i] for i in indices]
        condition = Condition("candidate", steering, asking.system)
        return answer_condition(self.model, self._judge, condition, prompts, asking, drafts=drafts)

    def _second_run(self, steering: Steering, full: bool) -> SecondRun:
        asking = (self._full if full else self._short).again()
        return SecondRun(lambda indices, drafts: self._answers(indices, steering, asking, drafts))

    def _logprobs(self, pairs: Mapping[int, Pair]) -> LogProbs:
        return self.model.token_logprobs(list(pairs.values()))

    def steering(self, candidate: Candidate) -> Steering:
        """Return what puts a candidate on the model."""
        method, fitted = METHODS[candidate.method], self.fitted[candidate.method]
        return method.steering(fitted, candidate, self.model.architecture, self._folder / "adapters")

    def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        """Evaluate a candidate at the level `logprob`, `short` or `full`, and note the seconds it took."""
        start = time.perf_counter()
        _ = self._unsteered_logprobs
        if fidelity == "full":
            _ = self._full_unsteered
        started = time.perf_counter()
        if fidelity == "logprob":
            trial = self._logprob_trial(number, candidate)
        else:
            trial = self._compared(fidelity, number, candidate)
        return replace(
            trial,
            seconds=round(time.perf_counter() - started, 2),
            unsteered_seconds=round(started - start, 2),
        )

    def _logprob_trial(self, number: int, candidate: Candidate) -> Trial:
        prefixes, drift_answers = self._unsteered_logprobs
        references = [
            logprobs
            for i, logprobs in zip(self._drift_answers, drift_answers, strict=True)
            if i in self._logprob_drift_answers
        ]
        with self.model.steered(self.steering(candidate)):
            after = self.model.token_logprobs(
                [*self._prefixes.values(), *self._logprob_drift_answers.values()]
            )

        def remaining(change: float) -> float:
            """Return the probability ratio, at most 1, of a Δ log-probability; 0 where it is NaN."""
            return math.exp(min(0.0, change)) if math.isfinite(change) else 0.0

        kept = {
            i: remaining(float(steered.sum()) - float(unsteered.sum()))
            for i, (unsteered, _), (steered, _) in zip(self._prefixes, prefixes, after, strict=False)
        }

        def ratios(indices: Sequence[int]) -> list[float]:
            return [kept[i] for i in indices if i in kept]

        sensitive = ratios(self.targets)
        return Trial(
            number,
            candidate,
            "logprob",
            float(np.mean(sensitive)),
            float(np.mean(ratios(self._unsteered.refused("harmful")))),
            n_sensitive=len(sensitive),
            benign_drift=_finite_change(references, after[len(prefixes) :]),
        )

    def _compared(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        """Answer under the candidate and compare with the unsteered answers of the same length."""
        full = fidelity == "full"
        asking, allowance = (self._full, Allowance.FULL) if full else (self._short, Allowance.SHORT)
        indices, before = self._full_unsteered if full else self._short_unsteered
        steering, drift = self.steering(candidate), self._drift(candidate)
        prompts = [self._unsteered.prompts[i] for i in indices]

        def answers(part: Sequence[int]) -> JudgedAnswers:
            drafts = [before.answers[k] for k in part]
            return self._answers([indices[k] for k in part], steering, asking, drafts)

        unsteered_again, steered_again = self._unsteered_again[full], self._second_run(steering, full)

        def again(part: Sequence[int], first: PairedEvaluation) -> tuple[JudgedAnswers, JudgedAnswers]:
            asked = [indices[k] for k in part]
            return unsteered_again.answers(asked, first.before), steered_again.answers(asked, first.after)

        evaluation = compare(prompts, before, drift, answers, again, self.rule, self._answering)
        sensitive, harmful, benign = (evaluation.part(kind=kind) for kind in KINDS)
        targets = sensitive.count("refuses" if self.rule.effect == "remove" else "complies")
        changed = sensitive.wanted(self.rule.effect)
        answered, n_benign = len(evaluation.prompts), len(benign.prompts)
        left_out = len(indices) - answered
        stands_for = self._unsteered.stands_for(evaluation.prompts, self.rule.effect)
        decision = self.rule.decide(evaluation, allowance, stands_for=stands_for)
        traces = trace_record(evaluation.after.answers, evaluation.after.judgements)
        return Trial(
            number,
            candidate,
            fidelity,
            sensitive_remaining=1 - changed / targets if targets else 1.0,  # nothing to change, or not asked
            n_sensitive=targets,
            # A sample may hold no harmful prompt that is refused: nothing is lost there.
            harmful_retention=harmful.kept / harmful.refused if harmful.refused else 1.0,
            benign_closed=(benign.closed - benign.opened) / n_benign if n_benign else None,
            benign_drift=drift.nats,
            degenerate=sum(answer.degenerate for answer in evaluation.after.answers) / answered,
            trace_tokens=traces.mean_tokens if traces else None,
            answered=(answered, asking.max_tokens),
            left_out=left_out,
            feasible=not left_out and decision.verdict != "failed",
            reasons=decision.reasons,
        )

    def _drift(self, candidate: Candidate) -> Drift:
        """Return the drift of a candidate, which short and full trials read once."""
        if candidate not in self._drifts:
            _, before = self._unsteered_logprobs
            with self.model.steered(self.steering(candidate)):
                drift = drift_of(before, self._logprobs(self._drift_answers))
            nats = drift.nats if math.isfinite(drift.nats) else _FAR
            self._drifts[candidate] = replace(drift, nats=nats)
        return self._drifts[candidate]


def _finite_change(before: LogProbs, after: LogProbs) -> float:
    """Return the drift in nats a token; `_FAR`, above any bound, where it is NaN or infinite."""
    nats = mean_change(before, after)
    return nats if math.isfinite(nats) else _FAR
