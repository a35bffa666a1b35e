"""Measure thinking traces beside the final answers: length, missing ends, loops and refusals.

Answers with their judgements go in; one `TraceRecord` comes out, or None where no answer has a trace. The
outcome of an answer never comes from its trace, except that an answer that never came fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from rs_gguf.evaluation.outcomes import outcome_of
from rs_gguf.prompts.markers import mentions_refusal
from rs_gguf.records.conversation import Answer, Judgement
from rs_gguf.records.metrics import TraceRecord


def may_refuse_in_trace(answer: Answer, judgement: Judgement) -> bool:
    """Return whether the trace is worth a judgement of its own.

    It has a phrase of refusal, and the final answer is missing, cannot be judged or evades.
    """
    if answer.trace is None or not mentions_refusal(answer.trace.text):
        return False
    return outcome_of(answer, judgement) in ("evasion", "fails", "unjudged")


def trace_record(answers: Sequence[Answer], judgements: Sequence[Judgement]) -> TraceRecord | None:
    """Return what is counted of the traces; None if no answer has one."""
    traces = [answer.trace for answer in answers if answer.trace]
    if not traces:
        return None
    lengths = [trace.tokens for trace in traces if trace.tokens is not None]
    return TraceRecord(
        n=len(traces),
        mean_tokens=sum(lengths) / len(lengths) if lengths else None,
        endless=sum(not trace.ended for trace in traces),
        loops=sum(trace.loops for trace in traces),
        refusal_phrases=sum(mentions_refusal(trace.text) for trace in traces),
        refused_in_trace=sum(judgement.refused_in_trace for judgement in judgements),
    )
