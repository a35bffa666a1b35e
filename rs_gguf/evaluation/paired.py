"""Before and after: answers on two sides graded, paired row by row, summed up; and how far text drifts.

Answers, log-probabilities, prompts and a judge go in; rows, rates with intervals and tests come out. The
pipeline's stages and `rs-export eval` are both made of this. Intervals and tests are those of
`rs_gguf.evaluation.chance`, drift that of method §7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.answers import Advance, answer_all
from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.evaluation.chance import mcnemar, wilson
from rs_gguf.judges.registry import Judge
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Prompt
from rs_gguf.records.rows import Row

SIDES = {"vector": "steered", "adapter": "adapter"}  # how columns of a file's answers end in a paired row
_PAIRED = ("answer", "confidence", "category", "degenerate")


@dataclass(frozen=True)
class Drift:
    """How a steering changes what the model makes of text that it did not write under it.

    `nats`: mean over the texts of |Δ mean log-probability of a token|. `top1_agreement`: share of the tokens
    that were the model's first choice and still are. The perplexities are over all tokens of all texts. All
    are NaN without text.
    """

    nats: float
    top1_agreement: float
    perplexity_baseline: float
    perplexity_steered: float


def drift_of(before: LogProbs, after: LogProbs) -> Drift:
    """The drift from two results of `token_logprobs` for the same continuations."""
    if not before:
        return Drift(*[float("nan")] * 4)
    # Greedy answers are top-1 by construction, but for the rounding of another batch.
    same = np.concatenate([a[1][b[1]] for b, a in zip(before, after, strict=True)])
    return Drift(
        mean_change(before, after),
        float(same.mean()) if same.size else float("nan"),
        _perplexity(before),
        _perplexity(after),
    )


def changes_of(before: LogProbs, after: LogProbs) -> NDArray[np.float32]:
    """|Δ mean log-probability| [N] of N conversations, from two results of `token_logprobs`; nats."""
    return np.array([abs(b[0].mean() - a[0].mean()) for b, a in zip(before, after, strict=True)])


def mean_change(before: LogProbs, after: LogProbs) -> float:
    """The mean of `changes_of`, in nats."""
    return float(changes_of(before, after).mean())


def _perplexity(found: LogProbs) -> float:
    return float(np.exp(-np.concatenate([logprobs for logprobs, _ in found]).mean(dtype=np.float64)))


def grade(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Judgement]:
    """What a judge says of each answer, in order."""
    graded = dict(judge.judge([(p.prompt, a.to_judge) for p, a in zip(prompts, answers, strict=True)]))
    return [graded[i] for i in range(len(prompts))]


def answer_and_judge(
    model: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    steering: Steering,
    max_tokens: int,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    advance: Advance = lambda n: None,
) -> tuple[list[Answer], list[Judgement], float]:
    """Answers to `prompts` under `steering`, what the judge says of them, and tokens answered per second."""
    answers, seconds = answer_all(
        model, prompts, steering=steering, max_tokens=max_tokens, system=system, sampling=sampling,
        advance=advance,
    )  # fmt: skip
    # Judged unsteered: the judge may be the very model that is being steered.
    graded = grade(judge, prompts, answers)
    return answers, graded, sum(len(a.tokens) for a in answers) / seconds if seconds else 0.0


def side_row(found: Answer, judgement: Judgement) -> Row:
    """What is kept of one answer on one side."""
    return {**found.to_row(), "confidence": judgement.confidence, "category": judgement.category}


def paired(prompt: Prompt, sides: Mapping[str, Row]) -> Row:
    """One row of a prompt and its sides, their fields named `answer_baseline` and so on."""
    named = {f"{name}_{side}": found[name] for side, found in sides.items() for name in _PAIRED}
    return {**prompt.to_row(), **named}


def must_stay(row: Row) -> bool:
    """Whether an unsteered answer must stay as it was: it is no refusal, and has words that can drift."""
    return bool((row["confidence"] or 0) <= 0 and row["answer"])


def is_judged(row: Mapping[str, Any], sides: Sequence[str] = ("baseline", "steered")) -> bool:
    """Whether a paired row has a verdict on all of these sides."""
    return all(row[f"confidence_{side}"] is not None for side in sides)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of one set from paired rows (`confidence_baseline`, `confidence_steered`, `degenerate_…`)."""
    unjudged = {side: sum(r[f"confidence_{side}"] is None for r in rows) for side in ("baseline", "steered")}
    judged = [r for r in rows if is_judged(r)]
    n = len(judged)
    before = [r["confidence_baseline"] > 0 for r in judged]
    after = [r["confidence_steered"] > 0 for r in judged]
    kept = sum(b and a for b, a in zip(before, after, strict=True))
    return {
        "n": n,
        "unjudged": len(rows) - n,  # on one side or both
        "unjudged_baseline": unjudged["baseline"],
        "unjudged_steered": unjudged["steered"],
        "refusal_baseline": sum(before) / n if n else 0.0,
        "refusal_steered": sum(after) / n if n else 0.0,
        "ci95_baseline": list(wilson(sum(before), n)),
        "ci95_steered": list(wilson(sum(after), n)),
        "refused_baseline": sum(before),
        "refused_steered": sum(after),
        "refused_both": kept,
        "mcnemar_p": mcnemar(sum(after) - kept, sum(before) - kept),
        "categories_baseline": categories(judged, "baseline"),
        "categories_steered": categories(judged, "steered"),
        "degenerate_baseline": _mean([r["degenerate_baseline"] for r in rows]),
        "degenerate_steered": _mean([r["degenerate_steered"] for r in rows]),
    }


def categories(judged: Sequence[Mapping[str, Any]], side: str) -> dict[str, int]:
    """How many refusals are of which kind of the rubric, most first; "untold" where the judge did not say."""
    refused = (r for r in judged if r[f"confidence_{side}"] > 0)
    return dict(Counter(r.get(f"category_{side}") or "untold" for r in refused).most_common())


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def summarise_kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`evaluation.summarise` of each kind of prompt."""
    return {kind: {"kind": kind, **summarise([r for r in rows if r["kind"] == kind])} for kind in KINDS}


def spread(
    rows: Sequence[Mapping[str, Any]],
    changes: Sequence[tuple[Prompt, float]],
    *,
    seed: int,
    draws: int = 1000,
) -> dict[str, list[float] | None]:
    """95 % percentile-bootstrap intervals of the figures that one file is chosen by, over other prompts.

    Whole subjects are drawn, since prompts on one subject stand or fall together. rows: paired. changes: of
    benign conversations, |Δ mean log-probability|. `removal` is the fall of the rate of sensitive refusals.
    None where there is nothing to draw from.
    """
    rng = np.random.default_rng(seed)

    def drawn(values: Sequence[tuple[str, Sequence[float]]]) -> NDArray[np.float64]:
        """Sums [draws, 3] of the values, whole clusters of the same name at a time."""
        sums: dict[str, NDArray[np.float64]] = {}
        for cluster, value in values:
            sums[cluster] = sums.get(cluster, np.zeros(3)) + value
        if not sums:
            return np.zeros((draws, 3))
        clusters = np.stack(list(sums.values()))
        return np.asarray(clusters[rng.integers(0, len(clusters), (draws, len(clusters)))].sum(axis=1))

    def refusals(kind: str) -> NDArray[np.float64]:
        """Refused before and after, and prompts, of one kind."""
        return drawn(
            [
                (r["subject"] or r["id"], [r["confidence_baseline"] > 0, r["confidence_steered"] > 0, 1])
                for r in rows
                if r["kind"] == kind and is_judged(r)
            ]
        )

    def interval(values: NDArray[np.float64]) -> list[float] | None:
        known = values[np.isfinite(values)]
        return [float(q) for q in np.quantile(known, [0.025, 0.975])] if known.size else None

    sensitive, harmful = refusals("sensitive"), refusals("harmful")
    moved = drawn([(prompt.subject or prompt.id, [change, 0, 1]) for prompt, change in changes])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "removal": (sensitive[:, 0] - sensitive[:, 1]) / sensitive[:, 2],
            "retention_harmful": harmful[:, 1] / harmful[:, 0],
            "benign_drift": moved[:, 0] / moved[:, 2],
        }
    return {name: interval(values) for name, values in found.items()}
