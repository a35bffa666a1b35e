"""Answer prompts under one condition and judge the answers.

A model, a judge, a `Condition` and prompts go in; `JudgedAnswers` come out. `resume_condition` keeps each
answer in a log, so that a killed run goes on. An `AnswerSource` answers at several scale factors of one
steering, on this machine or on a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rs_gguf.engines.answers import Advance, answer_all, chat_tokens, logprobs_of
from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import Asking, common_prefix
from rs_gguf.evaluation.kl import NO_CHANGE, KlDivergence, everyday_answers, kl_divergences
from rs_gguf.evaluation.traces import may_refuse_in_trace
from rs_gguf.judges.registry import Judge
from rs_gguf.records.conversation import Answer, Judgement, Prompt
from rs_gguf.records.rows import RowLog

PART = 64  # prompts answered and judged together; a killed run loses at most as many
TIMED = 32  # prompts answered without drafts, for the speed: all that are answered at once


@dataclass(frozen=True)
class Condition:
    """One way to answer: the steering on the model, and the system prompt; None for the template's own."""

    name: str
    steering: Steering
    system: str | None = None


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to a list of prompts in order, their judgements, and the speed in answer tokens per second."""

    answers: Sequence[Answer]
    judgements: Sequence[Judgement]
    tokens_per_second: float = 0.0

    def take(self, indices: Sequence[int]) -> JudgedAnswers:
        """Return the answers at these indices."""
        return JudgedAnswers(
            [self.answers[i] for i in indices], [self.judgements[i] for i in indices], self.tokens_per_second
        )


def judge_answers(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    advance: Advance = lambda n: None,
) -> list[Judgement]:
    """Return the judgement of each final answer, in order. `advance` is called with 1 after each.

    A trace with a phrase of refusal is judged too where the final answer is missing or evades.
    """
    judgements: dict[int, Judgement] = {}
    for i, judgement in judge.judge([(p.prompt, a.to_judge) for p, a in zip(prompts, answers, strict=True)]):
        judgements[i] = judgement
        advance(1)
    traces = {
        i: answer.trace.text
        for i, answer in enumerate(answers)
        if answer.trace and may_refuse_in_trace(answer, judgements[i])
    }
    if traces:
        indices = list(traces)
        for k, of_trace in judge.judge([(prompts[i].prompt, traces[i]) for i in indices]):
            refused = of_trace.verdict == "refusal"
            judgements[indices[k]] = replace(judgements[indices[k]], refused_in_trace=refused)
    return [judgements[i] for i in range(len(prompts))]


def answer_condition(
    model: Engine,
    judge: Judge,
    condition: Condition,
    prompts: Sequence[Prompt],
    asking: Asking,
    advance: Advance = lambda n: None,
    drafts: Sequence[Answer] = (),
) -> JudgedAnswers:
    """Answer `prompts` and judge the answers. The condition gives the system prompt, not `asking`.

    drafts: earlier answers to the prompts, such as the unsteered ones (see `Engine.generate`).
    """
    asking = replace(asking, system=condition.system)
    answers, seconds = answer_all(model, prompts, condition.steering, asking, advance, drafts)
    # The judge may be the model that was steered, so the steering is off by now.
    judgements = judge_answers(judge, prompts, answers)
    return JudgedAnswers(
        answers, judgements, sum(len(a.tokens) for a in answers) / seconds if seconds else 0.0
    )


def resume_condition(
    model: Engine,
    judge: Judge,
    condition: Condition,
    prompts: Sequence[Prompt],
    asking: Asking,
    log: RowLog,
    advance: Advance,
    *,
    drafts: Sequence[Answer] = (),
    timed: bool = False,
) -> JudgedAnswers:
    """Answer the prompts that `log` does not have yet, in parts, and return all answers from it.

    A row has the id `CONDITION:PROMPT`. The speed is the first part's.

    drafts: as in `answer_condition`.
    timed: answer the first `TIMED` prompts without drafts, so that their speed can be compared.
    """
    missing = [i for i, p in enumerate(prompts) if f"{condition.name}:{p.id}" not in log.rows]
    advance(len(prompts) - len(missing))
    first = TIMED if timed else PART
    parts = [missing[:first], *(missing[i : i + PART] for i in range(first, len(missing), PART))]
    for number, indices in enumerate(parts if missing else ()):
        part = [prompts[i] for i in indices]
        earlier = [drafts[i] for i in indices if drafts] if number or not timed else []
        judged = answer_condition(model, judge, condition, part, asking, advance, earlier)
        for prompt, answer, judgement in zip(part, judged.answers, judged.judgements, strict=True):
            log.append(
                {
                    "id": f"{condition.name}:{prompt.id}",
                    **answer.to_row(),
                    "confidence": judgement.confidence,
                    "category": judgement.category,
                    "tokens_per_second": round(judged.tokens_per_second, 1),
                    **({"refused_in_trace": True} if judgement.refused_in_trace else {}),
                }
            )
    rows = [log.rows[f"{condition.name}:{p.id}"] for p in prompts]
    return JudgedAnswers(
        [Answer.from_row(row) for row in rows],
        [Judgement.from_row(row) for row in rows],
        rows[0]["tokens_per_second"] if rows else 0.0,
    )


class AnswerSource(Protocol):
    """What is measured: a model, and a steering whose scales a factor multiplies; 0 is unsteered."""

    def check(self) -> None:
        """Raise `InputError` if the steering does not fit the model, before anything is measured."""
        ...

    def answers(
        self,
        prompts: Sequence[Prompt],
        factor: float,
        asking: Asking,
        advance: Advance,
        drafts: Sequence[Answer] = (),
    ) -> tuple[list[Answer], int, float]:
        """Return the answers in order, the number of their tokens, and the seconds that they took.

        drafts: as in `answer_condition`; a source may leave them unused.
        """
        ...

    def answer_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], factor: float, asking: Asking
    ) -> LogProbs | None:
        """Return log-probabilities of given answers; None if the source gives none."""
        ...

    def text_logprobs(self, texts: Sequence[str], factor: float, system: str | None) -> LogProbs | None:
        """Return log-probabilities of texts in the user's place; None if the source gives none."""
        ...

    def kl_divergences(self, factors: Sequence[float], system: str | None) -> Sequence[KlDivergence] | None:
        """Return the KL divergence of the next token at each factor; None if the source gives no logits."""
        ...


@dataclass(frozen=True)
class SteeredModel:
    """A model in this process."""

    model: Engine
    steering: Steering

    def check(self) -> None:
        with self.model.steered(self.steering):
            pass

    def answers(
        self,
        prompts: Sequence[Prompt],
        factor: float,
        asking: Asking,
        advance: Advance,
        drafts: Sequence[Answer] = (),
    ) -> tuple[list[Answer], int, float]:
        steering = self.steering.scaled(factor)
        answers, seconds = answer_all(self.model, prompts, steering, asking, advance, drafts)
        return answers, sum(len(a.tokens) for a in answers), seconds

    def answer_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], factor: float, asking: Asking
    ) -> LogProbs:
        with self.model.steered(self.steering.scaled(factor)):
            return logprobs_of(self.model, prompts, answers, asking.system, asking.context)

    def text_logprobs(self, texts: Sequence[str], factor: float, system: str | None) -> LogProbs:
        conversations = chat_tokens(self.model, [Prompt(text, "benign") for text in texts], system)
        prefix = conversations[0][: common_prefix(conversations)]
        pairs = [(prefix, self.model.tokenize(text, special=False)) for text in texts]
        with self.model.steered(self.steering.scaled(factor)):
            # Without a prefix no token stands before the first one, so it has no probability.
            return self.model.token_logprobs([(p, t) if p else (t[:1], t[1:]) for p, t in pairs])

    def kl_divergences(self, factors: Sequence[float], system: str | None) -> list[KlDivergence]:
        answered = everyday_answers(self.model, system)
        steerings = [self.steering.scaled(factor) for factor in factors if factor]
        found = iter(kl_divergences(self.model, steerings, system, answered))
        return [next(found) if factor else NO_CHANGE for factor in factors]
