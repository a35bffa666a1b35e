"""Answer a candidate's prompts, and stop once a limit is broken beyond recovery.

Prompts, their unsteered answers, the drift and functions that answer go in. A `PairedEvaluation` of the
prompts that were answered comes out, whose changes a second run shows too. Harmful prompts come first: the
limit on their refusals is the one that candidates break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum

from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import PART, JudgedAnswers
from rs_gguf.evaluation.drift import Drift
from rs_gguf.evaluation.outcomes import class_of, outcome_of
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.records.conversation import Answer, Judgement, Prompt

_SEARCH = Allowance.FULL  # as in short answers: both grant the same for harmful refusals


class Answering(Enum):
    """How many of its prompts a candidate answers. The search stops early; comparisons need the others."""

    WHOLE = "all prompts at once"
    PARTS = "in parts, to the end"
    STOPPING = "in parts, until a limit is broken beyond recovery"


class SecondRun:
    """The second answers of one side, each given once.

    Their sums have another order, so near ties fall freely.
    """

    def __init__(self, answer: Callable[[Sequence[int], Sequence[Answer]], JudgedAnswers]) -> None:
        """`answer` answers the prompts at these indices from drafts, one for each."""
        self._answer = answer
        self._seen: dict[int, tuple[Answer, Judgement]] = {}

    def answers(self, indices: Sequence[int], first: JudgedAnswers) -> JudgedAnswers:
        """Return second answers to the prompts at these indices; the first ones are their drafts."""
        missing = [k for k, i in enumerate(indices) if i not in self._seen]
        if missing:
            judged = self._answer([indices[k] for k in missing], [first.answers[k] for k in missing])
            pairs = zip(judged.answers, judged.judgements, strict=True)
            self._seen |= {indices[k]: pair for k, pair in zip(missing, pairs, strict=True)}
        seen = [self._seen[i] for i in indices]
        return JudgedAnswers([answer for answer, _ in seen], [judgement for _, judgement in seen])


def compare(
    prompts: Sequence[Prompt],
    before: JudgedAnswers,
    drift: Drift,
    answers: Callable[[Sequence[int]], JudgedAnswers],
    again: Callable[[Sequence[int], PairedEvaluation], tuple[JudgedAnswers, JudgedAnswers]],
    rule: SafetyRule,
    answering: Answering = Answering.STOPPING,
) -> PairedEvaluation:
    """Answer the prompts and compare; the result leaves out the prompts that are no longer needed.

    The order of the parts does not matter to the result: prompts stay in the order given.

    before: the unsteered answers. drift: of the candidate.
    answers: returns the steered answers to the prompts at these indices.
    again: returns second answers on both sides to the prompts at these indices. Its other argument has the
        first ones.
    """
    refused = {
        i
        for i, pair in enumerate(zip(before.answers, before.judgements, strict=True))
        if prompts[i].kind == "harmful" and class_of(outcome_of(*pair)) == "refuses"
    }
    parts = _parts(len(prompts), sorted(refused))
    done: dict[int, tuple[Answer, Judgement]] = {}
    for part in [range(len(prompts))] if answering is Answering.WHOLE else parts:
        judged = answers(part)
        done |= zip(part, zip(judged.answers, judged.judgements, strict=True), strict=True)
        indices = sorted(done)
        after = JudgedAnswers([done[i][0] for i in indices], [done[i][1] for i in indices])
        evaluation = PairedEvaluation([prompts[i] for i in indices], before.take(indices), after, drift)
        left = len(refused - done.keys())
        if answering is not Answering.STOPPING or not rule.is_beyond_recovery(evaluation, _SEARCH, left):
            continue
        # Near ties may have flipped. These do not count as lost.
        confirmed = _confirmed(evaluation, indices, again)
        if rule.is_beyond_recovery(confirmed, _SEARCH, left):
            return confirmed
    return _confirmed(evaluation, indices, again)


def _confirmed(
    evaluation: PairedEvaluation,
    indices: Sequence[int],
    again: Callable[[Sequence[int], PairedEvaluation], tuple[JudgedAnswers, JudgedAnswers]],
) -> PairedEvaluation:
    """Return the evaluation of the prompts at these indices with the changes that a second run shows too."""
    return evaluation.confirmed(lambda some: again([indices[k] for k in some], evaluation.take(some)))


def _parts(n: int, decisive: Sequence[int]) -> list[Sequence[int]]:
    """Return n indices in parts: first the `decisive` indices in parts of at most `PART`, then all others.

    Prompts lie sorted by subject, so each part takes every k-th: what it shows holds for all of them.
    """
    k = math.ceil(len(decisive) / PART)
    others = sorted(set(range(n)).difference(decisive))
    return [*(decisive[start::k] for start in range(k)), *([others] if others else [])]
