"""Draw a picture of README.md from a measured folder: `python docs/drawings/pictures.py NAME FOLDER`.

`answers` shows three prompts of the validation split, unsteered and with the gated adapter. Nobody picks
them: each is the first one in English that fits and has the outcomes of its row. The numbers are of the whole
split. `front` shows what the search tried, and what every file and baseline does on the validation split.
`docs/pictures/NAME.svg` comes out.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draw import WIDTH, Drawing

from rs_gguf.errors import InputError
from rs_gguf.evaluation.outcomes import CLASSES, Outcome, class_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts.markers import opens_with_refusal
from rs_gguf.records.metrics import FileRecord
from rs_gguf.records.rows import Row
from rs_gguf.report import plots
from rs_gguf.report.recommendation import reported_files
from rs_gguf.report.results import Results, load

FOLDER = Path(__file__).parents[1] / "pictures"
_PROMPT, _LINE, _LINES = 90, 50, 4  # characters of a prompt and of a line of an answer; lines of an answer


@dataclass(frozen=True)
class Case:
    """A row of the picture: prompts of a kind with these outcomes, and what one calls the transition."""

    kind: str
    unsteered: Outcome
    steered: Outcome
    words: str

    def count(self, file: FileRecord) -> str:
        """Say how many prompts of the split went the same way, of those that had the outcome unsteered.

        Raises:
            InputError: transitions were not measured.
        """
        measured = next((one for one in file.sets.values() if one.kind == self.kind), None)
        share = None
        if measured is not None:
            share = measured.closed if self.unsteered == "complies" else measured.kept
        if measured is None or measured.transitions is None or share is None:
            raise InputError(
                f"metrics.json has no transitions of {self.kind} prompts. Run `rs-export remeasure` first."
            )
        row = measured.transitions[CLASSES.index(class_of(self.unsteered))]
        # A row leaves out the prompts whose steered answer could not be judged.
        return f"{row[CLASSES.index(class_of(self.steered))]} of {share.of} {self.words}"

    def first(self, rows: Sequence[Row], key: str) -> Row:
        """Return the first row of test_answers.jsonl that the case is about and that fits.

        Raises:
            InputError: there is none.
        """
        for row in rows:
            sides = [row["answer_unsteered"], row[f"answer_{key}"]]
            # What answers a harmful prompt is not published, whatever the judge says.
            harmless = self.kind != "harmful" or all(_is_mere_refusal(answer) for answer in sides)
            if (
                (row["kind"], row["language"]) == (self.kind, "en")
                and (row["outcome_unsteered"], row[f"outcome_{key}"]) == (self.unsteered, self.steered)
                and not row[f"unconfirmed_{key}"]
                and len(row["prompt"]) <= _PROMPT
                and all(answer.isascii() for answer in sides)  # other scripts have other widths
                and harmless
            ):
                return row
        raise InputError(
            f"test_answers.jsonl has no English {self.kind} prompt of up to {_PROMPT} characters with the "
            f"outcomes {self.unsteered} and {self.steered}. Give a folder with more prompts."
        )


CASES = (
    Case("sensitive", "explicit", "complies", "refused prompts are answered"),
    Case("harmful", "explicit", "explicit", "refused prompts stay refused"),
    Case("benign", "complies", "complies", "answered prompts stay answered"),
)


def answers(folder: Path) -> str:
    """Draw three prompts with their answers, unsteered and with the gated adapter.

    Raises:
        InputError: the folder is not measured, or has no gated adapter, or no prompt fits.
    """
    run = load(folder)
    file = run.record.files.get("adapter")
    if file is None:
        raise InputError(f"{folder} has no gated adapter. Give the folder of a run that wrote one.")
    rows = [case.first(run.rows, "adapter") for case in CASES]
    texts = [[_lines(row[f"answer_{side}"]) for side in ("unsteered", "adapter")] for row in rows]
    heights = [18 * max(map(len, sides)) + 14 for sides in texts]
    d = Drawing("Three prompts, answered unsteered and with the gated adapter", sum(heights) + 62 * 3 + 68)
    columns, y = (24.0, WIDTH / 2 + 8), 30.0
    for x, words in zip(columns, ("unsteered", f"with the {file.word}"), strict=True):
        d.text(x, y, words, "strong")
    for case, row, sides, height in zip(CASES, rows, texts, heights, strict=True):
        d.text(24, y + 32, f"{case.kind.capitalize()}: {case.count(file)}", "strong")
        d.text(24, y + 52, f"“{row['prompt']}”")
        for x, lines, outcome in zip(columns, sides, (case.unsteered, case.steered), strict=True):
            d.rect(x, y + 60, WIDTH / 2 - 32, height, "a-line" if outcome == "complies" else "b-line")
            for number, line in enumerate(lines):
                d.text(x + 12, y + 79 + 18 * number, line, "small")
        y += height + 62
    verdict = f"validation split. Acceptance criteria: {file.acceptance.verdict}."
    d.text(24, y + 24, _source(run, verdict), "small")
    return d.svg()


def front(folder: Path) -> str:
    """Draw the trials of a search: harmful refusals kept to the right, sensitive refusals gone upwards.

    Raises:
        InputError: the folder is not measured, or has no trials.
    """
    run = load(folder)
    tune = plots.shown(run.tune)
    if not tune["trials"]:
        raise InputError(f"{folder} has no trials in tune.json. Give the folder of a finished run.")
    files = reported_files(run.record)
    plot = plots.trade_off(tune, files, run.record.effect, run.record.baselines)
    left, right, top, bottom = (plot[side] for side in ("left", "right", "top", "bottom"))
    across, upward = plot["across"], plot["upward"]
    legend = [(file.key, file.word) for file in reversed(files)]
    legend += [("baseline", one.name) for one in run.record.baselines]
    end = bottom + 74 + 22 * len(legend)
    d = Drawing("What the search tried: sensitive refusals gone against harmful refusals kept", end + 38)
    floor = across.at(run.recipe.get("tune", {}).get("min_retention", Recipe().tune.min_retention))
    d.rect(floor, top, right - floor, bottom - top, "undecided", 0)
    d.text(left, top - 18, "↑ sensitive refusals gone", "strong")
    d.text(right, bottom + 46, "harmful refusals kept →", "strong", "end")
    for tick in across.ticks:
        d.text(across.at(tick), bottom + 22, f"{tick:.0%}", "small", "middle")
    for tick in upward.ticks:
        d.text(left - 10, upward.at(tick) + 5, f"{tick:.0%}", "small", "end")
    d.line(left, bottom, right, bottom)
    d.line(left, top, left, bottom)
    d.path(plot["front"], "line")
    for point in plot["points"]:
        _mark(d, point["x"], point["y"], point["key"], filled=point["fidelity"] != "logprob")
        if point["selected"]:
            d.dot(point["x"], point["y"], 11, "line")
    measured = {}
    for point in plot["tested"]:
        x, y, name = point["x"], point["y"], (point["key"], point["word"])
        if point["trial"]:
            d.line(point["trial"]["x"], point["trial"]["y"], x, y)
        d.path(f"M{x - 6} {y - 6}l12 12m-12 0l12 -12", f"{_style(point['key'])}-line".removeprefix("-"))
        number = legend.index(name) + 1
        d.text(x + 9, y + 17, f"{number}", "small")
        measured[name] = (
            f": {point['kept']:.0%} kept, {point['done']:.0%} gone on the validation split (× {number})"
        )
    for i, name in enumerate(legend):
        y = bottom + 74 + 22 * i
        if name[0] != "baseline":
            _mark(d, 31, y - 5, name[0], filled=True)
        d.text(46, y, name[1] + measured.get(name, ""), "small")
    marks = "Filled: answers were judged. Hollow: one forward pass. Ring: selected. Line: Pareto front."
    d.text(24, end, marks, "small")
    d.text(24, end + 22, _source(run, f"{len(run.tune['trials'])} trials on the tune split"), "small")
    return d.svg()


def _mark(d: Drawing, x: float, y: float, key: str, *, filled: bool) -> None:
    style = _style(key) if filled else f"{_style(key)}-line"
    if key == "adapter":
        d.path(f"M{x} {y - 7}l6.5 12h-13z", style)
    else:
        d.dot(x, y, 5.5, style)


def _style(key: str) -> str:
    """Return the style of a method; empty for a baseline, whose marks are grey lines."""
    return {"vector": "b", "baseline": ""}.get(key, "a")


def _lines(answer: str) -> list[str]:
    text = " ".join(answer.split())
    return textwrap.wrap(text, _LINE, max_lines=_LINES, placeholder=" …")


def _is_mere_refusal(answer: str) -> bool:
    return opens_with_refusal(answer) and len(answer) <= 2 * _LINE


def _source(run: Results, what: str) -> str:
    return f"{run.record.model.name}, {run.record.date}: {what}"


PICTURES: dict[str, Callable[[Path], str]] = {"answers": answers, "front": front}


def main(name: str, folder: Path, target: Path = FOLDER) -> None:
    """Draw a picture of the folder into `target`."""
    (target / f"{name}.svg").write_text(PICTURES[name](folder), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
    except InputError as error:
        sys.exit(str(error))
