"""Before and after: the same prompts on two sides, counted together, and how far text drifts between them.

Prompts and two `JudgedAnswers`s go in; counts with intervals and tests, and rows of both sides, come out. The search,
the measure stage and `rs-export eval` are made of this. Intervals and tests are those of
`rs_gguf.evaluation.paired_statistics`, drift that of method §7.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import LogProbs
from rs_gguf.evaluation.condition import JudgedAnswers
from rs_gguf.evaluation.paired_statistics import mcnemar, wilson
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Prompt
from rs_gguf.records.metrics import SetRecord
from rs_gguf.records.rows import Row

SIDES = {"vector": "steered", "adapter": "adapter"}  # how columns of a file's answers end in a paired row

Turning = Literal["refusal", "broken", "unjudged"]  # what may become of an answer on either side


@dataclass(frozen=True)
class Drift:
    """How a steering changes what the model makes of text that it did not write under it.

    `nats`: mean over the texts of |Δ mean log-probability of a token|. `top1_agreement`: share of the tokens
    that were the model's first choice and still are. The perplexities are over all tokens of all texts. All
    are NaN without text.
    """

    nats: float
    top1_agreement: float
    perplexity_unsteered: float
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
    mean = np.concatenate([logprobs for logprobs, _ in found]).mean(dtype=np.float64)
    with np.errstate(over="ignore"):  # of a steering that is far too strong
        return float(np.exp(-mean))


def is_drift_reference(answer: Answer, judgement: Judgement) -> bool:
    """Tell whether an unsteered answer must stay as it was: it has words, and is not a refusal."""
    return bool(not judgement.refused and answer.text)


@dataclass(frozen=True)
class PairedEvaluation:
    """The same prompts on two sides, unsteered and steered, and how far the steering drifts where known."""

    prompts: Sequence[Prompt]
    before: JudgedAnswers
    after: JudgedAnswers
    drift: Drift | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> PairedEvaluation:
        """Return the evaluation that wrote these `rows`, as far as `counts` needs it."""

        def side(name: str) -> JudgedAnswers:
            return JudgedAnswers(
                [Answer([], row.get(f"answer_{name}", ""), True, row[f"degenerate_{name}"]) for row in rows],
                [
                    Judgement(row[f"confidence_{name}"], "recorded", row.get(f"category_{name}"))
                    for row in rows
                ],
            )

        prompts = [Prompt(row["prompt"], row.get("kind", "sensitive")) for row in rows]
        return cls(prompts, side("unsteered"), side("steered"))

    def take(self, indices: Sequence[int]) -> PairedEvaluation:
        """Return the evaluation of these prompts alone. The drift is of all and is left out."""
        return PairedEvaluation(
            [self.prompts[i] for i in indices], self.before.take(indices), self.after.take(indices)
        )

    def part(self, **fields: str) -> PairedEvaluation:
        """Return the evaluation of the prompts that have these values, such as `kind="harmful"`."""
        wanted = fields.items()
        return self.take(
            [i for i, p in enumerate(self.prompts) if all(getattr(p, name) == v for name, v in wanted)]
        )

    def judged(self) -> list[tuple[Judgement, Judgement]]:
        """Return the judgements before and after of the prompts that have one on both sides."""
        pairs = zip(self.before.judgements, self.after.judgements, strict=True)
        return [(b, a) for b, a in pairs if b.confidence is not None and a.confidence is not None]

    def counts(self) -> SetRecord:
        """Return the counts of both sides, with their rates, intervals and McNemar's test."""
        judged = self.judged()
        n = len(judged)
        before, after = (sum(pair[side].refused for pair in judged) for side in (0, 1))
        lost, gained = self.lost_and_gained("refusal")
        unjudged = [
            sum(found.confidence is None for found in side.judgements) for side in (self.before, self.after)
        ]
        return SetRecord(
            n=n,
            unjudged=len(self.prompts) - n,
            unjudged_unsteered=unjudged[0],
            unjudged_steered=unjudged[1],
            refusal_unsteered=before / n if n else 0.0,
            refusal_steered=after / n if n else 0.0,
            ci95_unsteered=wilson(before, n),
            ci95_steered=wilson(after, n),
            refused_unsteered=before,
            refused_steered=after,
            refused_both=before - lost,
            mcnemar_p=mcnemar(gained, lost),
            categories_unsteered=categories(b for b, _ in judged),
            categories_steered=categories(a for _, a in judged),
            degenerate_unsteered=_share_degenerate(self.before),
            degenerate_steered=_share_degenerate(self.after),
        )

    def by_kind(self) -> dict[str, SetRecord]:
        """Return the counts of each kind of prompt."""
        return {kind: self.part(kind=kind).counts().model_copy(update={"kind": kind}) for kind in KINDS}

    def lost_and_gained(self, what: Turning) -> tuple[int, int]:
        """Return how many prompts have this only before, and how many only after.

        `what`: a refusal, of the prompts that are judged on both sides; a broken (degenerate) answer; or an
        answer that could not be judged.
        """
        if what == "refusal":
            pairs = [(b.refused, a.refused) for b, a in self.judged()]
        elif what == "broken":
            sides = zip(self.before.answers, self.after.answers, strict=True)
            pairs = [(b.degenerate, a.degenerate) for b, a in sides]
        else:
            both = zip(self.before.judgements, self.after.judgements, strict=True)
            pairs = [(b.confidence is None, a.confidence is None) for b, a in both]
        return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)

    def rows(self, steered: str = "steered") -> list[Row]:
        """Return a row of each prompt with both sides, as `answer_unsteered`, `answer_steered` and so on.

        steered: how the names of the steered side end.
        """
        sides = {"unsteered": self.before, steered: self.after}
        return [
            {
                **prompt.to_row(),
                **{
                    key: value
                    for name, side in sides.items()
                    for key, value in _columns(name, side.answers[i], side.judgements[i])
                },
            }
            for i, prompt in enumerate(self.prompts)
        ]


def _columns(side: str, answer: Answer, judgement: Judgement) -> Iterable[tuple[str, Any]]:
    yield f"answer_{side}", answer.text
    yield f"confidence_{side}", judgement.confidence
    yield f"category_{side}", judgement.category
    yield f"degenerate_{side}", answer.degenerate


def _share_degenerate(side: JudgedAnswers) -> float:
    return sum(a.degenerate for a in side.answers) / len(side.answers) if side.answers else 0.0


def categories(judgements: Iterable[Judgement]) -> dict[str, int]:
    """Count refusals by category of the rubric, most first; "unclassified" where the judge named none."""
    return dict(
        Counter(found.category or "unclassified" for found in judgements if found.refused).most_common()
    )


def bootstrap_intervals(
    found: PairedEvaluation,
    changes: Sequence[tuple[Prompt, float]],
    *,
    seed: int,
    draws: int = 1000,
) -> dict[str, tuple[float, float] | None]:
    """Return 95 % percentile-bootstrap intervals of the figures that one file is chosen by.

    Whole subjects are drawn, since prompts on one subject stand or fall together. changes: of
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
        part = found.part(kind=kind)
        sides = zip(part.prompts, part.before.judgements, part.after.judgements, strict=True)
        return drawn(
            [
                (p.subject or p.id, [b.refused, a.refused, 1])
                for p, b, a in sides
                if b.confidence is not None and a.confidence is not None
            ]
        )

    def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
        known = values[np.isfinite(values)]
        low, high = np.quantile(known, [0.025, 0.975]) if known.size else (math.nan, math.nan)
        return (float(low), float(high)) if known.size else None

    sensitive, harmful = refusals("sensitive"), refusals("harmful")
    moved = drawn([(prompt.subject or prompt.id, [change, 0, 1]) for prompt, change in changes])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "removal": (sensitive[:, 0] - sensitive[:, 1]) / sensitive[:, 2],
            "harmful_refusal_ratio": harmful[:, 1] / harmful[:, 0],
            "benign_drift": moved[:, 0] / moved[:, 2],
        }
    return {name: interval(value) for name, value in values.items()}
