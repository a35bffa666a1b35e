"""Dose and response: refusals under growing strength.

What `rs-export eval --scales … --json` wrote into the run folder goes in, as `scale_sweep.json` or any name that
begins like it; without one, the trials of the search. Charts for inline SVG come out.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.rows import Row
from rs_gguf.records.trials import method_of
from rs_gguf.report.plots import Axis
from rs_gguf.report.recommendation import kind_order
from rs_gguf.report.text import file_name
from rs_gguf.steering.file import path_and_scale

_BOX = {"left": 52, "right": 450, "top": 18, "bottom": 250}
_ASIDE = 5
# What a trial has of each kind of prompt; drawn in this order.
_RATES = (("harmful", "harmful_retention"), ("sensitive", "sensitive_remaining"), ("benign", "benign_closed"))


def measured(sweeps: Sequence[Row], rows: Sequence[Row], files: Sequence[Row]) -> list[Row]:
    """A chart of each step file: lines by kind of prompt where the run knows it, else by set.

    `rows` are the run's own test prompts, by which prompts of a step file get their kind back. `key` is that
    of the run's file, told by its name, where it alone was given, else None. Scales are those of the one file
    that was given; where there are several, they multiply theirs.
    """
    kind_of = {row["prompt"]: row["kind"] for row in rows}
    return [_curves(found, kind_of, files) for found in sweeps]


def _curves(found: Row, kind_of: Mapping[str, str], files: Sequence[Row]) -> Row:
    given = {"vector": found["control_vectors"], "adapter": found["adapters"]}
    # Without their folders: whose they are is nobody's business.
    names = [file_name(argument) for arguments in given.values() for argument in arguments]
    own, file = 1.0, None
    if len(names) == 1:
        # `eval` accepted the argument. An unknown suffix is thus part of a file name on its machine.
        with contextlib.suppress(InputError):
            file_path, own = path_and_scale(names[0])
            names[0] = file_path.name
        file = next((f for f in files if given[f["key"]] and f["file"] == names[0]), None)
    steps: list[Row] = []
    for step in found["sweep"]:
        groups: dict[str, list[Row]] = {}
        for row in step["rows"]:
            groups.setdefault(kind_of.get(row["prompt"], row["set"]), []).append(row)
        steps.append(
            {
                "scale": float(step["scale"]) * own or 0.0,  # no -0
                "drift": step["benign_text"]["drift"],
                "of": {name: PairedEvaluation.of_rows(some).counts() for name, some in groups.items()},
            }
        )
    steps.sort(key=lambda step: step["scale"])
    across = Axis.over([step["scale"] for step in steps], _BOX["left"], _BOX["right"])
    upward = _upward(())
    sets = sorted(steps[0]["of"], key=lambda name: (kind_order(name), name))
    # Sets that are no kinds borrow their looks, unless there are kinds beside them.
    borrowed = {} if set(sets) & set(KINDS) else dict(zip(sets, KINDS, strict=False))
    lines = []
    for k, name in enumerate(sets):
        aside = _ASIDE * (k - (len(sets) - 1) / 2)  # or equal rates would hide each other
        points = [
            {
                "x": round(across.at(step["scale"]) + aside, 2),
                "y": upward.at(step["of"][name].refusal_steered),
                "low": upward.at(step["of"][name].ci95_steered[0]),
                "high": upward.at(step["of"][name].ci95_steered[1]),
                "scale": step["scale"],
                "rate": step["of"][name].refusal_steered,
            }
            for step in steps
            if step["of"][name].n
        ]
        path = "M" + "L".join(f"{point['x']} {point['y']}" for point in points) if points else ""
        style = name if name in KINDS else borrowed.get(name, "other")
        lines.append({"name": name, "style": style, "points": points, "path": path})
    return {
        **_BOX, "key": file and file["key"], "word": file["word"] if file else "files given",
        "lines": lines, "steps": steps, "names": sets, "across": across, "upward": upward,
        "tokens": found["tokens"], "judge": found["judge"], "system": found.get("system_prompt"),
        "temperature": found.get("temperature"),
        "files": names,
    }  # fmt: skip


def options(recipe: Mapping[str, Any], tokens: int) -> str:
    """What `rs-export eval` has to be told to measure as the run did."""
    found, temperature = ["--tokens", str(tokens)], recipe.get("answers", {}).get("temperature")
    for option, value in (
        ("--judge", recipe.get("judge")),
        ("--system-prompt", recipe.get("prompts", {}).get("system")),
        ("--temperature", temperature),
        ("--seed", temperature and recipe.get("seed")),
    ):
        found += [option, str(value)] if value else []
    return shlex.join(found)


def searched(tune: Mapping[str, Any], files: Sequence[Row]) -> list[Row]:
    """For each file the trials of its search over their strength; other choices differ between them too."""
    chosen = set(tune["selected"].values())
    charts = []
    for file in files:
        trials = [t for t in tune["trials"] if method_of(t) == file["key"]]
        rates = [
            (kind, trial, trial[name]) for kind, name in _RATES for trial in trials if trial[name] is not None
        ]
        across = Axis.over([0.0, *(t["strength"] for t in trials)], _BOX["left"], _BOX["right"])
        upward = _upward([rate for _, _, rate in rates])
        points = [
            {
                "kind": kind,
                "x": across.at(trial["strength"]),
                "y": upward.at(rate),
                "rate": rate,
                "strength": trial["strength"],
                "logprob": trial["fidelity"] == "logprob",
            }
            for kind, trial, rate in rates
        ]
        at = next((across.at(t["strength"]) for t in trials if t["number"] in chosen), None)
        charts.append(
            {
                **_BOX, "key": file["key"], "word": file["word"], "file": file["file"], "trials": len(trials),
                "points": points, "chosen": at, "across": across, "upward": upward,
            }
        )  # fmt: skip
    return charts


def _upward(values: Iterable[float]) -> Axis:
    return Axis.over([0.0, 1.0, *values], _BOX["bottom"], _BOX["top"])
