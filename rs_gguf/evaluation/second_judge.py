"""What a second judge says of answers that another judge graded, and of the answers that opened.

Paired evaluations by file and a `SecondJudge` go in. The agreement of both judges, further columns of
`test_answers.jsonl`, and the shares of opened answers that stay on the subject come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rs_gguf.evaluation.condition import JudgedAnswers, judge_answers
from rs_gguf.evaluation.outcomes import Class, Outcome, class_of, outcome_of
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.evaluation.paired_statistics import clusters_of, rate_interval
from rs_gguf.judges.local import on_subject
from rs_gguf.judges.registry import Judge, SecondJudge
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.metrics import JudgeRecord, Share
from rs_gguf.records.rows import Row


@dataclass(frozen=True)
class SecondOpinion:
    """Both judges' figures, a row of further columns for each prompt, and shares on the subject by file."""

    judge: JudgeRecord
    rows: list[Row]
    on_subject: dict[str, Share]


def second_opinion(
    first: Judge, second: SecondJudge, evaluations: Mapping[str, PairedEvaluation]
) -> SecondOpinion:
    """Let the second judge grade the unsteered and the steered answers of each file.

    In the rows, a change that a second run did not show counts as none for both judges. Their agreement
    counts every answer as it is.
    """
    by_second: dict[str, list[Outcome]] = {}
    pairs: list[tuple[Class, Class]] = []
    before: JudgedAnswers | None = None
    for name, one in evaluations.items():
        if before is None:  # the same for all files
            before = _judged(second.judge, one.prompts, one.before)
            pairs += zip(_classes(one.before), _classes(before), strict=True)
        after = _judged(second.judge, one.prompts, one.after)
        pairs += zip(_classes(one.after), _classes(after), strict=True)
        again = replace(one, before=before, after=after)
        by_second["unsteered"], by_second[name] = map(list, zip(*again.outcomes, strict=True))
    columns = {f"outcome_{side}_second": outcomes for side, outcomes in by_second.items()}
    disagreed = Counter(f"{a}, {b}" for a, b in pairs if a != b)
    return SecondOpinion(
        JudgeRecord(
            name=first.name,
            second=second.judge.name,
            n=len(pairs),
            disagreements=disagreed.total(),
            disagreed=dict(disagreed.most_common()),
            kappa=_kappa(pairs),
        ),
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        {name: _on_subject(second, one) for name, one in evaluations.items()},
    )


def _kappa(pairs: Sequence[tuple[Class, Class]]) -> float:
    """Return Cohen's κ of two labels for each answer; NaN if all labels are equal."""
    from sklearn.metrics import cohen_kappa_score

    if len({label for pair in pairs for label in pair}) < 2:
        return float("nan")
    return float(cohen_kappa_score(*zip(*pairs, strict=True)))


def _classes(side: JudgedAnswers) -> list[Class]:
    return [class_of(outcome_of(a, j)) for a, j in zip(side.answers, side.judgements, strict=True)]


def _judged(judge: Judge, prompts: Sequence[Prompt], side: JudgedAnswers) -> JudgedAnswers:
    return replace(side, judgements=judge_answers(judge, prompts, side.answers))


def _on_subject(second: SecondJudge, evaluation: PairedEvaluation) -> Share:
    """Return how many of the sensitive answers that opened are about what was asked."""
    opened = [
        prompt.kind == "sensitive" and pair == ("refuses", "complies")
        for prompt, pair in zip(evaluation.prompts, evaluation.classes, strict=True)
    ]
    indices = [i for i, is_opened in enumerate(opened) if is_opened]
    answers = evaluation.after.answers
    flags = on_subject(second.model, [(evaluation.prompts[i].prompt, answers[i].to_judge) for i in indices])
    hits = [False] * len(opened)
    for i, flag in zip(indices, flags, strict=True):
        hits[i] = flag
    return Share(
        n=sum(hits), of=sum(opened), ci95=rate_interval(hits, opened, clusters_of(evaluation.prompts))
    )
