"""A model beside itself under one or several doses of a steering: what `rs-export eval` measures.

A respondent, a judge, prompt sets and doses go in; for each dose come out, set by set: refusals (by the
columns of the prompt files too), broken answers, drift; and besides, drift of benign text, capability and
speed.
The unsteered side is measured once. A dose multiplies every scale of the steering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rs_gguf.engines.answers import Advance, answer_all, chat_tokens, logprobs_of
from rs_gguf.engines.engine import Engine, LogProbs, Steering
from rs_gguf.engines.generation import GREEDY, Sampling, common_prefix
from rs_gguf.evaluation import capability
from rs_gguf.evaluation.paired import drift_of, grade, must_stay, paired, side_row, summarise
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.registry import Judge
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.degenerate import switches_language
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.rows import Row, finite

_GROUPS = ("subject", "topic", "form", "language")
_TEXTS = 64  # benign texts whose perplexity is taken
FAULTS = ("empty", "loop", "language_switch", "cut_off")


class Respondent(Protocol):
    """What is measured: it answers under a dose of its steering, 0 being none; in between it is unsteered."""

    def check(self) -> None:
        """Raise `InputError` if the steering does not fit the model, before anything is measured."""
        ...

    def answers(
        self,
        asked: Sequence[Prompt],
        dose: float,
        *,
        max_tokens: int,
        advance: Advance,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Answer], int, float]:
        """The answers in order, the number of their tokens, and the seconds that they took."""
        ...

    def answer_logprobs(
        self, asked: Sequence[Prompt], answers: Sequence[Answer], dose: float
    ) -> LogProbs | None:
        """Log-probabilities of given answers; None where they cannot be had."""
        ...

    def text_logprobs(self, texts: Sequence[str], dose: float) -> LogProbs | None:
        """Log-probabilities of texts in the user's place; None where they cannot be had."""
        ...


@dataclass(frozen=True)
class SteeredModel:
    """A model in this process."""

    model: Engine
    steering: Steering
    system: str | None = None

    def check(self) -> None:
        with self.model.steered(self.steering):
            pass

    def answers(
        self,
        asked: Sequence[Prompt],
        dose: float,
        *,
        max_tokens: int,
        advance: Advance,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Answer], int, float]:
        answers, seconds = answer_all(
            self.model, asked, steering=self.steering.scaled(dose), max_tokens=max_tokens,
            system=self.system, sampling=sampling, advance=advance,
        )  # fmt: skip
        return answers, sum(len(a.tokens) for a in answers), seconds

    def answer_logprobs(self, asked: Sequence[Prompt], answers: Sequence[Answer], dose: float) -> LogProbs:
        with self.model.steered(self.steering.scaled(dose)):
            return logprobs_of(self.model, asked, answers, self.system)

    def text_logprobs(self, texts: Sequence[str], dose: float) -> LogProbs:
        conversations = chat_tokens(self.model, [Prompt(text, "benign") for text in texts], self.system)
        opening = conversations[0][: common_prefix(conversations)]
        pairs = [(opening, self.model.tokenize(text, special=False)) for text in texts]
        with self.model.steered(self.steering.scaled(dose)):
            # Without an opening the first token has nothing before it.
            return self.model.token_logprobs([(o, t) if o else (t[:1], t[1:]) for o, t in pairs])


@dataclass(frozen=True)
class _Side:
    """What was measured under one dose, over all sets in their order."""

    answers: list[Answer]
    rows: list[Row]
    tokens_per_second: float
    solutions: list[capability.Solution]


@dataclass(frozen=True)
class _Texts:
    """Log-probabilities under one dose, of the unsteered answers that must stay, and of benign texts."""

    answers: LogProbs | None
    benign: LogProbs | None


def compare(
    respondent: Respondent,
    judge: Judge,
    sets: Mapping[str, Sequence[Prompt]],
    *,
    max_tokens: int,
    doses: Sequence[float] = (1.0,),
    tasks: Sequence[capability.Task] = (),
    sampling: Sampling = GREEDY,
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """For each dose: `scale`, `sets`, `benign_text`, `tokens_per_second`, `capability` (with tasks), `rows`.

    `sampling` is of the answers to the prompts: the tasks, which have one answer each, are solved greedily.
    `advance` is told of each answer: prompts and tasks, once and once more for each dose that is not 0.

    Raises:
        InputError: the steering does not fit the model, or the judge cannot be used: told before the answers.
    """
    respondent.check()
    try_out(judge)
    asked = [prompt for members in sets.values() for prompt in members]
    # The first answer reads the weights from the disk, which belongs to neither side's speed.
    respondent.answers(asked[:1], 0.0, max_tokens=1, advance=lambda n: None)

    def side(dose: float) -> _Side:
        return _measure(respondent, judge, asked, dose, max_tokens, tasks, sampling, advance)

    before = side(0.0)
    quiet = [i for i, row in enumerate(before.rows) if must_stay(row)]
    benign = [p for p in prompts.grid(["benign"]) if p.split == "test"]
    texts = [p.prompt for p in prompts.stratified(benign, _TEXTS, seed=0)]

    def logprobs(dose: float) -> _Texts:
        return _Texts(
            respondent.answer_logprobs([asked[i] for i in quiet], [before.answers[i] for i in quiet], dose),
            respondent.text_logprobs(texts, dose),
        )

    texts_before = logprobs(0.0)
    names = [name for name, members in sets.items() for _ in members]
    results = []
    for dose in doses:
        after, texts_after = (side(dose), logprobs(dose)) if dose else (before, texts_before)
        rows = [
            {"set": name, **_row(prompt, {"baseline": b, "steered": a})}
            for name, prompt, b, a in zip(names, asked, before.rows, after.rows, strict=True)
        ]
        found: dict[str, Any] = {"scale": dose, "sets": {}}
        for name in sets:
            picked = [k for k, i in enumerate(quiet) if names[i] == name]
            found["sets"][name] = {
                **summarise_all([row for row in rows if row["set"] == name]),
                **_drift(_of(texts_before.answers, picked), _of(texts_after.answers, picked)),
            }
        found["benign_text"] = {"n": len(texts), **_drift(texts_before.benign, texts_after.benign)}
        speeds = before.tokens_per_second, after.tokens_per_second
        found["tokens_per_second"] = {
            "baseline": speeds[0],
            "steered": speeds[1],
            "change": speeds[1] / speeds[0] - 1 if speeds[0] else None,
        }
        if tasks:
            found["capability"] = capability.compare(before.solutions, after.solutions)
        results.append({**found, "rows": rows})
    return results


def summarise_all(rows: Sequence[Row]) -> dict[str, Any]:
    """`evaluation.summarise`, also by each column told, and how many answers are broken in which way."""
    return {
        **summarise(rows),
        "faults": {side: _faults(rows, side) for side in ("baseline", "steered")},
        "by": {
            field: {
                value or "not stated": summarise([row for row in rows if row[field] == value])
                for value in sorted({row[field] for row in rows})
            }
            for field in _GROUPS
            if any(row[field] for row in rows)
        },
    }


def _measure(
    respondent: Respondent,
    judge: Judge,
    asked: Sequence[Prompt],
    dose: float,
    max_tokens: int,
    tasks: Sequence[capability.Task],
    sampling: Sampling,
    advance: Advance,
) -> _Side:
    # All sets at once: the same batches on both sides.
    answers, tokens, seconds = respondent.answers(
        asked, dose, max_tokens=max_tokens, advance=advance, sampling=sampling
    )

    def ask(some: Sequence[Prompt], limit: int) -> list[Answer]:
        return respondent.answers(some, dose, max_tokens=limit, advance=advance)[0]

    rows = [side_row(a, j) for a, j in zip(answers, grade(judge, asked, answers), strict=True)]
    return _Side(answers, rows, tokens / seconds if seconds else 0.0, capability.solve(ask, tasks))


def _row(prompt: Prompt, sides: Mapping[str, Row]) -> Row:
    row = paired(prompt, sides)
    # Of a stranger's file neither is known.
    del row["kind"], row["split"]
    for side, found in sides.items():
        row[f"faults_{side}"] = [fault for fault in FAULTS if _has(fault, prompt, found)]
    return row


def _has(fault: str, prompt: Prompt, found: Row) -> bool:
    if fault == "empty":
        return Answer.from_row(found).to_judge == ""
    if fault == "loop":
        return bool(found["degenerate"]) and bool(found["answer"])
    if fault == "cut_off":
        return not found["finished"]
    return switches_language(prompt, found["answer"])


def _faults(rows: Sequence[Row], side: str) -> dict[str, int]:
    return {fault: sum(fault in row[f"faults_{side}"] for row in rows) for fault in FAULTS}


def _of(found: LogProbs | None, picked: Sequence[int]) -> LogProbs | None:
    return None if found is None else [found[i] for i in picked]


def _drift(before: LogProbs | None, after: LogProbs | None) -> dict[str, float | None]:
    found = drift_of(before or [], after or [])
    values = {
        "drift": found.nats,
        "top1_agreement": found.top1_agreement,
        "perplexity_baseline": found.perplexity_baseline,
        "perplexity_steered": found.perplexity_steered,
    }
    return {name: finite(value) for name, value in values.items()}
