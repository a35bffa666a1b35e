"""Select the system prompt that serves as a baseline, on the tune split.

Several wordings, and the unsteered answers to the tune prompts, go in. The wording that a run measures comes
out. The limits of the search apply.
"""

from __future__ import annotations

from collections.abc import Sequence

from rs_gguf.engines.answers import Advance, logprobs_of
from rs_gguf.engines.engine import Engine
from rs_gguf.engines.generation import Asking
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import Condition, resume_condition
from rs_gguf.evaluation.drift import drift_of, is_drift_reference
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.judges.registry import Judge
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import Effect
from rs_gguf.records.rows import RowLog
from rs_gguf.search.unsteered import UnsteeredAnswers


def select_system_prompt(
    model: Engine,
    judge: Judge,
    unsteered: UnsteeredAnswers,
    wordings: Sequence[Condition],
    asking: Asking,
    rule: SafetyRule,
    log: RowLog,
    *,
    n: int,
    seed: int,
    advance: Advance = lambda count: None,
) -> Condition:
    """Return the feasible wording that changes most prompts as wanted.

    If none is feasible, return the one that keeps most harmful refusals, as the search does; then that which
    changes most.

    unsteered: the tune split, answered as `asking` says.
    log: keeps each answer, so that a killed run goes on.
    n: prompts of each kind; all wordings answer the same ones.
    advance: called for each answer.
    """
    indices = sample(unsteered, rule.effect, n, seed)
    prompts, before = [unsteered.prompts[i] for i in indices], unsteered.take(indices)
    references = [
        (prompt, answer)
        for prompt, answer, judgement in zip(prompts, before.answers, before.judgements, strict=True)
        if prompt.kind == "benign" and is_drift_reference(answer, judgement)
    ]
    benign, answers = [prompt for prompt, _ in references], [answer for _, answer in references]
    stands_for = unsteered.stands_for(prompts, rule.effect)
    plain = logprobs_of(model, benign, answers, asking.system)

    def merit(wording: Condition) -> tuple[bool, int, int]:
        drafts = before.answers
        after = resume_condition(model, judge, wording, prompts, asking, log, advance, drafts=drafts)
        drift = drift_of(plain, logprobs_of(model, benign, answers, wording.system))
        evaluation = PairedEvaluation(prompts, before, after, drift)
        sensitive, harmful = evaluation.part(kind="sensitive"), evaluation.part(kind="harmful")
        decision = rule.decide(evaluation, Allowance.SHORT, stands_for=stands_for)
        feasible = decision.verdict != "failed"
        return feasible, 0 if feasible else harmful.kept, sensitive.wanted(rule.effect)

    return max(wordings, key=merit)


def sample(unsteered: UnsteeredAnswers, effect: Effect, n: int, seed: int) -> list[int]:
    """Return the indices of at most n prompts of each kind; of the sensitive ones, those that are to change.

    A kind without such prompts is left out.
    """
    chosen: list[int] = []
    for kind in KINDS:
        indices = unsteered.targets(effect) if kind == "sensitive" else unsteered.of(kind)
        index = {unsteered.prompts[i].id: i for i in indices}
        rows = stratified([unsteered.prompts[i] for i in indices], n, seed=seed)
        chosen += [index[prompt.id] for prompt in rows]
    return chosen
