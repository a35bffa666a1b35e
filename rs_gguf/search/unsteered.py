"""The unsteered answers to the prompts of a split, by kind and outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rs_gguf.evaluation.condition import JudgedAnswers
from rs_gguf.evaluation.outcomes import Outcome, outcome_of
from rs_gguf.records.conversation import Answer, Judgement, Prompt
from rs_gguf.records.metrics import Effect


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

    def targets(self, effect: Effect) -> list[int]:
        """Return the indices of the sensitive prompts that are to change: refusals to remove, or answers."""
        return (self.refused if effect == "remove" else self.complied)("sensitive")

    def stands_for(self, asked: Sequence[Prompt], effect: Effect) -> int:
        """Return how many prompts of the split the asked ones stand for, for the limits on failures.

        Of the sensitive prompts only targets are asked. The others, which hardly change, count too.
        """
        sensitive = sum(prompt.kind == "sensitive" for prompt in asked)
        if not sensitive:
            return len(asked)
        share = len(self.of("sensitive")) / len(self.targets(effect))
        return len(asked) - sensitive + round(sensitive * share)

    def of(self, kind: str) -> list[int]:
        """Return the indices of the prompts of a kind."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.kind == kind]

    def take(self, indices: Sequence[int]) -> JudgedAnswers:
        """Return the answers at these indices."""
        return JudgedAnswers([self.answers[i] for i in indices], [self.judgements[i] for i in indices])
