"""Several answers to each prompt, counted by the majority of their outcomes.

`JudgedAnswers` to the same prompts, drawn with different seeds, go in; one `JudgedAnswers` comes out.
`PROTOCOLS` says how others draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rs_gguf.evaluation.condition import JudgedAnswers
from rs_gguf.evaluation.outcomes import class_of, outcome_of


def majority(draws: Sequence[JudgedAnswers]) -> JudgedAnswers:
    """Return for each prompt the first answer of the class that most of its answers have.

    Classes are as in transitions: complies, refuses, fails, unjudged. Of classes with equally many votes,
    the one that was drawn first wins; with an odd number of draws and two classes there is no tie.
    """
    answers, judgements = [], []
    for i in range(len(draws[0].answers)):
        drawn = [(draw.answers[i], draw.judgements[i]) for draw in draws]
        classes = [class_of(outcome_of(*pair)) for pair in drawn]
        winner = Counter(classes).most_common(1)[0][0]
        answer, judgement = drawn[classes.index(winner)]
        answers.append(answer)
        judgements.append(judgement)
    return JudgedAnswers(answers, judgements, mean(draw.tokens_per_second for draw in draws))


@dataclass(frozen=True)
class Protocol:
    """How others measure: answers to each prompt, their sampling temperature, and their most tokens."""

    draws: int
    temperature: float
    tokens: int


PROTOCOLS = {"compactifai": Protocol(draws=5, temperature=0.6, tokens=512)}
"""Protocols by name. `compactifai`: arXiv 2512.16602 and its published code, with shorter answers."""
