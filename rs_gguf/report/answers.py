"""The answers side by side, and where refusals changed: paired rows in, what a page lists out.

A row has `answer_…`, `confidence_…`, `category_…` and `degenerate_…` of the side `baseline` and of each
file's side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from markupsafe import escape

from rs_gguf.evaluation.paired import categories
from rs_gguf.judges.rubric import rubric
from rs_gguf.records.conversation import NEUTRAL, Judgement
from rs_gguf.records.rows import Row
from rs_gguf.report.recommendation import kind_order

BEFORE = "baseline"

_BYTES = 2_000_000  # of escaped prompts and answers; the page stays below 3 MB
_PAIR_BYTES, _SIDE_BYTES = 700, 450  # what the template puts around a prompt, and around each answer
_GROUPS = 40  # lines of a breakdown, the smaller groups being one more; languages to filter by
_NAME = 80  # characters of a topic, a form or a language
_CLIPS = (None, 2000, 1000, 500, 250)  # characters of a text that is shown, tried in this order
_LANGUAGE = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*").fullmatch


def side_by_side(rows: Sequence[Row], files: Sequence[Row]) -> Row:
    """Prompts in reading order; texts clipped (and, at last, prompts dropped) so that the page stays small.

    `marks` are the filters that something fits, each with its words and how many prompts fit it.
    """
    pairs = [_pair(row, files) for row in rows]
    pairs.sort(key=lambda pair: (kind_order(pair["kind"]), -len(pair["changed"])))
    for clip in _CLIPS:
        clipped = [_clipped(pair, clip) for pair in pairs]
        sizes = [_size(pair) for pair in clipped]
        if sum(sizes) <= _BYTES:
            break
    used, shown = 0, []
    for pair, size in zip(clipped, sizes, strict=True):
        used += size
        if used <= _BYTES:
            shown.append(pair)
    words = {
        **{f"changed-{file['key']}": f"changed by the {file['word']}" for file in files},
        "apart": "the two files differ",
        "opened": "harmful request now answered",
        "closed": "now refused, answered before",
        "broken": "broken text",
    }
    spoken = Counter(pair["language"] for pair in shown if pair["language"])
    counted = {mark: sum(mark in pair["marks"] for pair in shown) for mark in words}
    return {
        "pairs": shown,
        "total": len(rows),
        "clip": clip,
        "kinds": sorted({row["kind"] for row in rows}, key=kind_order),
        "languages": sorted(name for name, _ in spoken.most_common(_GROUPS)),
        "marks": [{"mark": mark, "words": words[mark], "n": n} for mark, n in counted.items() if n],
    }


def breakdowns(rows: Sequence[Row], files: Sequence[Row]) -> list[Row]:
    """Refusals before and under each file by topic, form, language and way of refusing; each kind apart."""
    sides = [BEFORE, *(file["side"] for file in files)]
    judged: dict[str, list[Row]] = {kind: [] for kind in sorted({r["kind"] for r in rows}, key=kind_order)}
    for row in rows:
        if all(row[f"confidence_{side}"] is not None for side in sides):
            judged[row["kind"]].append(row)
    found = []
    for field in ("topic", "form", "language"):
        kinds = []
        for kind, some in judged.items():
            groups: dict[str, list[Row]] = {}
            for row in some:
                groups.setdefault(row[field] or "not stated", []).append(row)
            largest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
            if others := [row for _, members in largest[_GROUPS:] for row in members]:
                largest[_GROUPS:] = [(f"{len(groups) - _GROUPS} others", others)]
            lines: list[Row] = [
                {
                    "value": _cut(value, _NAME),
                    "n": len(members),
                    "refused": [sum(row[f"confidence_{side}"] > 0 for row in members) for side in sides],
                }
                for value, members in largest
            ]
            if lines:
                kinds.append({"kind": kind, "lines": lines})
        found.append({"field": field, "kinds": kinds})
    ways = [{"kind": kind, "lines": lines} for kind, some in judged.items() if (lines := _ways(some, sides))]
    return [*found, {"field": "way of refusing", "kinds": ways}]


def _ways(rows: Sequence[Row], sides: Sequence[str]) -> list[Row]:
    """How many of the rows are refused in which way of the rubric on each side, most before first."""
    names = {way["id"]: way["name"] for way in rubric()["refusal"]}
    counts = [
        categories(Judgement(row[f"confidence_{side}"], "", row.get(f"category_{side}")) for row in rows)
        for side in sides
    ]
    lines: list[Row] = [
        {
            "value": names.get(way, "Not told"),
            "n": len(rows),
            "refused": [found.get(way, 0) for found in counts],
        }
        for way in dict.fromkeys(chain(*counts))
    ]
    return sorted(lines, key=lambda line: [-count for count in line["refused"]])


def unclear(rows: Sequence[Row], files: Sequence[Row]) -> Row:
    """How many verdicts there are, on all sides, and how many of them are unclear."""
    sides = [BEFORE, *(file["side"] for file in files)]
    found = [row[f"confidence_{side}"] for row in rows for side in sides]
    judged = [abs(confidence) for confidence in found if confidence is not None]
    return {"verdicts": len(judged), "unclear": sum(size <= NEUTRAL for size in judged)}


def languages(rows: Sequence[Row]) -> list[str]:
    """The languages of the prompts that are proper tags."""
    return sorted({row["language"] for row in rows if _LANGUAGE(row["language"])})


def _pair(row: Row, files: Sequence[Row]) -> Row:
    shown = [
        {
            "side": side,
            "answer": row[f"answer_{side}"],
            # What a gate leaves alone it leaves to the letter; saying so reads better than the same text.
            "same": side != BEFORE and row[f"answer_{side}"] == row[f"answer_{BEFORE}"] != "",
            "confidence": row[f"confidence_{side}"],
            "verdict": _verdict(row[f"confidence_{side}"]),
            "broken": row[f"degenerate_{side}"],
            # A page that is passed on should not put answers to harmful requests before the eyes unasked.
            "folded": row["kind"] == "harmful" and not (row[f"confidence_{side}"] or 0) > 0,
        }
        for side in (BEFORE, *(file["side"] for file in files))
    ]
    before, *after = (None if one["confidence"] is None else one["confidence"] > 0 for one in shown)
    changed = [
        file["key"]
        for file, refused in zip(files, after, strict=True)
        if None not in (before, refused) and refused != before
    ]
    marks = {
        **{f"changed-{key}": True for key in changed},
        "apart": None not in after and len(set(after)) > 1,
        "opened": row["kind"] == "harmful" and before is True and False in after,
        "closed": before is False and True in after,
        "broken": any(one["broken"] for one in shown),
    }
    names = {name: _cut(row[name], _NAME) for name in ("topic", "form", "language")}
    return {
        **{name: row[name] for name in ("prompt", "kind")},
        **names,
        "lang": names["language"] if _LANGUAGE(names["language"]) else "",
        "sides": shown,
        "changed": changed,
        "marks": [mark for mark, fits in marks.items() if fits],
    }


def _verdict(confidence: float | None) -> str:
    if confidence is None:
        return "not judged"
    word = "refused" if confidence > 0 else "answered"
    return f"{word}, unclear" if abs(confidence) <= NEUTRAL else word


def _clipped(pair: Row, clip: int | None) -> Row:
    sides = [{**side, "answer": _cut(side["answer"], clip)} for side in pair["sides"]]
    return {**pair, "prompt": _cut(pair["prompt"], clip), "sides": sides}


def _cut(text: str, clip: int | None) -> str:
    return text if clip is None or len(text) <= clip else text[:clip] + " […]"


def _size(pair: Mapping[str, Any]) -> int:
    names = ("prompt", "topic", "form", "language", "language")  # it stands in an attribute too
    texts = [*(pair[name] for name in names), *(side["answer"] for side in pair["sides"] if not side["same"])]
    return _PAIR_BYTES + len(pair["sides"]) * _SIDE_BYTES + sum(len(escape(text).encode()) for text in texts)
