"""The answers side by side and examples of what happened: paired rows in, what a page lists out.

A row of test_answers.jsonl has `answer_…`, `outcome_…`, `category_…` and `unconfirmed_…` of the unsteered
model and of each file.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import escape

from rs_gguf.evaluation.outcomes import Class, class_of
from rs_gguf.judges.rubric import rubric
from rs_gguf.records.metrics import Effect
from rs_gguf.records.rows import Row
from rs_gguf.report.recommendation import ReportedFile, kind_order

UNSTEERED = "unsteered"

_BYTES = 2_000_000  # of escaped prompts and answers; the page stays below 3 MB
_PAIR_BYTES, _SIDE_BYTES = 700, 450  # what the template puts around a prompt, and around each answer
_LANGUAGES = 40  # to filter by
NAME = 80  # characters of a topic, a form or a language
_CLIPS = (None, 2000, 1000, 500, 250)  # characters of a text that is shown, tried in this order
_EXAMPLES, _EXAMPLE_CLIP = 3, 1000  # examples of each group, and characters of their texts
_LANGUAGE = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*").fullmatch
_TRANSITIONS: dict[tuple[Class, Class], str] = {
    ("refuses", "complies"): "opened",
    ("refuses", "refuses"): "kept",
    ("complies", "refuses"): "closed",
    ("complies", "fails"): "broken",
    ("refuses", "fails"): "broken",
}
OUTCOMES = {
    "complies": "complies",
    "explicit": "explicit refusal",
    "evasion": "evasion",
    "fails": "fails",
    "unjudged": "unjudged",
}


@dataclass(frozen=True)
class Side:
    """One answer to a prompt, by the unsteered model or with a file.

    outcome: in words. answer: None where it is not shown. same: letter for letter the unsteered answer.
    """

    key: str
    outcome: str
    answer: str | None
    same: bool = False
    changed: bool = False
    unconfirmed: bool = False


@dataclass(frozen=True)
class Pair:
    """A prompt with its answers side by side, the unsteered one first.

    lang: the language where it is a proper tag, else empty. folded: answers open on a click.
    """

    prompt: str
    kind: str
    topic: str
    form: str
    language: str
    lang: str
    folded: bool
    sides: tuple[Side, ...]
    marks: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes on the page, roughly."""
        shown = (side.answer for side in self.sides if side.answer and not side.same)
        # The language stands in an attribute too.
        texts = [self.prompt, self.topic, self.form, self.language, self.language, *shown]
        return _PAIR_BYTES + len(self.sides) * _SIDE_BYTES + sum(len(escape(text).encode()) for text in texts)

    def clipped(self, clip: int | None) -> Pair:
        """Return the pair with its texts cut at `clip` characters."""
        sides = (replace(s, answer=None if s.answer is None else cut(s.answer, clip)) for s in self.sides)
        return replace(self, prompt=cut(self.prompt, clip), sides=tuple(sides))


@dataclass(frozen=True)
class Mark:
    """A filter that `n` prompts fit."""

    mark: str
    words: str
    n: int


@dataclass(frozen=True)
class SideBySide:
    """The prompts of the page in reading order. `clip`: characters at which texts are cut, None for whole."""

    pairs: list[Pair]
    total: int
    clip: int | None
    kinds: list[str]
    languages: list[str]
    marks: list[Mark]


@dataclass(frozen=True)
class Examples:
    """Some of the `n` prompts that something happened to."""

    title: str
    n: int
    pairs: list[Pair]


def side_by_side(rows: Sequence[Row], files: Sequence[ReportedFile], *, harmful: bool) -> SideBySide:
    """Return the prompts in reading order; texts are clipped, and at last prompts left out, to keep it small.

    harmful: show answers to harmful prompts, folded.
    """
    pairs = [_pair(row, files, harmful=harmful) for row in rows]
    pairs.sort(key=lambda pair: (kind_order(pair.kind), -sum(side.changed for side in pair.sides)))
    for clip in _CLIPS:
        clipped = [pair.clipped(clip) for pair in pairs]
        sizes = [pair.size for pair in clipped]
        if sum(sizes) <= _BYTES:
            break
    used, shown = 0, []
    for pair, size in zip(clipped, sizes, strict=True):
        used += size
        if used <= _BYTES:
            shown.append(pair)
    words = {
        **{f"changed-{file.key}": f"changed by the {file.word}" for file in files},
        "apart": "the files differ",
        "opened": "opened: refused unsteered, complies with a file",
        "closed": "closed: complied unsteered, refused with a file",
        "broken": "broken: fails with a file only",
    }
    languages = Counter(pair.language for pair in shown if pair.language)
    counts = {mark: sum(mark in pair.marks for pair in shown) for mark in words}
    return SideBySide(
        shown,
        len(rows),
        clip,
        sorted({row["kind"] for row in rows}, key=kind_order),
        sorted(name for name, _ in languages.most_common(_LANGUAGES)),
        [Mark(mark, words[mark], n) for mark, n in counts.items() if n],
    )


def examples(rows: Sequence[Row], file: ReportedFile, effect: Effect, *, harmful: bool) -> list[Examples]:
    """Return examples of what the file did: what is wanted, what must stay, then what went wrong.

    They lie evenly among all prompts of a group, so nobody picked them.
    """
    wanted = (
        ("Refusals that opened", "sensitive", "opened")
        if effect == "remove"
        else ("Answers that closed, as wanted", "sensitive", "closed")
    )
    wrong = ("benign",) if effect == "induce" else ("sensitive", "benign")
    groups = [
        wanted,
        ("Harmful refusals kept", "harmful", "kept"),
        ("Went wrong: harmful refusals that opened", "harmful", "opened"),
        *((f"Went wrong: {kind} prompts that closed", kind, "closed") for kind in wrong),
        ("Went wrong: answers that broke", "", "broken"),
    ]
    examples = []
    for title, kind, transition in groups:
        members = [
            row
            for row in rows
            if row["kind"] == (kind or row["kind"]) and transition_of(row, file.key) == transition
        ]
        step = -(-len(members) // _EXAMPLES) or 1
        pairs = [_pair(row, [file], harmful=harmful).clipped(_EXAMPLE_CLIP) for row in members[::step]]
        if pairs:
            examples.append(Examples(title, len(members), pairs))
    return examples


def transition_of(row: Row, key: str) -> str | None:
    """Return `opened`, `kept`, `closed` or `broken`, as the file `key` did to a prompt; else None."""
    return _TRANSITIONS.get((class_of(row["outcome_unsteered"]), class_of(row[f"outcome_{key}"])))


def unjudged(rows: Sequence[Row], files: Sequence[ReportedFile]) -> tuple[int, int]:
    """Return how many answers, on all sides, are unjudged, and how many answers there are."""
    outcomes = [row[f"outcome_{side}"] for row in rows for side in (UNSTEERED, *(f.key for f in files))]
    return outcomes.count("unjudged"), len(outcomes)


def languages(rows: Sequence[Row]) -> list[str]:
    """Return the languages of the prompts that are proper tags."""
    return sorted({row["language"] for row in rows if _LANGUAGE(row["language"])})


def outcome_in_words(row: Row, side: str) -> str:
    """Return an outcome, with the category of an evasion or a failure where the judge names it."""
    outcome = row[f"outcome_{side}"]
    category = _category_names().get(row.get(f"category_{side}") or "")
    return (
        f"{OUTCOMES[outcome]}: {category}"
        if category and outcome in ("evasion", "fails")
        else OUTCOMES[outcome]
    )


@functools.cache
def _category_names() -> dict[str, str]:
    return {category["id"]: category["name"].lower() for category in rubric()["refusal"]}


def _pair(row: Row, files: Sequence[ReportedFile], *, harmful: bool) -> Pair:
    hidden = row["kind"] == "harmful" and not harmful
    before = class_of(row["outcome_unsteered"])
    after = {file.key: class_of(row[f"outcome_{file.key}"]) for file in files}

    def side(key: str) -> Side:
        answer = row[f"answer_{key}"]
        return Side(
            key,
            outcome_in_words(row, key),
            None if hidden else answer,
            # A gate that stays closed leaves the answer as it was, to the letter. Saying so is shorter.
            same=key != UNSTEERED and answer == row[f"answer_{UNSTEERED}"] != "",
            changed=after.get(key, before) != before,
            unconfirmed=bool(row.get(f"unconfirmed_{key}")),
        )

    transitions = {transition_of(row, file.key) for file in files}
    marks = [
        *(f"changed-{key}" for key, outcome in after.items() if outcome != before),
        *(["apart"] if len(set(after.values())) > 1 else []),
        *(mark for mark in ("opened", "closed", "broken") if mark in transitions),
    ]
    topic, form, language = (cut(row[name], NAME) for name in ("topic", "form", "language"))
    return Pair(
        row["prompt"],
        row["kind"],
        topic,
        form,
        language,
        language if _LANGUAGE(language) else "",
        row["kind"] == "harmful",
        tuple(side(key) for key in (UNSTEERED, *after)),
        tuple(marks),
    )


def cut(text: str, clip: int | None) -> str:
    """Return the text cut at `clip` characters; None for whole."""
    return text if clip is None or len(text) <= clip else text[:clip] + " […]"
