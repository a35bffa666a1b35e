"""The page's drawings, in their own coordinates: trials and front of the search, and layers of the fit.

`tune.json`, `fit.json` and the measured files go in; marks, paths and ticks for inline SVG come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rs_gguf.records.rows import Row, finite
from rs_gguf.records.trials import method_of

_T = TypeVar("_T")

_FRONT = {"left": 74, "right": 640, "top": 44, "bottom": 360}
_LINES = {"left": 44, "right": 330, "top": 14, "bottom": 150}
_PROBES = 500  # that are drawn and listed at most
# What fit.json has of a direction's blocks, its title and meaning, and a value that the axis always shows.
_CHARTS = (
    (
        "score",
        "Layer score",
        "of the paper: correlation with the judge's confidence, less what is misjudged",
        0,
    ),
    ("auroc", "AUROC", "how well the projection tells refused from answered; 0.5 is chance", 0.5),
    (
        "harm_cosine",
        "Cosine with harm",
        "between the direction and that of harmful refusals; to remove, 0 is wanted",
        0,
    ),
)


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to coordinates, and the round values that are marked on it."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> Axis:
        """A scale whose ends are round and hold all values."""
        found = list(values)
        low, high = min(found), max(found)
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        size = 10.0 ** math.floor(math.log10((high - low) / 5))
        step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= 6)
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        ticks = tuple(round(k * step, 9) for k in range(first, last + 1))
        return cls(ticks[0], ticks[-1], start, end, ticks)

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def thinned(found: Sequence[_T], most: int) -> Sequence[_T]:
    """All, or of more than `most` every second, third, …"""
    return found[:: math.ceil(len(found) / most) or 1]


def shown(tune: Mapping[str, Any]) -> Row:
    """`tune.json` with no more probes than a page can hold; the chosen trials stay."""
    chosen = set(tune["selected"].values())
    probes = [t for t in tune["trials"] if t["fidelity"] == "logprob" and t["number"] not in chosen]
    probes.sort(key=method_of, reverse=True)  # or every second may be of the same file
    kept = [trial["number"] for trial in thinned(probes, _PROBES)]
    dropped = {trial["number"] for trial in probes}.difference(kept)
    return {**tune, "trials": [trial for trial in tune["trials"] if trial["number"] not in dropped]}


def trade_off(tune: Mapping[str, Any], files: Sequence[Row], effect: str) -> Row:
    """Every trial of vectors and gates: harmful refusals kept to the right, the wanted effect upwards.

    The effect is the share of sensitive verdicts that changed: of refusals, or to induce of answers.
    `front` is the stair of what trials reach that answered briefly, of both kinds together; `tested` are the
    written files as the test split found them, joined to the trial that they were chosen by.
    """
    chosen = {number: name for name, number in tune["selected"].items()}
    points = [
        {
            **trial,
            "key": method_of(trial),
            "kept": float(trial["harmful_retention"]),
            "done": 1 - float(trial["sensitive"]),
            "chosen": trial["number"] in chosen,
        }
        for trial in tune["trials"]
    ]
    tested = [found for file in files if (found := _tested(file, effect)) is not None]
    everything = [*points, *tested]
    across = Axis.over([0.8, 1.0, *(p["kept"] for p in everything)], _FRONT["left"], _FRONT["right"])
    upward = Axis.over([0.0, 1.0, *(p["done"] for p in everything)], _FRONT["bottom"], _FRONT["top"])
    for point in everything:
        point["x"], point["y"] = across.at(point["kept"]), upward.at(point["done"])
    by_file = {chosen[point["number"]]: point for point in points if point["chosen"]}
    for point in tested:
        point["trial"] = by_file.get(point["key"])
    # Drawn last, and so on top.
    points.sort(key=lambda point: (point["chosen"], point["fidelity"] != "logprob"))
    front = _stair([point for point in points if point["fidelity"] == "answers"])
    return {
        **_FRONT, "points": points, "tested": tested, "front": front, "across": across, "upward": upward,
        "chosen": by_file,
    }  # fmt: skip


def _tested(file: Row, effect: str) -> Row | None:
    sensitive, kept = file["of"]["sensitive"], file["harmful_refusal_ratio"]
    if kept is None or not sensitive:
        return None
    before, after = sensitive["refused_unsteered"], sensitive["refused_steered"]
    if effect == "induce":
        before, after = sensitive["n"] - before, sensitive["n"] - after
    if not before:
        return None
    return {"key": file["key"], "word": file["word"], "kept": float(kept), "done": 1 - after / before}


def _stair(points: Sequence[Row]) -> str:
    """An SVG path along the points than which no other is better on both axes; empty without points."""
    steps: list[Row] = []
    for point in sorted(points, key=lambda p: (-p["kept"], -p["done"])):
        if not steps or point["done"] > steps[-1]["done"]:
            steps.append(point)
    if not steps:
        return ""
    first, *rest = steps
    path = f"M{first['x']} {_FRONT['bottom']}V{first['y']}"
    path += "".join(f"H{step['x']}V{step['y']}" for step in rest)
    return f"{path}H{_FRONT['left']}"


def layer_charts(fit: Mapping[str, Any], vector: Row) -> list[Row]:
    """What the fit stage found block by block, one line a direction, the written vector's own marked."""
    charts = []
    for key, title, meaning, anchor in _CHARTS:
        rows = [[finite(value) for value in row[key]] for row in fit.get("directions", ())]
        known = [value for row in rows for value in row if value is not None]
        if not known:
            continue
        across = Axis(0, max(map(len, rows)) - 1, _LINES["left"], _LINES["right"], ())
        upward = Axis.over([anchor, *known], _LINES["bottom"], _LINES["top"])
        lines = [
            {
                "estimator": found["estimator"],
                "ridge": found["ridge"],
                "values": row,
                "path": _path(row, across, upward),
                "chosen": (found["estimator"], found["ridge"]) == (vector["estimator"], vector["ridge"]),
            }
            for found, row in zip(fit["directions"], rows, strict=True)
        ]
        lines.sort(key=lambda line: line["chosen"])
        first, last = vector["layers"]
        charts.append(
            {
                **_LINES, "key": key, "title": title, "meaning": meaning, "lines": lines, "across": across,
                "upward": upward, "last": max(map(len, rows)) - 1,
                "band": (across.at(first - 0.5), across.at(last + 0.5)),
            }
        )  # fmt: skip
    return charts


def own_line(charts: Sequence[Row], key: str) -> list[float | None]:
    """A chart's values [L] of the written vector's own direction; empty where there are none."""
    lines = (line for chart in charts if chart["key"] == key for line in chart["lines"] if line["chosen"])
    return next((list(line["values"]) for line in lines), [])


def _path(row: Sequence[float | None], across: Axis, upward: Axis) -> str:
    """An SVG path with a gap where there is no value."""
    path, pen = [], "M"
    for layer, value in enumerate(row):
        if value is not None:
            path.append(f"{pen}{across.at(layer)} {upward.at(value)}")
        pen = "M" if value is None else "L"
    return "".join(path)
