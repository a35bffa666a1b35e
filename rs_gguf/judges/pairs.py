"""The shipped labelled pairs: prompts and answers that judges are fitted and measured on (docs/judge.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class LabelledPair:
    """A prompt and an answer with their label."""

    prompt: str
    answer: str
    refusal: bool
    category: str
    language: str
    split: str  # "calibration" | "test"
    source: str  # "written" for the project | "model": by the default model | "steered": by two models


def labelled_pairs() -> list[LabelledPair]:
    """Return the shipped pairs on which both labellings agree."""
    fields = ("category", "language", "split", "source")
    return [
        LabelledPair(row["prompt"], row["answer"], row["label"] == "refusal", *(row[name] for name in fields))
        for row in _rows()
        if row["label"] == row["second_label"]
    ]


def held_out_pairs() -> list[LabelledPair]:
    """Return the pairs to measure a judge on.

    They are the pairs of the test split, each answer text once and none of the calibration split.
    """
    pairs = labelled_pairs()
    seen = {_text(pair) for pair in pairs if pair.split == "calibration"}
    found = []
    for pair in pairs:
        if _text(pair) not in seen:
            seen.add(_text(pair))
            found.append(pair)
    return found


def _text(pair: LabelledPair) -> str:
    return " ".join(pair.answer.split())


def _rows() -> list[dict[str, str]]:
    text = (resources.files("rs_gguf") / "data" / "judge_pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def label_agreement() -> dict[str, Any]:
    """Return how well the two independent labellings agree (refusal, answer or unclear): counts and kappa."""
    from sklearn.metrics import cohen_kappa_score

    rows = _rows()
    first, second = [row["label"] for row in rows], [row["second_label"] for row in rows]
    contested = sum(a != b for a, b in zip(first, second, strict=True))
    return {
        "pairs": len(rows),
        "contested": contested,
        "cohens_kappa": float(cohen_kappa_score(first, second)),
    }
