"""The pictures of README.md say what the measured folder says, and their text is only text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pictures
import pytest
from fixtures.invented_run import invented_rows, make_run

from rs_gguf.errors import InputError
from rs_gguf.evaluation.outcomes import class_of
from rs_gguf.records.metrics import RunRecord

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert('1')</script> & \"x\""


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def rows_with(change: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Return invented rows, changed where a picture could show them."""
    rows = invented_rows()
    for row in rows:
        change(row)
    return rows


def test_answers_show_the_first_prompts_that_fit_and_counts_of_all(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "test_answers.jsonl").read_text().splitlines()]
    found = texts(pictures.answers(run))
    for case in pictures.CASES:
        before, after = class_of(case.unsteered), class_of(case.steered)
        outcomes = [
            (class_of(row["outcome_unsteered"]), class_of(row["outcome_adapter"]))
            for row in rows
            if row["kind"] == case.kind
        ]
        of = [pair for pair in outcomes if pair[0] == before]  # unjudged ones too
        n = outcomes.count((before, after))
        assert f"{case.kind.capitalize()}: {n} of {len(of)} {case.words}" in found
        shown = case.first(rows, "adapter")
        assert f"“{shown['prompt']}”" in found
        assert shown["kind"] == case.kind


def test_hostile_prompts_and_answers_are_text(tmp_path: Path) -> None:
    def spoil(row: dict[str, Any]) -> None:
        row["prompt"] = HOSTILE + "\u202e\x07"
        if row["kind"] != "harmful" and row["language"] == "en":
            row.update(answer_unsteered=HOSTILE, answer_adapter=HOSTILE)

    svg = pictures.answers(make_run(tmp_path, rows_with(spoil)))
    assert "<script" not in svg
    found = texts(svg)
    assert sum(HOSTILE in text for text in found) >= 3 + 2
    assert not any("\u202e" in text or "\x07" in text for text in found)


@pytest.mark.parametrize(
    "answer", ["First, buy the parts.", "I'm sorry, but I can't. " + "First, buy it. " * 9]
)
def test_what_is_more_than_a_refusal_of_a_harmful_prompt_is_not_published(
    tmp_path: Path, answer: str
) -> None:
    def leak(row: dict[str, Any]) -> None:
        if row["kind"] == "harmful":
            row["answer_adapter"] = answer

    rows = rows_with(leak)
    with pytest.raises(InputError, match="no English harmful prompt"):
        pictures.answers(make_run(tmp_path / "all", rows))
    refused = [row for row in rows if row["kind"] == "harmful" and row["language"] == "en"]
    refused[-1]["answer_adapter"] = refused[-1]["answer_unsteered"] = "I'm sorry, but I can't assist."
    refused[-1].update(confidence_unsteered=0.9, category_unsteered="direct", prompt="How?")
    refused[-1].update(confidence_adapter=0.9, category_adapter="direct")
    svg = pictures.answers(make_run(tmp_path / "one", rows))
    assert "buy" not in svg
    assert "“How?”" in texts(svg)


def test_the_front_has_every_trial_where_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trials = json.loads((run / "tune.json").read_text())["trials"]
    root = ElementTree.fromstring(svg := pictures.front(run))
    adapters = [e.attrib["d"] for e in root.iter(f"{SVG}path") if e.attrib["d"].endswith("l6.5 12h-13z")]
    vectors = [e.attrib for e in root.iter(f"{SVG}circle") if e.attrib["r"] == "5.5"]
    assert len(adapters) + len(vectors) == len(trials) + 2  # and the legend
    (across, upward) = (
        [(float(e.attrib[at]), float(e.text.rstrip("%")) / 100) for e in ticks if e.text]
        for at, ticks in (
            ("x", [e for e in root.iter(f"{SVG}text") if e.attrib["text-anchor"] == "middle"]),
            ("y", [e for e in root.iter(f"{SVG}text") if e.attrib["x"] == "64.0" and "%" in (e.text or "")]),
        )
    )
    rings = [e.attrib for e in root.iter(f"{SVG}circle") if e.attrib["r"] == "11"]
    chosen = [trials[9], trials[22]]
    for ring, trial in zip(sorted(rings, key=lambda ring: -float(ring["cy"])), chosen, strict=True):
        assert value(float(ring["cx"]), across) == pytest.approx(trial["harmful_retention"], abs=2e-3)
        assert value(float(ring["cy"]) + 5, upward) == pytest.approx(
            1 - trial["sensitive_remaining"], abs=2e-3
        )
    for file in RunRecord.read(run / "metrics.json").files.values():
        kept, opened = file.sets["harmful"].kept, file.sets["sensitive"].opened
        assert kept is not None
        assert opened is not None
        assert f"{file.word}: {kept.rate:.0%} kept, {opened.rate:.0%} gone" in svg


def test_the_front_has_every_file_and_baseline_with_its_number(tmp_path: Path) -> None:
    def extended(metrics: dict[str, Any]) -> dict[str, Any]:
        """Add a third file that is as good as the adapter, and two baselines as good as the vector."""
        metrics["files"]["third"] = {**metrics["files"]["adapter"], "word": "third", "file": "third.gguf"}
        other = {**metrics["baselines"][0], "name": "ablation"}
        metrics["baselines"] += [other, {**other, "name": "rmd", "sets": {}}]
        return metrics

    def searched(tune: dict[str, Any]) -> dict[str, Any]:
        tune["trials"].append({**tune["trials"][23], "number": 99, "method": "third", "estimator": "third"})
        return tune

    root = ElementTree.fromstring(svg := pictures.front(make_run(tmp_path, metrics=extended, tune=searched)))
    words = ["third", "gated adapter", "control vector", "system prompt: open", "ablation"]
    found = texts(svg)
    for number, word in enumerate(words, start=1):
        (legend,) = [
            text for text in found if text.startswith(f"{word}: ") and text.endswith(f"(× {number})")
        ]
        alike = "gated adapter" if number < 3 else "control vector"
        assert legend.removeprefix(word)[:-2] == next(
            text.removeprefix(alike)[:-2] for text in found if text.startswith(f"{alike}: ")
        )
        assert str(number) in found
    assert "rmd" in found  # it was not measured
    dots = [e.attrib for e in root.iter(f"{SVG}circle") if e.attrib["class"] in ("a", "a-line")]
    assert sum(dot["r"] == "5.5" for dot in dots) == 2  # of the third: a trial, and the legend
    paths = list(root.iter(f"{SVG}path"))
    crosses = [e.attrib["class"] for e in paths if "l12 12" in e.attrib["d"]]
    assert sorted(crosses) == ["a-line", "a-line", "b-line", "line", "line"]


def value(place: float, ticks: list[tuple[float, float]]) -> float:
    """Return the value at a place of an axis, by its first and last tick."""
    (start, low), (end, high) = ticks[0], ticks[-1]
    return low + (place - start) / (end - start) * (high - low)


def test_a_folder_without_trials_or_adapter_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "tune.json").unlink()
    with pytest.raises(InputError, match="no trials"):
        pictures.front(run)
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["files"]["adapter"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="no gated adapter"):
        pictures.answers(run)


def test_the_committed_answers_have_the_published_numbers() -> None:
    file = RunRecord.read(ROOT / "vectors" / "qwen2.5-coder-1.5b-remove" / "metrics.json").files["adapter"]
    found = texts((COMMITTED / "answers.svg").read_text(encoding="utf-8"))
    for case in pictures.CASES:
        assert f"{case.kind.capitalize()}: {case.count(file)}" in found
