"""Compare a model with itself under a steering, as `rs-export eval` does.

An `AnswerSource`, a judge, sets of prompts and scale factors go in. For each factor come out, by set:
outcomes and transitions, output flags and drift; and for all sets drift of benign text and speed.
The unsteered side is measured once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.engine import LogProbs
from rs_gguf.engines.generation import Asking
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import TIMED, AnswerSource, JudgedAnswers, judge_answers
from rs_gguf.evaluation.decision import Criterion, Decision
from rs_gguf.evaluation.drift import drift_of, is_drift_reference
from rs_gguf.evaluation.majority import majority
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.evaluation.second_judge import second_opinion
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.registry import Judge, SecondJudge
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.prompts.degenerate import switches_language
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.metrics import Acceptance
from rs_gguf.records.rows import Row, finite

_GROUPS = ("subject", "topic", "form", "language")
_TEXTS = 64  # benign texts whose perplexity is taken
_OF_DRIFT = ("drift", "top-1 agreement")  # criteria that need log-probabilities
OUTPUT_FLAGS = ("empty", "loop", "language_switch", "truncated")


@dataclass(frozen=True)
class _Texts:
    """Log-probabilities at one factor: of unsteered answers, and of benign texts. None if not given."""

    answers: LogProbs | None
    benign: LogProbs | None


def compare(
    answer_source: AnswerSource,
    judge: Judge,
    sets: Mapping[str, Sequence[Prompt]],
    asking: Asking,
    *,
    factors: Sequence[float] = (1.0,),
    second: SecondJudge | None = None,
    divergence: bool = True,
    draws: int = 1,
    known: Collection[str] = (),
    rule: SafetyRule | None = None,
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """Return the figures of each factor, as `rs-export eval --json` has them (docs/eval.md), and `rows`.

    With a `rule` and known kinds, also `acceptance` at each factor other than 0, of all sets in `known`.

    asking: how the prompts are asked.
    draws: answers to each prompt, with consecutive seeds; the majority of their outcomes counts.
    known: names of the sets whose prompts have their own kind. In the others `kind` is a placeholder.
    rule: the limits of the acceptance criteria.
    advance: called for each answer to a prompt, unsteered and at each factor other than 0.

    Raises:
        InputError: before the first answer, if the steering does not fit the model, or the judge cannot be
            used.
    """
    answer_source.check()
    try_out(judge)
    asked = [prompt for members in sets.values() for prompt in members]
    # The first answer reads the weights from the disk, which belongs to neither side's speed.
    answer_source.answers(asked[:1], 0.0, replace(asking, max_tokens=1), lambda n: None)

    ways = [asking.for_draw(k) for k in range(draws)]
    ways_again = [asking.again(draws + k) for k in range(draws)]

    def drawn(
        some: Sequence[Prompt],
        factor: float,
        advance: Advance,
        drafts: Sequence[Answer],
        ways: Sequence[Asking] = ways,
    ) -> JudgedAnswers:
        judged = []
        drafts = drafts if draws == 1 else ()  # an answer of another seed agrees in few tokens
        for how in ways:
            answers, tokens, seconds = answer_source.answers(some, factor, how, advance, drafts)
            judgements = judge_answers(judge, some, answers)
            judged.append(JudgedAnswers(answers, judgements, tokens / seconds if seconds else 0.0))
        return majority(judged)

    def side(factor: float, drafts: Sequence[Answer] = ()) -> JudgedAnswers:
        # All sets together, so the batches are the same on both sides. The speed is that of the first
        # prompts, which are answered without drafts.
        first = drawn(asked[:TIMED], factor, advance, ())
        if len(asked) <= TIMED:
            return first
        rest = drawn(asked[TIMED:], factor, advance, drafts[TIMED:])
        answers, judgements = [*first.answers, *rest.answers], [*first.judgements, *rest.judgements]
        return JudgedAnswers(answers, judgements, first.tokens_per_second)

    def confirmed(evaluation: PairedEvaluation, factor: float) -> PairedEvaluation:
        """Answer the prompts that changed again on both sides: reordered, and with the next seeds."""

        def again(indices: Sequence[int]) -> tuple[JudgedAnswers, JudgedAnswers]:
            some, first = [asked[i] for i in indices], evaluation.take(indices)
            drafts = [asking.drafts(one.answers) for one in (first.before, first.after)]
            return (
                drawn(some, 0.0, lambda n: None, drafts[0], ways_again),
                drawn(some, factor, lambda n: None, drafts[1], ways_again),
            )

        return evaluation.confirmed(again)

    before = side(0.0)
    judged = zip(before.answers, before.judgements, strict=True)
    quiet = [i for i, (answer, judgement) in enumerate(judged) if is_drift_reference(answer, judgement)]
    benign = [p for p in prompts.grid(["benign"]) if p.split == "validation"]
    # In a context only the answers count.
    n_texts = _TEXTS if asking.context == PLAIN else 0
    texts = [p.prompt for p in prompts.stratified(benign, n_texts, seed=0)]

    def logprobs(factor: float) -> _Texts:
        return _Texts(
            answer_source.answer_logprobs(
                [asked[i] for i in quiet], [before.answers[i] for i in quiet], factor, asking
            ),
            answer_source.text_logprobs(texts, factor, asking.system) if texts else None,
        )

    texts_before = logprobs(0.0)
    kl = answer_source.kl_divergences(factors, asking.system) if divergence else None
    places: dict[str, range] = {}
    start = 0
    for name, members in sets.items():
        places[name] = range(start, start + len(members))
        start += len(members)
    results = []
    for k, factor in enumerate(factors):
        after = side(factor, before.answers) if factor else before
        texts_after = logprobs(factor) if factor else texts_before
        compared = confirmed(PairedEvaluation(asked, before, after), factor)
        found: dict[str, Any] = {"scale": factor, "sets": {}}
        rows: list[Row] = []
        for name, indices in places.items():
            evaluation = compared.take(indices)
            some = [{"set": name, **row} for row in _rows(evaluation, known=name in known)]
            rows += some
            picked = [k for k, i in enumerate(quiet) if i in indices]
            found["sets"][name] = {
                **_figures(evaluation, some, known=name in known),
                **_drift(_of(texts_before.answers, picked), _of(texts_after.answers, picked)),
            }
        found["benign_text"] = {"n": len(texts), **_drift(texts_before.benign, texts_after.benign)}
        found["kl_first_token"] = finite(kl[k].first_token) if kl else None
        found["kl_mean"] = finite(kl[k].sequence) if kl else None
        if second is not None:
            opinion = second_opinion(judge, second, {"steered": compared})
            found["second_judge"] = {
                **opinion.judge.model_dump(mode="json"),
                "opened_on_subject": opinion.on_subject["steered"].model_dump(mode="json"),
            }
            rows = [{**row, **more} for row, more in zip(rows, opinion.rows, strict=True)]
        speeds = before.tokens_per_second, after.tokens_per_second
        found["tokens_per_second"] = {
            "unsteered": speeds[0],
            "steered": speeds[1],
            "change": speeds[1] / speeds[0] - 1 if speeds[0] else None,
        }
        judged_indices = [i for name in places if name in known for i in places[name]]
        if rule and factor and judged_indices:
            picked = [
                k for k, i in enumerate(quiet) if asked[i].kind == "benign" and i in set(judged_indices)
            ]
            drifts = _of(texts_before.answers, picked), _of(texts_after.answers, picked)
            evaluation = compared.take(judged_indices)
            found["acceptance"] = _acceptance(evaluation, rule, *drifts).model_dump(mode="json")
        results.append({**found, "rows": rows})
    return results


def _acceptance(
    evaluation: PairedEvaluation, rule: SafetyRule, before: LogProbs | None, after: LogProbs | None
) -> Acceptance:
    """Apply the acceptance criteria of the kinds at hand.

    before, after: log-probabilities of the unsteered answers to benign prompts; None from a server, which
        does not tell them.
    """
    if before is not None and after is not None:
        evaluation = replace(evaluation, drift=drift_of(before, after))
        return rule.decide(evaluation, Allowance.REPORTED).acceptance
    criteria = [c for c in rule.decide(evaluation, Allowance.REPORTED).criteria if c.name not in _OF_DRIFT]
    if any(prompt.kind == "benign" for prompt in evaluation.prompts):
        reason = "a server does not tell how far benign answers drift; give the GGUF file as --model"
        criteria.append(Criterion(_OF_DRIFT[0], "undecided", reason))
    return Decision(tuple(criteria)).acceptance


def compare_in_contexts(
    answer_source: AnswerSource,
    judge: Judge,
    sets: Mapping[str, Sequence[Prompt]],
    asking: Asking,
    contexts: Sequence[Context],
    *,
    factors: Sequence[float] = (1.0,),
    second: SecondJudge | None = None,
    draws: int = 1,
    known: Collection[str] = (),
    rule: SafetyRule | None = None,
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """Return what `compare` does, with each set again in each context, as the set `NAME, CONTEXT`.

    Benign text, KL, speed, acceptance and the second judge go without a context. Raises as `compare` does.
    """
    results = compare(
        answer_source, judge, sets, asking,
        factors=factors, draws=draws, known=known, rule=rule, second=second, advance=advance,
    )  # fmt: skip
    for context in contexts:
        within = {f"{name}, {context.name}": members for name, members in sets.items()}
        found = compare(
            answer_source, judge, within, asking.within(context), factors=factors, draws=draws,
            known=[f"{name}, {context.name}" for name in known], divergence=False, advance=advance,
        )  # fmt: skip
        about = {"context": context.name, "refusals_asked": context.refusals_asked}
        for result, more in zip(results, found, strict=True):
            result["sets"] |= {name: {**figures, **about} for name, figures in more["sets"].items()}
            result["rows"] += more["rows"]
    return results


def _figures(evaluation: PairedEvaluation, rows: Sequence[Row], *, known: bool) -> dict[str, Any]:
    """Return the counts, also by each column told, and how many answers are broken in which way."""
    kinds = {prompt.kind for prompt in evaluation.prompts} if known else set()
    groups = (*_GROUPS, "kind") if len(kinds) > 1 else _GROUPS
    by = {field: sorted({getattr(prompt, field) for prompt in evaluation.prompts}) for field in groups}
    return {
        **evaluation.record(next(iter(kinds)) if len(kinds) == 1 else None).model_dump(mode="json"),
        "output_flags": {side: _flag_counts(rows, side) for side in ("unsteered", "steered")},
        "by": {
            field: {
                value or "not stated": evaluation.part(**{field: value}).record().model_dump(mode="json")
                for value in values
            }
            for field, values in by.items()
            if any(values)
        },
    }


def _rows(evaluation: PairedEvaluation, *, known: bool) -> list[Row]:
    rows = evaluation.rows()
    for i, (row, prompt) in enumerate(zip(rows, evaluation.prompts, strict=True)):
        del row["split"]
        if not known:
            del row["kind"]
        for name, side in (("unsteered", evaluation.before), ("steered", evaluation.after)):
            row[f"flags_{name}"] = [fault for fault in OUTPUT_FLAGS if _has(fault, prompt, side.answers[i])]
    return rows


def _has(fault: str, prompt: Prompt, answer: Answer) -> bool:
    if fault == "empty":
        return answer.to_judge == ""
    if fault == "loop":
        return answer.degenerate and bool(answer.text)
    if fault == "truncated":
        return not answer.finished
    return switches_language(prompt, answer.text)


def _flag_counts(rows: Sequence[Row], side: str) -> dict[str, int]:
    return {fault: sum(fault in row[f"flags_{side}"] for row in rows) for fault in OUTPUT_FLAGS}


def _of(found: LogProbs | None, picked: Sequence[int]) -> LogProbs | None:
    return None if found is None else [found[i] for i in picked]


def _drift(before: LogProbs | None, after: LogProbs | None) -> dict[str, float | None]:
    found = drift_of(before or [], after or [])
    values = {
        "drift": found.nats,
        "top1_agreement": found.top1_agreement,
        "perplexity_unsteered": found.perplexity_unsteered,
        "perplexity_steered": found.perplexity_steered,
    }
    return {name: finite(value) for name, value in values.items()}
