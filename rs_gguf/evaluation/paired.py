"""The same prompts unsteered and steered: outcomes, transitions between them, and drift.

Prompts and two `JudgedAnswers` go in. Counts with intervals, and rows of both sides, come out. The search,
the measure stage and `rs-export eval` all use this one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from rs_gguf.evaluation.condition import JudgedAnswers
from rs_gguf.evaluation.drift import Drift
from rs_gguf.evaluation.outcomes import CLASSES, Class, Outcome, class_of, count_outcomes, outcome_of
from rs_gguf.evaluation.paired_statistics import clusters_of, mcnemar, rate_interval
from rs_gguf.evaluation.traces import trace_record
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Prompt, Trace
from rs_gguf.records.metrics import Effect, SetRecord, Share
from rs_gguf.records.rows import Row

_JUDGED = CLASSES[:3]  # complies, refuses, fails


@dataclass(frozen=True)
class PairedEvaluation:
    """The same prompts unsteered and steered, and how far the steering drifts where that is known.

    `unconfirmed`: indices of prompts whose change a second run did not show. They count as unchanged. None
    stands for no second run.
    `disputed`: indices of prompts whose refusal is lost in both runs, but to different outcomes. They count
    as unjudged: neither kept nor opened.
    """

    prompts: Sequence[Prompt]
    before: JudgedAnswers
    after: JudgedAnswers
    drift: Drift | None = None
    unconfirmed: frozenset[int] | None = None
    disputed: frozenset[int] = frozenset()

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> PairedEvaluation:
        """Return the evaluation that wrote these `rows`, without tokens and speed."""

        def side(name: str) -> JudgedAnswers:
            return JudgedAnswers(
                [
                    Answer(
                        [],
                        row.get(f"answer_{name}", ""),
                        True,
                        row[f"degenerate_{name}"],
                        Trace(**row[f"trace_{name}"]) if row.get(f"trace_{name}") else None,
                    )
                    for row in rows
                ],
                [Judgement.from_row(row, f"_{name}") for row in rows],
            )

        names = ("kind", "subject", "topic", "form", "language")
        prompts = [
            Prompt(row["prompt"], **{"kind": "sensitive", **{k: row[k] for k in names if k in row}})
            for row in rows
        ]
        unconfirmed, disputed = (
            frozenset(i for i, row in enumerate(rows) if row.get(f"{name}_steered"))
            for name in ("unconfirmed", "disputed")
        )
        return cls(prompts, side("unsteered"), side("steered"), unconfirmed=unconfirmed, disputed=disputed)

    @cached_property
    def outcomes(self) -> list[tuple[Outcome, Outcome]]:
        """The outcome unsteered and steered of each prompt; the unsteered one twice where unconfirmed."""
        before, after = ([*map(outcome_of, s.answers, s.judgements)] for s in (self.before, self.after))

        def counted(i: int) -> Outcome:
            if i in self.disputed:
                return "unjudged"
            return before[i] if i in (self.unconfirmed or ()) else after[i]

        return [(outcome, counted(i)) for i, outcome in enumerate(before)]

    @cached_property
    def classes(self) -> list[tuple[Class, Class]]:
        """The class of each outcome, as transitions count it."""
        return [(class_of(before), class_of(after)) for before, after in self.outcomes]

    def take(self, indices: Sequence[int]) -> PairedEvaluation:
        """Return the evaluation of these prompts alone, without the drift, which is that of all."""
        return PairedEvaluation(
            [self.prompts[i] for i in indices],
            self.before.take(indices),
            self.after.take(indices),
            unconfirmed=None
            if self.unconfirmed is None
            else frozenset(k for k, i in enumerate(indices) if i in self.unconfirmed),
            disputed=frozenset(k for k, i in enumerate(indices) if i in self.disputed),
        )

    def part(self, **fields: str) -> PairedEvaluation:
        """Return the evaluation of the prompts that have these values, such as `kind="harmful"`."""
        return self.take(
            [i for i, p in enumerate(self.prompts) if all(getattr(p, k) == v for k, v in fields.items())]
        )

    def count(self, before: Class | None = None, after: Class | None = None) -> int:
        """Return how many prompts have these classes; None stands for any."""
        return sum((before is None or b == before) and (after is None or a == after) for b, a in self.classes)

    def explicit(self) -> tuple[int, int]:
        """Return how many explicit refusals only the unsteered side has, and how many only the steered."""
        pairs = self._explicit
        return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)

    @cached_property
    def _explicit(self) -> list[tuple[bool, bool]]:
        """Whether each prompt is refused explicitly, unsteered and steered."""
        return [(before == "explicit", after == "explicit") for before, after in self.outcomes]

    @property
    def refused(self) -> int:
        """How many prompts the unsteered model refuses."""
        return self.count("refuses")

    @property
    def opened(self) -> int:
        """How many prompts were refused and are complied with now."""
        return self.count("refuses", "complies")

    @property
    def kept(self) -> int:
        """How many prompts were refused and still are. A failure or an unjudged answer is not kept."""
        return self.count("refuses", "refuses")

    @property
    def closed(self) -> int:
        """How many prompts were complied with and are refused now."""
        return self.count("complies", "refuses")

    def wanted(self, effect: Effect) -> int:
        """Return how many prompts change as the effect asks for."""
        return self.opened if effect == "remove" else self.closed

    @property
    def broken(self) -> int:
        """How many prompts got a judged answer that did not fail, and get one that fails now."""
        return self.count("complies", "fails") + self.count("refuses", "fails")

    @property
    def mended(self) -> int:
        """How many answers failed and no longer do."""
        return self.count("fails", "complies") + self.count("fails", "refuses")

    def record(self, kind: str | None = None) -> SetRecord:
        """Return all counts with their intervals, as metrics.json and `rs-export eval --json` hold them."""
        before, after = ([pair[side] for pair in self.outcomes] for side in (0, 1))
        lost, gained = self.explicit()
        return SetRecord(
            kind=kind,
            n=len(self.prompts),
            outcomes_unsteered=count_outcomes(before),
            outcomes_steered=count_outcomes(after),
            transitions=tuple(tuple(self.count(b, a) for a in _JUDGED) for b in _JUDGED),
            opened=self._share(lambda b, a: a == "complies", lambda b: b == "refuses"),
            kept=self._share(lambda b, a: a == "refuses", lambda b: b == "refuses"),
            closed=self._share(lambda b, a: a == "refuses", lambda b: b == "complies"),
            broken=self._share(lambda b, a: a == "fails", lambda b: b in ("complies", "refuses")),
            explicit_unsteered=self._explicit_share(0),
            explicit_steered=self._explicit_share(1),
            explicit_kept=sum(b == a == "explicit" for b, a in self.outcomes),
            explicit_p=mcnemar(gained, lost),
            unconfirmed=None if self.unconfirmed is None else len(self.unconfirmed),
            degenerate_unsteered=_share_degenerate(self.before),
            degenerate_steered=_share_degenerate(self.after),
            traces_unsteered=trace_record(self.before.answers, self.before.judgements),
            traces_steered=trace_record(self.after.answers, self.after.judgements),
        )

    def _share(self, hit: Callable[[Class, Class], bool], member: Callable[[Class], bool]) -> Share:
        members = [member(before) for before, _ in self.classes]
        hits = [of and hit(*pair) for of, pair in zip(members, self.classes, strict=True)]
        return Share(
            n=sum(hits), of=sum(members), ci95=rate_interval(hits, members, clusters_of(self.prompts))
        )

    def _explicit_share(self, side: int) -> Share:
        judged = [pair[side] != "unjudged" for pair in self.outcomes]
        hits = [pair[side] for pair in self._explicit]
        return Share(n=sum(hits), of=sum(judged), ci95=rate_interval(hits, judged, clusters_of(self.prompts)))

    def by_kind(self) -> dict[str, SetRecord]:
        """Return the record of each kind of prompt."""
        return {kind: self.part(kind=kind).record(kind) for kind in KINDS}

    def changed(self) -> list[int]:
        """Return the indices of the prompts whose class is another one under the steering."""
        return [i for i, (before, after) in enumerate(self.classes) if before != after]

    def to_confirm(self) -> list[int]:
        """Return the indices of the prompts whose outcome changes, be it only from explicit to evasion."""
        return [i for i, (before, after) in enumerate(self.outcomes) if before != after]

    def confirmed(
        self, again: Callable[[list[int]], tuple[JudgedAnswers, JudgedAnswers]]
    ) -> PairedEvaluation:
        """Have what changed answered once more, and return the same with the changes that both runs show.

        again: answers the prompts at these indices, unsteered and steered. It gets them last first, since
            near ties may fall otherwise in another batch. It is not called if nothing changed.
        """
        indices = self.to_confirm()[::-1]
        if not indices:
            return replace(self, unconfirmed=frozenset())
        second = PairedEvaluation([self.prompts[i] for i in indices], *again(indices))
        return self.confirmed_by(indices, second)

    def confirmed_by(self, indices: Sequence[int], second: PairedEvaluation) -> PairedEvaluation:
        """Return the same where a change counts only if a second run shows it too.

        Near ties flip without any steering, so one run overstates what a file changes. Where the class
        changed, the second run must show the same classes. Where only explicit refusals and evasions changed
        places, it must show the same explicit refusals. A refusal that both runs lose, but to different
        outcomes, is disputed.

        Args:
            indices: prompts that were answered again, among them all of `to_confirm`.
            second: their answers on both sides, in the order of `indices`, from batches of another order.
        """
        place, changed = {i: k for k, i in enumerate(indices)}, set(self.changed())

        def is_shown(i: int) -> bool:
            if i in changed:
                return second.classes[place[i]] == self.classes[i]
            return second._explicit[place[i]] == self._explicit[i]

        def is_lost_twice(i: int) -> bool:
            return all(b == "refuses" != a for b, a in (self.classes[i], second.classes[place[i]]))

        open_to_doubt = [i for i in self.to_confirm() if not is_shown(i)]
        disputed = frozenset(filter(is_lost_twice, open_to_doubt))
        return replace(self, unconfirmed=frozenset(open_to_doubt) - disputed, disputed=disputed)

    def rows(self, steered: str = "steered") -> list[Row]:
        """Return a row of each prompt with both sides, as `answer_unsteered`, `answer_steered` and so on.

        steered: how the names of the steered side end.
        """
        return [
            {
                **prompt.to_row(),
                **dict(_columns("unsteered", self.before, i, self.outcomes[i][0])),
                **dict(_columns(steered, self.after, i, self.outcomes[i][1])),
                f"unconfirmed_{steered}": i in (self.unconfirmed or ()),
                **({f"disputed_{steered}": True} if i in self.disputed else {}),
            }
            for i, prompt in enumerate(self.prompts)
        ]


def _columns(name: str, side: JudgedAnswers, i: int, outcome: Outcome) -> Iterator[tuple[str, Any]]:
    answer, judgement = side.answers[i], side.judgements[i]
    yield f"answer_{name}", answer.text
    yield f"outcome_{name}", outcome
    yield f"confidence_{name}", judgement.confidence
    yield f"category_{name}", judgement.category
    yield f"degenerate_{name}", answer.degenerate
    if answer.trace:
        yield f"trace_{name}", asdict(answer.trace)
        yield f"refused_in_trace_{name}", judgement.refused_in_trace


def _share_degenerate(side: JudgedAnswers) -> float:
    flags: Iterable[bool] = [answer.degenerate for answer in side.answers]
    return sum(flags) / len(side.answers) if side.answers else 0.0
