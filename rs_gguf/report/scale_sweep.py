"""Scale sweeps: explicit refusals as the strength grows.

What `rs-export eval --scales … --json` wrote into the run folder goes in, as `scale_sweep.json` or any name
that begins alike. Without one, the trials of the search go in. Charts for inline SVG come out.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rs_gguf.engines.settings import EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.evaluation.paired import PairedEvaluation
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.rows import Row
from rs_gguf.records.trials import method_of
from rs_gguf.report.plots import Axis
from rs_gguf.report.recommendation import ReportedFile, kind_order
from rs_gguf.report.text import file_name
from rs_gguf.steering.file import path_and_scale

_BOX = {"left": 52, "right": 450, "top": 18, "bottom": 250}
_ASIDE = 5
# What a trial has of each kind of prompt; drawn in this order.
_RATES = (("harmful", "harmful_retention"), ("sensitive", "sensitive_remaining"), ("benign", "benign_closed"))


def measured(sweeps: Sequence[Row], rows: Sequence[Row], files: Sequence[ReportedFile]) -> list[Row]:
    """Return a chart of each sweep: lines by kind of prompt where the run knows it, else by set.

    rows: the run's own validation prompts, which give the prompts of a sweep their kind.
    A chart has a `key` if one file of the run was swept, recognised by its name; else the key is None. The
    scale of a single file is multiplied in. With several files, scales multiply the scale of each.
    """
    kind_of = {row["prompt"]: row["kind"] for row in rows}
    return [_curves(sweep, kind_of, files) for sweep in sweeps]


def _curves(sweep: Row, kind_of: Mapping[str, str], files: Sequence[ReportedFile]) -> Row:
    vectors, adapters = sweep["control_vectors"], sweep["adapters"]
    # Without their folders, which may name the user.
    names = [file_name(argument) for argument in (*vectors, *adapters)]
    own, file = 1.0, None
    if len(names) == 1:
        # `eval` accepted the argument. An unknown suffix is thus part of a file name on its machine.
        with contextlib.suppress(InputError):
            file_path, own = path_and_scale(names[0])
            names[0] = file_path.name
        alike = (f for f in files if f.record.file == names[0] and f.is_vector == bool(vectors))
        file = next(alike, None)
    steps: list[Row] = []
    for step in sweep["sweep"]:
        groups: dict[str, list[Row]] = {}
        for row in step["rows"]:
            groups.setdefault(kind_of.get(row["prompt"], row["set"]), []).append(row)
        of = {name: PairedEvaluation.of_rows(members).record() for name, members in groups.items()}
        steps.append(
            {
                "scale": float(step["scale"]) * own or 0.0,  # no -0
                "drift": step["benign_text"]["drift"],
                "of": of,
                "fails": sum(one.outcomes_steered.fails for one in of.values()),
            }
        )
    steps.sort(key=lambda step: step["scale"])
    across = Axis.over([step["scale"] for step in steps], _BOX["left"], _BOX["right"])
    upward = _upward(())
    sets = sorted(steps[0]["of"], key=lambda name: (kind_order(name), name))
    # Sets that are not kinds borrow their looks, unless there are kinds beside them.
    borrowed = {} if set(sets) & set(KINDS) else dict(zip(sets, KINDS, strict=False))
    lines = []
    for k, name in enumerate(sets):
        aside = _ASIDE * (k - (len(sets) - 1) / 2)  # or equal rates would hide each other
        points = [
            {
                "x": round(across.at(step["scale"]) + aside, 2),
                "y": upward.at(share.rate),
                "low": upward.at(share.ci95[0]),
                "high": upward.at(share.ci95[1]),
                "scale": step["scale"],
                "share": share,
            }
            for step in steps
            if (share := step["of"][name].explicit_steered) and share.of
        ]
        path = "M" + "L".join(f"{point['x']} {point['y']}" for point in points) if points else ""
        style = name if name in KINDS else borrowed.get(name, "other")
        lines.append({"name": name, "style": style, "points": points, "path": path})
    return {
        **_BOX, "key": file and file.key, "word": file.word if file else "files given",
        "lines": lines, "steps": steps, "names": sets, "across": across, "upward": upward,
        "tokens": sweep["tokens"], "judge": sweep["judge"], "system": sweep.get("system_prompt"),
        "temperature": sweep.get("temperature"),
        "files": names,
    }  # fmt: skip


def options(recipe: Mapping[str, Any], tokens: int) -> str:
    """Return the options with which `rs-export eval` measures as the run did."""
    words, temperature = ["--tokens", str(tokens)], recipe.get("answers", {}).get("temperature")
    for option, value in (
        ("--judge", recipe.get("judge")),
        ("--system-prompt", recipe.get("prompts", {}).get("system")),
        ("--temperature", temperature),
        ("--seed", temperature and recipe.get("seed")),
    ):
        words += [option, str(value)] if value else []
    return shlex.join([*words, *EngineSettings.of(recipe.get("engine", {})).result_options.split()])


def searched(tune: Mapping[str, Any], files: Sequence[ReportedFile]) -> list[Row]:
    """Return for each file the trials of its search over their strength. They differ in other choices too."""
    selected = set(tune["selected"].values())
    charts = []
    for file in files:
        trials = [t for t in tune["trials"] if method_of(t) == file.key]
        if not trials:  # the folder holds only what was published
            continue
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
        at = next((across.at(t["strength"]) for t in trials if t["number"] in selected), None)
        charts.append(
            {
                **_BOX, "file": file, "trials": len(trials), "points": points, "selected": at,
                "across": across, "upward": upward,
            }
        )  # fmt: skip
    return charts


def _upward(values: Iterable[float]) -> Axis:
    return Axis.over([0.0, 1.0, *values], _BOX["bottom"], _BOX["top"])
