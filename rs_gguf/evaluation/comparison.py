"""Compare a model with itself under a steering, as `rs-export eval` does.

An `AnswerSource`, a judge, sets of prompts and scale factors go in. For each factor come out, by set:
outcomes and transitions, output flags and drift; and for all sets drift of benign text, capability and speed.
The unsteered side is measured once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.engine import LogProbs
from rs_gguf.engines.generation import Asking
from rs_gguf.evaluation import capability
from rs_gguf.evaluation.condition import AnswerSource, JudgedAnswers, judge_answers
from rs_gguf.evaluation.drift import drift_of, is_drift_reference
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.evaluation.second_judge import second_opinion
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.registry import Judge, SecondJudge
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.prompts.degenerate import switches_language
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.rows import Row, finite

_GROUPS = ("subject", "topic", "form", "language")
_TEXTS = 64  # benign texts whose perplexity is taken
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
    tasks: Sequence[capability.Task] = (),
    second: SecondJudge | None = None,
    divergence: bool = True,
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """Return the figures of each factor, as `rs-export eval --json` has them (docs/eval.md), and `rows`.

    asking: how the prompts are asked. Tasks, which have one right answer each, are solved greedily.
    advance: called for each answer to a prompt or task, unsteered and at each factor other than 0.

    Raises:
        InputError: before the first answer, if the steering does not fit the model, or the judge cannot be
            used.
    """
    answer_source.check()
    try_out(judge)
    asked = [prompt for members in sets.values() for prompt in members]
    # The first answer reads the weights from the disk, which belongs to neither side's speed.
    answer_source.answers(asked[:1], 0.0, replace(asking, max_tokens=1), lambda n: None)

    def side(factor: float) -> JudgedAnswers:
        # All sets at once: the same batches on both sides.
        answers, tokens, seconds = answer_source.answers(asked, factor, asking, advance)
        return JudgedAnswers(
            answers, judge_answers(judge, asked, answers), tokens / seconds if seconds else 0.0
        )

    def confirmed(evaluation: PairedEvaluation, factor: float) -> PairedEvaluation:
        """Answer the prompts that changed again on both sides, in reverse order."""
        indices = evaluation.changed()[::-1]
        again = [asked[i] for i in indices]
        if not again:
            return evaluation.confirmed_by([], evaluation.take([]))

        def second(scale: float) -> JudgedAnswers:
            answers = answer_source.answers(again, scale, asking, lambda n: None)[0]
            return JudgedAnswers(answers, judge_answers(judge, again, answers))

        return evaluation.confirmed_by(indices, PairedEvaluation(again, second(0.0), second(factor)))

    def solutions(factor: float) -> list[capability.Solution]:
        def ask(some: Sequence[Prompt], limit: int) -> list[Answer]:
            return answer_source.answers(some, factor, Asking(asking.system, limit), advance)[0]

        return capability.solve(ask, tasks)

    before, solved = side(0.0), solutions(0.0)
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
        after, solved_now, texts_after = (
            (side(factor), solutions(factor), logprobs(factor)) if factor else (before, solved, texts_before)
        )
        compared = confirmed(PairedEvaluation(asked, before, after), factor)
        found: dict[str, Any] = {"scale": factor, "sets": {}}
        rows: list[Row] = []
        for name, indices in places.items():
            evaluation = compared.take(indices)
            some = [{"set": name, **row} for row in _rows(evaluation)]
            rows += some
            picked = [k for k, i in enumerate(quiet) if i in indices]
            found["sets"][name] = {
                **_figures(evaluation, some),
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
        if tasks:
            found["capability"] = capability.compare(solved, solved_now)
        results.append({**found, "rows": rows})
    return results


def compare_in_contexts(
    answer_source: AnswerSource,
    judge: Judge,
    sets: Mapping[str, Sequence[Prompt]],
    asking: Asking,
    contexts: Sequence[Context],
    *,
    factors: Sequence[float] = (1.0,),
    tasks: Sequence[capability.Task] = (),
    second: SecondJudge | None = None,
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """Return what `compare` does, with each set again in each context, as the set `NAME, CONTEXT`.

    Benign text, KL, speed, tasks and the second judge go without a context. Raises as `compare` does.
    """
    results = compare(
        answer_source, judge, sets, asking, factors=factors, tasks=tasks, second=second, advance=advance
    )
    for context in contexts:
        within = {f"{name}, {context.name}": members for name, members in sets.items()}
        found = compare(
            answer_source,
            judge,
            within,
            asking.within(context),
            factors=factors,
            divergence=False,
            advance=advance,
        )
        about = {"context": context.name, "refusals_asked": context.refusals_asked}
        for result, more in zip(results, found, strict=True):
            result["sets"] |= {name: {**figures, **about} for name, figures in more["sets"].items()}
            result["rows"] += more["rows"]
    return results


def _figures(evaluation: PairedEvaluation, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the counts, also by each column told, and how many answers are broken in which way."""
    by = {field: sorted({getattr(prompt, field) for prompt in evaluation.prompts}) for field in _GROUPS}
    return {
        **evaluation.record().model_dump(mode="json"),
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


def _rows(evaluation: PairedEvaluation) -> list[Row]:
    rows = evaluation.rows()
    for i, (row, prompt) in enumerate(zip(rows, evaluation.prompts, strict=True)):
        # Of a stranger's file neither is known.
        del row["kind"], row["split"]
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
