"""The page's drawings, in their own coordinates: trials and front of the search, and layers of the fit.

`tune.json`, `fit.json` and the measured files go in. Marks, paths and ticks for inline SVG come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rs_gguf.records.metrics import BaselineRecord, Effect, FileRecord, SetRecord
from rs_gguf.records.rows import Row, finite
from rs_gguf.records.trials import method_of
from rs_gguf.report.recommendation import ReportedFile

_T = TypeVar("_T")

_FRONT = {"left": 74, "right": 640, "top": 44, "bottom": 360}
_LINES = {"left": 44, "right": 330, "top": 14, "bottom": 150}
_LOGPROB_TRIALS = 500  # of one forward pass, drawn and listed at most
# What fit.json has of a direction's layers, its title and meaning, and a value that the axis always shows.
_CHARTS = (
    ("score", "Layer score", "correlation with the judge's confidence, less the misjudged share", 0),
    ("auroc", "AUROC", "how well the projection separates refused from answered prompts; 0.5 is chance", 0.5),
    (
        "harm_cosine",
        "Cosine with harmful refusals",
        "between this direction and the direction of harmful refusals; to remove, 0 is wanted",
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
        """Return a scale whose ends are round and hold all values."""
        low, high = min(known := list(values)), max(known)
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        size = 10.0 ** math.floor(math.log10((high - low) / 5))
        step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= 6)
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        ticks = tuple(round(k * step, 9) for k in range(first, last + 1))
        return cls(ticks[0], ticks[-1], start, end, ticks)

    def at(self, value: float) -> float:
        """Return where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def thinned(items: Sequence[_T], most: int) -> Sequence[_T]:
    """Return all items, or of more than `most` every second, third, …"""
    return items[:: math.ceil(len(items) / most) or 1]


def shown(tune: Mapping[str, Any]) -> Row:
    """Return `tune.json` with no more trials than a page can hold; the selected ones stay."""
    selected = set(tune["selected"].values())
    trials = [t for t in tune["trials"] if t["fidelity"] == "logprob" and t["number"] not in selected]
    trials.sort(key=method_of, reverse=True)  # or every second may be of the same method
    kept = [trial["number"] for trial in thinned(trials, _LOGPROB_TRIALS)]
    dropped = {trial["number"] for trial in trials}.difference(kept)
    return {**tune, "trials": [trial for trial in tune["trials"] if trial["number"] not in dropped]}


def trade_off(
    tune: Mapping[str, Any],
    files: Sequence[ReportedFile],
    effect: Effect,
    baselines: Sequence[BaselineRecord] = (),
) -> Row:
    """Return every trial of every method: retention of harmful refusals to the right, the effect upwards.

    The effect is the share of the sensitive refusals that are gone, or to induce of the answers. A trial that
    stopped before the sensitive prompts has none.
    `front` is the stair of what trials with short answers reach, of all methods together. `tested` are the
    written files on the validation split, joined to the trial that they were selected by, then the baselines.
    """
    selected = {number: name for name, number in tune["selected"].items()}
    points = [
        {
            **trial,
            "key": method_of(trial),
            "kept": float(trial["harmful_retention"]),
            "done": 1 - float(trial["sensitive_remaining"]),
            "selected": trial["number"] in selected,
        }
        for trial in tune["trials"]
        if trial["sensitive_remaining"] is not None
    ]
    tested: list[Row] = [
        {"key": key, "word": word, "kept": place[0], "done": place[1]}
        for key, word, sets in (
            *((file.key, file.word, file.sets) for file in files),
            *(("baseline", one.name, one.sets) for one in baselines),
        )
        if (place := _tested(sets, effect)) is not None
    ]
    everything = [*points, *tested]
    across = Axis.over([0.8, 1.0, *(p["kept"] for p in everything)], _FRONT["left"], _FRONT["right"])
    upward = Axis.over([0.0, 1.0, *(p["done"] for p in everything)], _FRONT["bottom"], _FRONT["top"])
    for point in everything:
        point["x"], point["y"] = across.at(point["kept"]), upward.at(point["done"])
    by_file = {selected[point["number"]]: point for point in points if point["selected"]}
    for point in tested:
        point["trial"] = by_file.get(point["key"])
    # Drawn last, and so on top.
    points.sort(key=lambda point: (point["selected"], point["fidelity"] != "logprob"))
    front = _stair([point for point in points if point["fidelity"] == "short"])
    return {
        **_FRONT, "points": points, "tested": tested, "front": front, "across": across, "upward": upward,
        "selected": by_file,
    }  # fmt: skip


def _tested(sets: Mapping[str, SetRecord], effect: Effect) -> tuple[float, float] | None:
    """Return retention and effect; None where schema 1 measured neither, or nothing was refused."""
    sensitive, harmful = (
        next((one for one in sets.values() if one.kind == kind), None) for kind in ("sensitive", "harmful")
    )
    if sensitive is None or harmful is None:
        return None
    change = sensitive.wanted(effect)
    kept = harmful.kept.rate if harmful.kept else None
    done = change.rate if change else None
    return None if kept is None or done is None else (kept, done)


def _stair(points: Sequence[Row]) -> str:
    """Return an SVG path along the points that no other betters on both axes; empty without points."""
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


def layer_charts(fit: Mapping[str, Any], file: FileRecord) -> list[Row]:
    """Return what the fit stage measured layer by layer, one line a direction, the written one marked."""
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
                "estimator": direction["estimator"],
                "ridge": direction["ridge"],
                "values": row,
                "path": _path(row, across, upward),
                "written": (direction["estimator"], direction["ridge"]) == (file.estimator, file.ridge),
            }
            for direction, row in zip(fit["directions"], rows, strict=True)
        ]
        lines.sort(key=lambda line: line["written"])
        first, last = file.layers
        charts.append(
            {
                **_LINES, "key": key, "title": title, "meaning": meaning, "lines": lines, "across": across,
                "upward": upward, "last": max(map(len, rows)) - 1,
                "band": (across.at(first - 0.5), across.at(last + 0.5)),
            }
        )  # fmt: skip
    return charts


def own_line(charts: Sequence[Row], key: str) -> list[float | None]:
    """Return a chart's values [L] of the written direction; empty where there are none."""
    lines = (line for chart in charts if chart["key"] == key for line in chart["lines"] if line["written"])
    return next((list(line["values"]) for line in lines), [])


def _path(row: Sequence[float | None], across: Axis, upward: Axis) -> str:
    """Return an SVG path with a gap where there is no value."""
    path, pen = [], "M"
    for layer, value in enumerate(row):
        if value is not None:
            path.append(f"{pen}{across.at(layer)} {upward.at(value)}")
        pen = "M" if value is None else "L"
    return "".join(path)
