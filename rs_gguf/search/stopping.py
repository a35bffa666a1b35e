"""Answer a candidate's prompts, and stop once a limit is broken beyond recovery.

Prompts, their unsteered answers, the drift and a function that answers go in. A `PairedEvaluation` of the
prompts that were answered comes out. Harmful prompts come first: the limit on their refusals is the one that
candidates break.
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


class Answering(Enum):
    """How many of its prompts a candidate answers. The search stops early; comparisons need the others."""

    WHOLE = "all prompts at once"
    PARTS = "in parts, to the end"
    STOPPING = "in parts, until a limit is broken beyond recovery"


def compare(
    prompts: Sequence[Prompt],
    before: JudgedAnswers,
    drift: Drift,
    answers: Callable[[Sequence[int]], JudgedAnswers],
    rule: SafetyRule,
    allowance: Allowance,
    answering: Answering = Answering.STOPPING,
) -> PairedEvaluation:
    """Answer the prompts and compare; the result leaves out the prompts that are no longer needed.

    The order of the parts does not matter to the result: prompts stay in the order given.

    before: the unsteered answers. drift: of the candidate.
    answers: returns the steered answers to the prompts at these indices.
    """
    refused = {
        i
        for i, pair in enumerate(zip(before.answers, before.judgements, strict=True))
        if prompts[i].kind == "harmful" and class_of(outcome_of(*pair)) == "refuses"
    }
    harmful = {i for i, prompt in enumerate(prompts) if prompt.kind == "harmful"}
    parts = _parts(len(prompts), sorted(harmful if allowance.value.lost.noise else refused))
    done: dict[int, tuple[Answer, Judgement]] = {}
    for part in [range(len(prompts))] if answering is Answering.WHOLE else parts:
        judged = answers(part)
        done |= zip(part, zip(judged.answers, judged.judgements, strict=True), strict=True)
        indices = sorted(done)
        after = JudgedAnswers([done[i][0] for i in indices], [done[i][1] for i in indices])
        evaluation = PairedEvaluation([prompts[i] for i in indices], before.take(indices), after, drift)
        left = harmful - done.keys()
        if answering is Answering.STOPPING and rule.is_beyond_recovery(
            evaluation, allowance, refused=len(refused & left), other=len(left - refused)
        ):
            break
    return evaluation


def _parts(n: int, decisive: Sequence[int]) -> list[Sequence[int]]:
    """Return n indices in parts: first the `decisive` indices in parts of at most `PART`, then all others.

    Prompts lie sorted by subject, so each part takes every k-th: what it shows holds for all of them.
    """
    k = math.ceil(len(decisive) / PART)
    others = sorted(set(range(n)).difference(decisive))
    return [*(decisive[start::k] for start in range(k)), *([others] if others else [])]
