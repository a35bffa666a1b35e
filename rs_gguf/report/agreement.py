"""How far the judge can be believed: its confidences on the labelled test pairs, as a reliability diagram.

`judge_agreement.jsonl` of a run folder goes in: the shipped pairs as `rs-export judge` graded them. Without
it, the figures of a shipped judge serve, which come with the package. Bins, rates and marks for inline SVG
come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.evaluation.paired_statistics import wilson
from rs_gguf.judges.accuracy import shipped_figures
from rs_gguf.judges.calibration import agreement
from rs_gguf.judges.judge import Pair
from rs_gguf.judges.pairs import LabelledPair, held_out_pairs
from rs_gguf.records.conversation import Judgement
from rs_gguf.records.rows import Row, json_lines
from rs_gguf.report.plots import Axis

FILE = "judge_agreement.jsonl"
_BINS = 10
_BOX = {"left": 52, "right": 450, "top": 18, "bottom": 330}


def of_judge(judge: str, folder: Path) -> Row | None:
    """Return the agreement of a run's judge with the labels; None where it was not measured.

    Raises:
        InputError: `judge_agreement.jsonl` is damaged or holds too few of the pairs.
    """
    pairs = held_out_pairs()
    path = folder / FILE
    if path.is_file():
        confidences, source = _graded(path, pairs), FILE
    else:
        shipped = shipped_figures(judge)
        if shipped is None:
            return None
        confidences, source = shipped["confidence"], ""
    known = [(p, c) for p, c in zip(pairs, confidences, strict=True) if c is not None]
    if len({pair.refusal for pair, _ in known}) < 2:
        raise InputError(
            f"{path} holds too few of the labelled test pairs to measure the judge; it needs refusals and "
            "answers. Grade all pairs with `rs-export judge`."
        )
    figures = agreement(_Replay([c for _, c in known]), [pair for pair, _ in known])
    refusal = {pair.category: pair.refusal for pair, _ in known}
    bins = _bins(known)
    return {
        "source": source,
        "missing": len(pairs) - len(known),
        "ci95": wilson(round(figures["accuracy"] * figures["n"]), figures["n"]),
        "bins": bins,
        "plot": _diagram(bins),
        "kinds": [
            {"kind": kind, "refusal": refusal[kind], **one}
            for kind, one in sorted(figures["by_category"].items(), key=lambda k: k[1]["accuracy"])
        ],
        "languages": [{"language": key, **one} for key, one in figures["by_language"].items()],
        **{name: figures[name] for name in ("n", "auroc", "accuracy", "expected_calibration_error")},
    }


def _graded(path: Path, pairs: Sequence[LabelledPair]) -> list[float | None]:
    """Return the confidence of each pair in a graded file, None where the file has none."""
    try:
        rows = json_lines(path.read_text(encoding="utf-8"))
        of = {(row["prompt"], row["answer"]): row["confidence"] for row in rows}
        confidences = [of.get((pair.prompt, pair.answer)) for pair in pairs]
        return [None if c is None else float(c) for c in confidences]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold the labelled pairs as `rs-export judge` grades them ({error}). Delete "
            "it or grade them again."
        ) from error


class _Replay:
    """A judge that repeats recorded confidences."""

    name = identity = "recorded"
    usage = None

    def __init__(self, confidences: Sequence[float]) -> None:
        self._confidences = confidences

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i in range(len(pairs)):
            yield i, Judgement(self._confidences[i], "recorded")


def _bins(known: Sequence[tuple[LabelledPair, float]]) -> list[Row]:
    """Return bins of the probability of refusal that the judge gave: pairs, mean probability and refusals."""
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for pair, confidence in known:
        probability = (confidence + 1) / 2
        inside[min(int(probability * _BINS), _BINS - 1)].append((probability, pair.refusal))
    return [
        {
            "low": k / _BINS,
            "high": (k + 1) / _BINS,
            "n": len(members),
            "refusals": sum(refusal for _, refusal in members),
            "mean": sum(probability for probability, _ in members) / len(members),
            "ci95": wilson(sum(refusal for _, refusal in members), len(members)),
        }
        for k, members in enumerate(inside)
        if members
    ]


def _diagram(bins: Sequence[Mapping[str, Any]]) -> Row:
    across = Axis.over([0, 1], _BOX["left"], _BOX["right"])
    upward = Axis.over([0, 1], _BOX["bottom"], _BOX["top"])
    most = max(one["n"] for one in bins)
    points = [
        {
            "x": across.at(one["mean"]),
            "y": upward.at(one["refusals"] / one["n"]),
            "low": upward.at(one["ci95"][0]),
            "high": upward.at(one["ci95"][1]),
            "radius": round(3 + 7 * math.sqrt(one["n"] / most), 2),
        }
        for one in bins
    ]
    return {**_BOX, "across": across, "upward": upward, "points": points}
