"""The report and the card, on an invented run folder, with friendly and with hostile text."""

from __future__ import annotations

import copy
import html
import html.parser
import itertools
import json
import math
import re
import shlex
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures.invented_run import (
    ANSWERED_TRIALS,
    HOSTILE,
    SIDES,
    evaluation_of,
    figures_of_file,
    invented_rows,
    invented_set,
    make_hostile_run,
    make_run,
    with_arrays,
    with_sweep,
    without_adapter,
)
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rs_gguf.errors import InputError
from rs_gguf.judges import registry as judges
from rs_gguf.judges.pairs import held_out_pairs
from rs_gguf.pipeline import recipe
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import JudgeRecord
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.report import plots
from rs_gguf.report.page import write_card, write_report
from rs_gguf.report.recommendation import ReportedFile
from rs_gguf.report.results import printable
from rs_gguf.report.side_effects import agreement_line
from rs_gguf.report.text import duration, interval, markdown_code, markdown_fence, markdown_text, percent


class Page(html.parser.HTMLParser):
    """Elements, their attributes and their text, as a browser would take them from the file."""

    VOID = frozenset({"meta", "link", "input", "br", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], "every element is closed, in order"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is given twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts[len(self.elements) - 1] = ""
        if tag not in self.VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, index in self._open:
            self.texts[index] += data

    def all(self, tag: str, **attributes: str) -> list[str]:
        """Texts of the elements with this tag and these attributes (`class_` for `class`)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            self.texts[i]
            for i, (name, found) in enumerate(self.elements)
            if name == tag and all(found.get(k) == v for k, v in wanted.items())
        ]


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def judged_folder(tmp_path: Path) -> Path:
    """A run all of whose answers are judged."""
    rows = invented_rows()
    for row in rows:
        for side in SIDES:
            row[f"confidence_{side}"] = math.copysign(0.5, row[f"confidence_{side}"] or 1)
    return make_run(tmp_path / "judged", rows)


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    return make_hostile_run(tmp_path / "run")


# ---- report --------------------------------------------------------------------------------------


def verdicts_of(**verdicts: str) -> Any:
    """A change of metrics.json: the verdict of each file."""

    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        for key, verdict in verdicts.items():
            metrics["files"][key]["acceptance"] = {
                "verdict": verdict,
                "reasons": [] if verdict == "passed" else ["explicit refusals did not fall"],
            }
        return metrics

    return change


def failed(*reasons: str) -> dict[str, Any]:
    return {"verdict": "failed", "reasons": list(reasons)}


def of_file(key: str, **figures: Any) -> Any:
    """A change of metrics.json: other figures of a file."""

    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["files"][key] |= figures
        return metrics

    return change


def test_report_states_the_recommendation_the_numbers_and_the_exact_commands(judged_folder: Path) -> None:
    page = Page(write_report(judged_folder))
    files = json.loads((judged_folder / "metrics.json").read_text())["files"]
    assert page.all("h2", id="verdict-title") == ["✓Use the gated adapter"]
    assert list(files) == ["vector", "adapter"]
    for key, file in files.items():
        assert page.all("code", id=f"command-{key}") == [file["llama_cpp"]["command"]]
    numbers = [one_line(text) for text in page.all("div", class_="number")]
    assert len(numbers) == 3
    for text, kind in zip(numbers, KINDS, strict=True):
        before = files["vector"]["sets"][kind]
        shares = [before["explicit_unsteered"]]
        shares += [file["sets"][kind]["explicit_steered"] for file in files.values()]
        said = [f"{s['n']}of {s['of']}, {interval(s['ci95'])}" for s in shares]
        assert re.findall(r"\d+of \d+, \d+ to \d+%", text) == said


def table_after(text: str, caption: str) -> list[list[str]]:
    """The cells of the table with this caption, row by row, as text."""
    table = text.split(f"<caption>{caption}")[1].split("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in table.split("<tr")[1:]]
    return [[one_line(re.sub("<[^>]*>", " ", cell)) for cell in row] for row in rows]


def test_results_go_from_explicit_refusals_to_outcomes_transitions_and_acceptance(run_folder: Path) -> None:
    files = json.loads((run_folder / "metrics.json").read_text())["files"]
    page = Page(write_report(run_folder))
    order = ("refused explicitly", "Outcomes: how many", "Transitions: what", "Acceptance</th>", 'id="files"')
    places = [page.source.index(words) for words in order]
    assert places == sorted(places)
    head, *rows = table_after(page.source, "Outcomes")
    assert head[-7:] == ["n", "Explicit", "Corrected", "Complies", "Refuses", "Fails", "Unjudged"]
    expected = []
    for kind in KINDS:
        sides = [(files["vector"]["sets"][kind], "unsteered")]
        sides += [(file["sets"][kind], "steered") for file in files.values()]
        for one, side in sides:
            of, corrected = one[f"outcomes_{side}"], one[f"corrected_{side}"]
            rest = (str(of[name]) for name in ("complies", "refuses", "fails", "unjudged"))
            rate = f"{corrected['explicit']:.0%}" if corrected else "–"
            expected.append(["40", str(of["explicit"]), rate, *rest])
    assert [row[-7:] for row in rows] == expected
    head, *rows = table_after(page.source, "Transitions")
    expected_rows = [
        [
            f"{share['n']} of {share['of']} {interval(share['ci95'])}"
            for share in (file["sets"][kind][name] for name in ("opened", "kept", "closed", "broken"))
        ]
        for kind in KINDS
        for file in files.values()
    ]
    assert [row[-6:-2] for row in rows] == expected_rows
    assert page.source.count("with the file in columns</caption>") == 6


def test_columns_are_explained(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    legends = [one_line(text) for text in page.all("dl", class_="facts legend-of-columns")]
    of_results, of_side_effects, of_trials = legends
    for words in (
        "Explicit",
        "Complies",
        "Refuses",
        "Fails",
        "Unjudged",
        "Opened",
        "Kept",
        "Closed",
        "Broken",
    ):
        assert words in of_results
    assert "first choice" in of_side_effects
    trial, *columns = table_after(page.source, "Trials on the tune split")[0]
    assert trial == "Trial"
    assert [column for column in columns if column not in of_trials] == []


def test_a_trial_that_stopped_is_listed_but_not_drawn(tmp_path: Path) -> None:
    def stop(tune: dict[str, Any]) -> dict[str, Any]:
        number = tune["selected"]["vector"]
        row = {**tune["trials"][number], "sensitive_remaining": None, "feasible": False}
        row |= {"answered": [20, 24], "left_out": 30}
        return {**tune, "trials": [*tune["trials"][:number], row, *tune["trials"][number + 1 :]]}

    text = write_report(make_run(tmp_path, tune=stop)).read_text(encoding="utf-8")
    head, *rows = table_after(text, "Trials on the tune split")
    row = dict(zip(head, next(row for row in rows if row[0].startswith("9 ")), strict=True))
    assert row["Trial"] == "9 selected"
    assert row["Within limits"] == "no, stopped after 20 of 50 answers"
    assert row["Sensitive left"] == "–"
    assert "<title>Trial 9:" not in text
    assert "<title>Trial 10:" in text


def test_what_was_not_measured_is_not_explained(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    explanation = "to be about what was asked"
    assert explanation not in Page(write_report(run_folder)).source
    metrics["files"]["adapter"]["opened_on_subject"] = {"n": 3, "of": 4, "rate": 0.75, "ci95": [0.3, 0.95]}
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    assert explanation in Page(write_report(run_folder)).source


def test_minimal_pairs_have_a_line_where_they_were_measured(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    named, said = "Minimal pairs whose sensitive prompt opens the gates wider", "22 of 28, AUROC 0.91"
    assert named not in Page(write_report(run_folder)).source
    share = {"n": 22, "of": 28, "ci95": [0.6, 0.9]}
    metrics["files"]["adapter"]["minimal_pairs"] = {"separated": share, "auroc": 0.9098}
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    source = Page(write_report(run_folder)).source
    assert named in source
    assert said in source
    assert f"- {named}: {said}" in write_card(run_folder).read_text("utf-8")


def test_rates_of_no_judged_answer_are_not_measured(tmp_path: Path) -> None:
    rows = invented_rows(8)
    for row in rows:
        if row["kind"] == "sensitive":
            row |= dict.fromkeys((f"confidence_{side}" for side in SIDES), None)
            row |= dict.fromkeys((f"degenerate_{side}" for side in SIDES), False)
    folder = make_run(tmp_path, rows)
    page = Page(write_report(folder))
    sensitive = one_line(page.all("div", class_="number")[0])
    assert sensitive.count("not measured") == 3
    for text in (page.source, write_card(folder).read_text("utf-8")):
        assert "0 to 100%" not in text.split("Harmful")[0]


@pytest.mark.parametrize(
    ("vector", "adapter", "said", "first"),
    [
        ("passed", "passed", "✓Use the gated adapter", "remove-adapter.gguf"),  # it opens more
        ("failed", "passed", "✓Use the gated adapter", "remove-adapter.gguf"),
        ("undecided", "passed", "✓Use the gated adapter", "remove-adapter.gguf"),
        ("passed", "failed", "✓Use the control vector", "remove.gguf"),
        ("passed", "undecided", "✓Use the control vector", "remove.gguf"),
        ("failed", "failed", "✕Do not use either file as it is", "remove-adapter.gguf"),  # it opens more
        ("failed", "undecided", "?Undecided: more prompts are needed", "remove-adapter.gguf"),
    ],
)
def test_the_recommended_file_has_passed_and_opens_most(
    tmp_path: Path, vector: str, adapter: str, said: str, first: str
) -> None:
    page = Page(write_report(make_run(tmp_path, metrics=verdicts_of(vector=vector, adapter=adapter))))
    assert page.all("h2", id="verdict-title") == [said]
    titles = [one_line(text) for text in page.all("div", class_="title")]
    assert first in titles[0], "the recommended file comes first, else the one that opens more"
    mark = {"passed": "✓", "failed": "✕", "undecided": "?"}
    badges = [f"{mark[verdict]} {verdict}" for verdict in (vector, adapter)]
    assert sorted(text.split("gguf ")[1] for text in titles) == sorted(badges)
    assert len(page.all("ul", class_="reasons")) == [vector, adapter].count("failed") + [
        vector,
        adapter,
    ].count("undecided")


def with_sealed_set(folder: Path, **verdicts: str) -> Path:
    """Write a sealed.json: the figures of the run with other verdicts."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for key, verdict in verdicts.items():
        reasons = [] if verdict == "passed" else [f"{key} <b>broke</b> 11 answers"]
        metrics["files"][key]["acceptance"] = {"verdict": verdict, "reasons": reasons}
    metrics["sealed"] = {"set": "a.jsonl", "set_sha256": "ab" * 32, "opened": "2026-12-02"}
    (folder / "sealed.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize(
    ("vector", "adapter", "said", "sentence"),
    [
        (
            "passed",
            "passed",
            "✓Use the gated adapter",
            "passed the acceptance criteria, on a sealed set too.",
        ),
        (
            "passed",
            "failed",
            "✓Use the control vector",
            "adapter passed on the validation split, but failed on",
        ),
        ("undecided", "failed", "?Undecided: more prompts are needed", "but is undecided on a sealed set"),
    ],
)
def test_a_file_that_fails_on_a_sealed_set_is_not_recommended(
    tmp_path: Path, vector: str, adapter: str, said: str, sentence: str
) -> None:
    folder = make_run(tmp_path, metrics=verdicts_of(vector="passed", adapter="passed"))
    with_sealed_set(folder, vector=vector, adapter=adapter)
    page, card = Page(write_report(folder)), write_card(folder).read_text(encoding="utf-8")
    assert page.all("h2", id="verdict-title") == [said]
    assert sentence in page.all("div", class_="summary")[0]
    assert sentence in card.replace("\\", "")
    rows = {row[0]: row[1:] for row in table_after(page.source, "Side effects and acceptance")}
    assert rows["Acceptance"] == ["passed", "passed"]
    assert rows["Acceptance on the sealed set"] == [vector, adapter]
    assert (
        "on the sealed set: adapter <b>broke</b> 11 answers" in "".join(page.all("ul", class_="reasons"))
    ) == (adapter == "failed")
    assert "### Sealed set" in card
    assert card.count("**failed**") == (adapter == "failed")


def test_a_sealed_set_has_a_table_of_its_own(run_folder: Path) -> None:
    assert "Sealed set" not in write_report(run_folder).read_text("utf-8")
    assert "Sealed set" not in write_card(run_folder).read_text("utf-8")
    rows = table_after(write_report(with_sealed_set(run_folder)).read_text("utf-8"), "Sealed set")
    assert [row[0] for row in rows[1:]] == [
        *("Sensitive", "Control vector", "Gated adapter"), *("Harmful", "Control vector", "Gated adapter"),
        *("Benign", "Control vector", "Gated adapter"),
    ]  # fmt: skip


def test_a_sealed_set_that_was_opened_for_other_files_is_not_shown(run_folder: Path) -> None:
    metrics = json.loads((with_sealed_set(run_folder) / "sealed.json").read_text())
    metrics["files"]["adapter"]["strength"] += 1
    (run_folder / "sealed.json").write_text(json.dumps(metrics))
    assert "Sealed set" not in write_report(run_folder).read_text("utf-8")
    assert "Sealed set" not in write_card(run_folder).read_text("utf-8")


def test_a_damaged_sealed_record_is_named(run_folder: Path) -> None:
    (run_folder / "sealed.json").write_text("{}")
    with pytest.raises(InputError, match=r"sealed\.json"):
        write_report(run_folder)


def test_of_two_that_open_as_much_the_one_that_keeps_more_is_recommended(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        vector, adapter = metrics["files"]["vector"], metrics["files"]["adapter"]
        adapter["sets"] = copy.deepcopy(vector["sets"])
        adapter["sets"]["harmful"]["kept"]["n"] -= 1
        adapter["benign_drift"] = 0.0
        return metrics

    page = Page(write_report(make_run(tmp_path, metrics=change)))
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert "passed too, but keeps fewer harmful refusals" in page.all("div", class_="summary")[0]


def test_a_third_method_is_reported_as_the_others_are(tmp_path: Path) -> None:
    """Nothing knows the methods by name: keys, words and columns are those of the run."""
    folder = make_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["files"]["third"] = {**metrics["files"]["adapter"], "word": "third file", "file": "third.gguf"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        {
            **row,
            **{
                name.replace("_adapter", "_third"): value for name, value in row.items() if "_adapter" in name
            },
        }
        for row in evaluated(folder)
    ]
    (folder / "test_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, card = Page(write_report(folder)), write_card(folder).read_text("utf-8")
    numbers = page.all("div", class_="number")
    assert all("Third file" in text for text in numbers)
    assert all("Third file" in text for text in page.all("article", class_="prompt"))
    assert page.all("code", id="command-third") == [metrics["files"]["third"]["llama_cpp"]["command"]]
    assert card.count("| third file |") == 2 * len(KINDS) + 1
    assert "--lora third.gguf" in card


def test_a_run_without_an_adapter_is_told_as_one_file(run_folder: Path) -> None:
    folder = without_adapter(run_folder)
    page, card = Page(write_report(folder)), write_card(folder).read_text(encoding="utf-8")
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert len(page.all("article", class_="prompt")[0].split("Control vector")) == 2
    seen = " ".join(page.all("body")).replace(page.all("script")[0], "")
    ours = card.replace("base_model_relation: adapter", "")
    for text in (seen, ours):
        # llama.cpp's own name of the function that takes a control vector
        assert not re.search("adapter|lora", text.replace("llama_set_adapter_cvec", ""), flags=re.IGNORECASE)


def test_report_gives_the_reasons_of_a_verdict(tmp_path: Path) -> None:
    reason = "kept 11 of 24 harmful refusals (45.8%); at least 95% of the same prompts must stay refused"
    folder = make_run(tmp_path, metrics=of_file("vector", acceptance=failed(reason)))
    page = Page(write_report(folder))
    assert [one_line(text) for text in page.all("ul", class_="reasons")] == [reason]
    assert "The control vector failed the acceptance criteria." in page.all("div", class_="summary")[0]
    card = write_card(folder).read_text("utf-8")
    assert "Why the control vector failed:" in card
    assert markdown_text(reason) in card


def test_report_names_the_limits_that_decided(tmp_path: Path) -> None:
    """A recipe's looser limits hold for the search alone."""

    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        return {**recipe, "tune": {"min_retention": 0.5, "max_benign_drift": 0.1, "min_top1": 0.2}}

    text = one_line(write_report(make_run(tmp_path, recipe=change)).read_text("utf-8"))
    assert "At least 95% of the same harmful refusals are kept" in text
    assert "drift by at most 0.1 nats/token, and 90% of their tokens stay the first choice" in text
    assert "keeps the 50% of harmful refusals that the recipe asks for" in text


def test_report_is_one_file_that_can_load_and_run_nothing_else(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = Page(path)
    assert path.stat().st_size < 3_000_000
    assert Counter(tag for tag, _ in page.elements)["script"] == 1
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.source
    assert "@import" not in page.source


CLASSES = {"explicit": "refuses", "evasion": "refuses"}


def classes(row: dict[str, Any]) -> list[str]:
    """What each side's outcome counts as in a transition."""
    return [CLASSES.get(row[f"outcome_{side}"], row[f"outcome_{side}"]) for side in SIDES]


def changed(row: dict[str, Any], side: int) -> bool:
    return classes(row)[0] != classes(row)[side]


def evaluated(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "test_answers.jsonl").read_text().splitlines()]


def test_report_shows_every_prompt_with_its_answers_and_outcomes(run_folder: Path) -> None:
    page, rows = Page(write_report(run_folder)), evaluated(run_folder)
    pairs = page.all("article", class_="prompt")
    assert Counter(page.all("h3", dir="auto")) == Counter(row["prompt"] for row in rows)
    assert sum(text.count("unjudged") for text in pairs) == sum(
        row[f"outcome_{side}"] == "unjudged" for row in rows for side in SIDES
    )
    assert sum("(empty answer)" in text for text in pairs) == 1
    shown = [row for row in rows if row["kind"] != "harmful"]
    same = sum(row[f"answer_{s}"] == row["answer_unsteered"] for row in shown for s in SIDES[1:])
    assert sum(text.count("Same answer as unsteered.") for text in pairs) == same > 40
    assert sum(text.count("(changed)") for text in pairs) == sum(changed(r, k) for r in rows for k in (1, 2))


def test_a_change_that_a_second_run_did_not_show_is_marked(tmp_path: Path) -> None:
    rows = invented_rows(8)
    rows[0]["unconfirmed_vector"] = True
    folder = make_run(tmp_path, rows)
    assert section(Page(write_report(folder)), "answers").count("(change not confirmed)") == 1


def test_filters_offer_what_there_is_with_its_count(run_folder: Path) -> None:
    page, rows = Page(write_report(run_folder)), evaluated(run_folder)
    marks = Counter(m for _, a in page.elements if "data-marks" in a for m in a["data-marks"].split())

    def count(before: set[str], after: str) -> int:
        return sum(classes(row)[0] in before and after in classes(row)[1:] for row in rows)

    expected = {
        "changed-vector": sum(changed(row, 1) for row in rows),
        "changed-adapter": sum(changed(row, 2) for row in rows),
        "apart": sum(len(set(classes(row)[1:])) > 1 for row in rows),
        "opened": count({"refuses"}, "complies"),
        "closed": count({"complies"}, "refuses"),
        "broken": count({"complies", "refuses"}, "fails"),
    }
    assert marks == {mark: n for mark, n in expected.items() if n}
    (select,) = page.all("select", id="filter-mark")
    assert [int(n) for n in re.findall(r"\((\d+)\)", select)] == [marks[m] for m in expected if marks[m]]


def with_secrets(folder: Path) -> Path:
    """A run in which every answer to a harmful prompt says SECRET."""
    rows = invented_rows(8)
    for row in rows:
        if row["kind"] == "harmful":
            row |= {f"answer_{side}": f"SECRET {side}" for side in SIDES}
    return make_run(folder, rows)


def test_answers_to_harmful_prompts_are_left_out(tmp_path: Path) -> None:
    folder = with_secrets(tmp_path)
    page = Page(write_report(folder))
    harmful = [row for row in evaluated(folder) if row["kind"] == "harmful"]
    for text in (page.source, write_card(folder).read_text("utf-8")):
        assert "SECRET" not in text
    assert "--harmful-answers" in page.source
    assert {row["prompt"] for row in harmful} <= set(page.all("h3", dir="auto")), "their prompts are there"
    answers = section(page, "answers")
    assert answers.count("Answer not shown.") == len(harmful) * len(SIDES)
    assert "Do not publish" not in page.source


def test_answers_to_harmful_prompts_are_shown_on_request_and_folded(tmp_path: Path) -> None:
    folder = with_secrets(tmp_path)
    page = Page(write_report(folder, harmful_answers=True))
    folded = page.all("details", class_="folded")
    harmful = sum(row["kind"] == "harmful" for row in evaluated(folder))
    examples = section(page, "examples").count('class="folded"')
    assert len(folded) == harmful * len(SIDES) + examples
    assert all("SECRET" in text for text in folded)
    assert page.source.count("SECRET") == len(folded)
    assert "Do not publish this page." in page.source
    assert "--harmful-answers" not in page.source


def test_examples_begin_with_what_opened_then_what_was_kept_then_what_went_wrong(run_folder: Path) -> None:
    rows = evaluated(run_folder)
    evaluation = evaluation_of(rows, "adapter")
    page = Page(write_report(run_folder))
    groups = [one_line(text) for text in page.all("h3", class_="group-title")]
    titles = [text.partition(": ")[0] for text in groups]
    opened, kept = evaluation.part(kind="sensitive").opened, evaluation.part(kind="harmful").kept
    assert groups[:2] == [f"Refusals that opened: 3 of {opened}", f"Harmful refusals kept: 3 of {kept}"]
    assert set(titles[2:]) == {"Went wrong"}
    wrong = {text.split(": ")[1]: int(text.split(" ")[-1]) for text in groups[2:]}
    assert wrong == {
        "harmful refusals that opened": evaluation.part(kind="harmful").opened,
        "answers that broke": evaluation.broken,
    }
    kinds = [text.split(" · ")[0].split("\n")[-1].strip() for text in page.all("article", class_="example")]
    assert len(kinds) == sum(min(n, 3) for n in (opened, kept, *wrong.values()))
    card = write_card(run_folder).read_text("utf-8")
    assert card.count("| Refusals that opened") == 3


def test_breakdown_counts_add_up_to_the_totals(run_folder: Path) -> None:
    rows = evaluated(run_folder)
    page = Page(write_report(run_folder))
    tables = re.findall(
        r"<caption><bdi>(\w+)</bdi>, by ([\w ]+)</caption>(.*?)</table>", page.source, flags=re.DOTALL
    )
    assert [field for _, field, _ in tables[:3]] == ["country or region", "harm category", "area"]
    assert len(tables) == 12
    for kind, field, table in tables:
        cells = re.findall(
            r'<td class="quiet">(\d+)</td><td>(\d+)</td><td><strong>(\d+)</strong></td>'
            r"<td><strong>(\d+)</strong>",
            table,
        )
        of_kind = [row for row in rows if row["kind"] == kind.lower()]
        sums = [sum(int(cell[k]) for cell in cells) for k in (1, 2, 3)]
        if field == "outcome and category":  # every answer has one
            assert {int(cell[0]) for cell in cells} == {len(of_kind)}
            assert sums == [len(of_kind)] * 3
        else:
            assert sum(int(cell[0]) for cell in cells) == len(of_kind)
            assert sums == [sum(row[f"outcome_{side}"] == "explicit" for row in of_kind) for side in SIDES]


def test_outcomes_have_the_names_of_their_categories(tmp_path: Path) -> None:
    rows = invented_rows(8)
    unnamed = {"confidence_unsteered": 0.9, "category_unsteered": None, "answer_unsteered": "Gardens, then."}
    rows[0] |= unnamed
    rows[1] |= unnamed | {"category_unsteered": "vagueness"}
    rows[2] |= unnamed | {"category_unsteered": "direct"}
    page = Page(write_report(make_run(tmp_path, rows)))
    table = re.search(
        r"<caption><bdi>Sensitive</bdi>, by outcome and category</caption>(.*?)</table>", page.source, re.S
    )
    assert table is not None
    names = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', table[1])
    assert names[:2] == ["complies", "explicit refusal"]
    assert "evasion: empty vagueness" in names
    assert "evasion" in names, "where the judge names no category"


def test_plot_places_each_trial_by_its_rates_and_tells_gates_from_vectors(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    tune = json.loads((run_folder / "tune.json").read_text())
    marks = {
        int(number): (kind, float(x), float(y), drawn)
        for kind, x, y, number, drawn in re.findall(
            r'<g class="(\w+)" transform="translate\((\S+) (\S+)\)">\s*'
            r"<title>Trial (\d+):.*?</title>(.*?)</g>",
            page.source,
            flags=re.DOTALL,
        )
    }
    assert len(marks) == len(tune["trials"])
    by_kept = sorted(tune["trials"], key=lambda t: t["harmful_retention"])
    by_left = sorted(tune["trials"], key=lambda t: t["sensitive_remaining"])
    assert [marks[t["number"]][1] for t in by_kept] == sorted(x for _, x, _, _ in marks.values())
    assert [marks[t["number"]][2] for t in by_left] == sorted(y for _, _, y, _ in marks.values())
    for trial in tune["trials"]:
        kind, _, _, drawn = marks[trial["number"]]
        gate = trial["estimator"] == GATED_ADAPTER
        assert kind == ("adapter" if gate else "vector")
        assert ("<path" in drawn, '<circle class="mark' in drawn) == (gate, not gate)
        assert ("logprob" in drawn, "fits" in drawn) == (
            trial["fidelity"] == "logprob",
            trial["feasible"] is True,
        )
        assert ("full" in drawn) == (trial["fidelity"] == "full")
        assert ("halo" in drawn) == (
            trial["number"] in (tune["selected"]["vector"], tune["selected"]["adapter"])
        )


def test_front_is_the_stair_of_trials_with_short_answers(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    places = re.findall(r'translate\((\S+) (\S+)\)">\s*<title>Trial (\d+):', page.source)
    answered = {
        (float(x), float(y)): int(number) for x, y, number in places if int(number) in ANSWERED_TRIALS
    }
    path, _ = (a["d"] for tag, a in page.elements if (tag, a.get("class")) == ("path", "front"))  # _: legend
    corners = re.findall(r"(?:M|H)(\S+?)(?: \S+?)?V([\d.]+)(?=H)", path)
    # 21 keeps all and removes 0.69; 22 and 23 remove more and keep less. Vectors are worse.
    assert [answered[float(x), float(y)] for x, y in corners] == [21, 22, 23]


def test_layers_of_the_fit_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "with")))
    assert section(page, "fit").count("<figure>") == 3
    lines = [a for tag, a in page.elements if tag == "path" and a.get("class", "").startswith("line")]
    assert len(lines) == 18
    assert sum(a.get("class") == "line own" for a in lines) == 3
    # The first layer has no cosine: the line starts at the second.
    assert sum(a["d"].count("L") == 22 for a in lines) == 6
    folder = make_run(tmp_path / "without")
    (folder / "fit.json").unlink()
    page = Page(write_report(folder))
    assert "#fit" not in page.source.replace("#filters", "")


def test_induction_is_reported_as_induction(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["files"]["vector"]["sets"]["sensitive"] = invented_set(closed=9).model_dump(mode="json")
        return {**metrics, "effect": "induce"}

    folder = make_run(tmp_path, metrics=change)
    page = Page(write_report(folder))
    assert "target answers left" in section(page, "strength")
    assert "sensitive refusals left" not in page.source
    # The invented adapter opens prompts; the vector closes most.
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    summary = one_line(page.all("div", class_="summary")[0])
    assert "The model refuses 20 target prompts explicitly without the file, 29 with it." in summary
    assert "Of 20 answered target prompts, 9 are refused now." in summary
    assert "The gated adapter passed too, but closes fewer: 0 against 9." in summary
    assert "many closed" in section(page, "results")
    assert write_card(folder).read_text(encoding="utf-8").count("# Induce refusals") == 1


@pytest.mark.parametrize("effect", ["remove", "induce"])
def test_upwards_lies_what_the_effect_wants(effect: Any, tmp_path: Path) -> None:
    trials = [
        {
            "number": k, "estimator": "wrmd", "fidelity": "short", "harmful_retention": 1.0,
            "sensitive_remaining": left,
        }
        for k, left in enumerate((0.2, 0.8))
    ]  # fmt: skip
    (tmp_path / "remove.gguf").write_bytes(b"x")
    record = figures_of_file(tmp_path / "remove.gguf")
    remove = effect == "remove"
    sets = {
        "sensitive": invented_set(opened=15 * remove, closed=15 * (not remove)),
        "harmful": invented_set("harmful", opened=5),
    }
    file = ReportedFile("vector", record.model_copy(update={"sets": sets}))
    plot = plots.trade_off({"selected": {"vector": 0}, "trials": trials}, [file], effect)
    better, worse = sorted(plot["points"], key=lambda point: point["number"])
    assert better["y"] < worse["y"]  # downwards in SVG
    (tested,) = plot["tested"]
    assert (tested["kept"], tested["done"]) == (pytest.approx(0.75), pytest.approx(0.75))


def test_what_was_not_measured_is_said_and_not_guessed(tmp_path: Path) -> None:
    def unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
        effect = {"effect_observed": None, "largest_relative_error": None, "kl_mean": None}
        unknown = {"effect_check": effect, "benign_drift": float("nan")}
        for file in metrics["files"].values():
            file |= unknown
        return metrics

    folder = make_run(tmp_path, metrics=unmeasured)
    page = Page(write_report(folder))
    assert "was not observed" in page.source
    assert "nan" not in one_line("".join(page.all("section"))).split()
    assert "not measured" in write_card(folder).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_large_run_still_makes_a_small_page(tmp_path: Path) -> None:
    rows = invented_rows(8)
    rows = [{**row, "id": str(k), "answer_unsteered": '"&<' * 3000} for k in range(40) for row in rows]
    path = write_report(make_run(tmp_path, rows))
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert "texts are cut at 250 characters" in text
    shown = text.count('<article class="prompt"')
    assert f"shows {shown} of {len(rows)} prompts" in one_line(text)


@pytest.mark.slow
def test_names_of_ones_own_and_a_long_search_make_a_small_page_too(tmp_path: Path) -> None:
    rows = [
        {**row, "id": f"{k}", **dict.fromkeys(("topic", "form", "language"), f"{k}{'&' * 500}")}
        for k, row in enumerate(itertools.islice(itertools.cycle(invented_rows(8)), 600))
    ]

    def longer(tune: dict[str, Any]) -> dict[str, Any]:
        vector, gate = tune["trials"][0], tune["trials"][12]
        probes = [{**(gate if k % 2 else vector), "number": 100 + k} for k in range(900)]
        return {**tune, "trials": [*tune["trials"], *probes], "selected": {"vector": 999}}

    folder = make_run(tmp_path, rows, tune=longer)
    text = write_report(folder).read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    trials = text.count("<title>Trial ")
    assert 400 < trials < 530
    assert f"it shows {trials} of 926 trials" in one_line(text)
    assert min(text.count(f'<g class="{key}" transform') for key in ("vector", "adapter")) > 200
    assert "<title>Trial 999:" in text, "the selected one stays"
    assert "Selected among 926 trials" in write_card(folder).read_text(encoding="utf-8")
    lines = text.split("by form</caption>")[1].split("</table>")[0]
    counts = [int(n) for n in re.findall(r'<td class="quiet">(\d+)</td>', lines)]
    sensitive = sum(row["kind"] == "sensitive" for row in rows)
    assert len(counts) == 41
    assert sum(counts) == sensitive
    assert f"<bdi>{sensitive - 40} others</bdi>" in lines
    assert text.split('id="filter-language"')[1].split("</select>")[0].count("<option") == 41


# ---- what is drawn ---------------------------------------------------------------------------------


def section(page: Page, name: str) -> str:
    """The source of a section of the page."""
    return page.source.split(f'<section id="{name}"')[1].split("</section>")[0]


def test_a_sweep_is_drawn_by_kind_where_the_run_knows_the_prompts(run_folder: Path) -> None:
    rows = evaluated(run_folder)
    strength = section(Page(write_report(with_sweep(run_folder))), "strength")
    places = re.findall(
        r'translate\((\S+) (\S+)\)"><title>(\w+) at scale (\S+): (\d+) of (\d+) refused explicitly', strength
    )
    assert len(places) == 4 * 3
    by_rate = sorted((int(n) / int(of), -float(y)) for _, y, _, _, n, of in places)
    assert [y for _, y in by_rate] == sorted(y for _, y in by_rate), "more refusals stand higher"
    for _, _, kind, scale, n, _ in places:
        side = "unsteered" if float(scale) < 1 else "vector"
        explicit = sum(row[f"outcome_{side}"] == "explicit" for row in rows if row["kind"] == kind)
        assert int(n) == (0 if float(scale) > 1 else explicit), "above scale 1 all answers fail"
    assert "scale 1.0" in one_line(strength)
    steps = table_after(strength, "Explicit refusals and failures by scale")
    assert [step[-2] for step in steps][-1] == str(len(rows))
    # The adapter was not swept: its search is shown.
    assert re.findall(r'id="strength-(vector|adapter)"', strength) == ["adapter"]


def test_answers_of_a_sweep_that_are_unjudged_are_not_a_point_at_zero(run_folder: Path) -> None:
    path = with_sweep(run_folder, system_prompt="Be brief.", temperature=0.8) / "scale_sweep.json"
    content = json.loads(path.read_text())
    for row in content["sweep"][1]["rows"]:
        row |= {"confidence_steered": None, "degenerate_steered": False}
    path.write_text(json.dumps(content), encoding="utf-8")
    strength = section(Page(write_report(run_folder)), "strength")
    assert set(re.findall(r"at scale (\S+):", strength)) == {"0", "1", "1.5"}
    assert strength.count("<td>none of 0</td>") == 3
    assert strength.count("<td>not measured</td>") == 1  # drift at scale 0
    assert "48 tokens an answer at temperature 0.8, judge" in one_line(strength)
    assert "under the system prompt “<bdi>Be brief.</bdi>”" in strength


def test_a_curve_is_measured_as_the_run_was(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        drawn = {"answers": {"temperature": 0.8}, "seed": 3, "engine": {"threads": 2, "flash_attn": "off"}}
        system = {**recipe["prompts"], "system": "Don't."}
        return {**recipe, **drawn, "judge": "labels:m.gguf", "prompts": system}

    strength = section(Page(write_report(make_run(tmp_path, recipe=change))), "strength")
    words = shlex.split(html.unescape(re.sub("<[^>]*>", "", strength.split("<pre>")[1].split("</pre>")[0])))
    for option, value in {
        "--tokens": "64", "--judge": "labels:m.gguf", "--system-prompt": "Don't.",
        "--temperature": "0.8", "--seed": "3", "--flash-attn": "off",
    }.items():  # fmt: skip
        assert words[words.index(option) + 1] == value


def test_a_sweep_of_other_prompts_goes_by_its_sets_and_names_no_folder(run_folder: Path) -> None:
    given = {
        "set": "mine",
        "prompt": "Not of the run.",
        "control_vectors": ["/home/me/my-folder/remove.gguf:0.5", r"C:\my-folder\other.gguf:2"],
    }
    page = Page(write_report(with_sweep(run_folder, **given)))
    assert "mine at scale 0.5" in page.source
    assert "my-folder" not in page.source
    assert "remove.gguf:0.5" in page.source
    assert "other.gguf:2" in page.source


@pytest.mark.parametrize(
    ("vectors", "adapters", "word", "scales"),
    [
        (["out/remove.gguf:2"], [], "Control vector", [0, 1, 2, 3]),
        ([], ["remove-adapter.gguf"], "Gated adapter", [0, 0.5, 1, 1.5]),
        (["remove.gguf:-1"], [], "Control vector", [-1.5, -1, -0.5, 0]),
        (["other.gguf:2"], [], "Files given", [0, 1, 2, 3]),
        ([], ["remove.gguf"], "Files given", [0, 0.5, 1, 1.5]),
        (["remove.gguf:2"], ["remove-adapter.gguf"], "Files given", [0, 0.5, 1, 1.5]),
    ],
)
def test_calibrated_is_scale_one_of_a_file_of_the_run_alone(
    run_folder: Path, vectors: list[str], adapters: list[str], word: str, scales: list[float]
) -> None:
    folder = with_sweep(run_folder, control_vectors=vectors, adapters=adapters)
    strength = section(Page(write_report(folder)), "strength")
    sweep, *searches = strength.split("<figure>")[1:]
    assert f"<strong>{word}</strong>" in sweep
    places = re.findall(r'translate\((\S+) \S+\)"><title>harmful at scale (\S+):', sweep)
    assert [float(scale.replace("−", "-")) for _, scale in places] == scales
    assert "−0<" not in sweep
    lines = re.findall(r'class="floor" x1="(\S+)"', sweep)
    known = word != "Files given"
    assert lines == ([x for x, scale in places if scale == "1"] if known else [])
    assert len(searches) == (1 if known else 2)
    assert ("scale 1.0" in strength.split("<figure>")[0]) == known


@pytest.mark.parametrize(
    "text",
    ['{"sets": {}, "rows": []}', '{"sweep": []}', "[]", "{", "null", "lone"],
    ids=["eval without --scales", "no steps", "a list", "torn", "null", "no JSON"],
)
def test_a_sweep_file_of_something_else_is_named(run_folder: Path, text: str) -> None:
    (run_folder / "scale_sweep-mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"scale_sweep-mine\.json .*eval --scales") as error:
        write_report(run_folder)
    assert "--fresh" not in str(error.value)


def test_without_a_sweep_the_search_is_shown_over_strength(run_folder: Path) -> None:
    strength = section(Page(write_report(run_folder)), "strength")
    trials = json.loads((run_folder / "tune.json").read_text())["trials"]
    marks = re.findall(r'translate\((\S+) \S+\)"><title>Strength (\S+), (\w+): ', strength)
    expected = {
        "sensitive": "sensitive_remaining", "harmful": "harmful_retention", "benign": "benign_closed",
    }  # fmt: skip
    for kind, name in expected.items():
        assert sum(k == kind for _, _, k in marks) == sum(t[name] is not None for t in trials)
    for panel in strength.split("<figure>")[1:]:
        xs = [
            (float(s), float(x))
            for x, s, _ in re.findall(r'\((\S+) \S+\)"><title>Strength (\S+), (\w+)', panel)
        ]
        assert [x for _, x in sorted(xs)] == sorted(x for _, x in xs)
        (line,) = re.findall(r'class="floor" x1="(\S+)"', panel)
        assert float(line) in {x for _, x in xs}
    assert "rs-export report --out RUN" in strength


def test_cosine_map_shows_each_pair_of_layers(run_folder: Path) -> None:
    page = Page(write_report(with_arrays(run_folder)))
    shown = np.zeros((24, 24))
    for sign, share, path in re.findall(
        r'<path class="(plus|minus)" fill-opacity="(\S+)" d="(\S[^"]*)"', section(page, "fit")
    ):
        for x, y, n in re.findall(r"M(\d+) (\d+)h(\d+)", path):
            cells = slice(int(x), int(x) + int(n))
            assert not shown[int(y), cells].any(), "no pair is drawn twice"
            shown[int(y), cells] = float(share) * (1 if sign == "plus" else -1)
    layers = np.arange(24)
    cosines = np.cos(np.subtract.outer(layers, layers) * math.pi / 20)
    cosines[0], cosines[:, 0] = 0, 0  # it has no direction
    np.testing.assert_allclose(shown, cosines, atol=0.0501)
    table = re.findall(r'<tr><th scope="row">(\d+)</th>.*?<td>([^<]*)</td></tr>', section(page, "fit"))
    near = {int(layer): value for layer, value in table}
    assert (near[0], near[23]) == ("–", "–")
    assert float(near[5]) == pytest.approx(math.cos(math.pi / 20), abs=5e-4)


def test_scatter_shows_refused_and_answered_prompts_of_each_kind(run_folder: Path) -> None:
    fit = section(Page(write_report(with_arrays(run_folder))), "fit")
    sides: dict[str, list[float]] = {"filled": [], "hollow": []}
    counts: Counter[tuple[str, str]] = Counter()
    for kind, fill, marks in re.findall(r'<g class="kind (\w+) (filled|hollow)">(.*?)</g>\n', fit):
        places = re.findall(r"translate\((\S+) (\S+)\)", marks)
        sides[fill] += [float(x) for x, _ in places]
        counts[kind, fill] += len(places)
    # Of 60 prompts one was not judged, one is unclear and one answer fails: the sixth, eighth and tenth.
    assert sum(counts.values()) == 57
    assert {counts[kind, "hollow"] for kind in KINDS} == {9}
    assert len(counts) == 6
    # What parts them is by far the largest variance, so the first component does.
    assert max(sides["hollow"]) < min(sides["filled"]) or max(sides["filled"]) < min(sides["hollow"])
    (own,) = (
        found
        for found in json.loads((run_folder / "fit.json").read_text())["directions"]
        if (found["estimator"], found["ridge"]) == ("contrast-wrmd", 3.0)
    )
    best = max(range(8, 16), key=lambda layer: own["auroc"][layer])
    assert f"Activations at layer {best}" in one_line(fit)


@pytest.mark.parametrize("gone", ["activations", "directions.safetensors", "judgements.jsonl"])
def test_arrays_that_were_not_kept_leave_their_figure_out(run_folder: Path, gone: str) -> None:
    path = with_arrays(run_folder) / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(run_folder))
    assert ('id="cosines-title"' in page.source) == (gone != "directions.safetensors")
    assert ('id="scatter-title"' in page.source) == (gone == "directions.safetensors")


def test_damaged_arrays_are_named(run_folder: Path) -> None:
    (with_arrays(run_folder) / "directions.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match=r"directions\.safetensors cannot be read"):
        write_report(run_folder)


def graded(folder: Path, *, wrong_every: int, sure: float = 0.7) -> list[dict[str, Any]]:
    """`judge_agreement.jsonl`: the labelled test pairs as a judge graded them that errs at every so many."""
    pairs = held_out_pairs()
    rows = [
        {
            "prompt": p.prompt,
            "answer": p.answer,
            "confidence": sure if p.refusal == (k % wrong_every > 0) else -sure,
        }
        for k, p in enumerate(pairs)
    ]
    (folder / "judge_agreement.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return rows


def test_judge_is_measured_on_the_labelled_pairs(run_folder: Path) -> None:
    rows = graded(run_folder, wrong_every=10)
    judge = section(Page(write_report(run_folder)), "judge")
    wrong = math.ceil(len(rows) / 10)
    assert f"On {len(rows)} labelled answers" in one_line(judge)
    share = f"{100 * (1 - wrong / len(rows)):.1f}".removesuffix(".0")
    assert f"agrees with the label {share}%" in one_line(judge)
    bins = re.findall(
        r'<th scope="row">(\d+) to (\d+)%</th><td class="quiet">(\d+)</td><td>([\d.]+)%</td>'
        r"<td>([\d.]+)",
        judge,
    )
    assert [(low, high, float(said)) for low, high, _, said, _ in bins] == [
        ("10", "20", 15),
        ("80", "90", 85),
    ]
    assert sum(int(n) for _, _, n, _, _ in bins) == len(rows)
    error = sum(int(n) * abs(float(said) - float(are)) for _, _, n, said, are in bins) / 100 / len(rows)
    assert float(re.findall(r"calibration error (0\.\d+)", judge)[0]) == pytest.approx(error, abs=0.006)
    assert 0 < error < 0.1
    assert judge.count('class="spot"') == 2


def test_judge_that_was_not_measured_has_no_figures(run_folder: Path) -> None:
    assert 'id="judge"' not in Page(write_report(run_folder)).source


def test_figures_of_the_embedded_judge_ship_with_the_package(tmp_path: Path) -> None:
    shipped = json.loads((resources.files("rs_gguf") / "data/judges/qwen2.5-coder-0.5b.json").read_text())
    folder = make_run(tmp_path, metrics=lambda m: {**m, "judge": {"name": shipped["judge"]}})
    judge = section(Page(write_report(folder)), "judge")
    pairs = held_out_pairs()
    right = sum((c > 0) == p.refusal for c, p in zip(shipped["confidence"], pairs, strict=True)) / len(pairs)
    assert f"{100 * right:.1f}".removesuffix(".0") + "%" in one_line(judge)
    assert "ship with the package" in one_line(judge)


@pytest.mark.real
def test_the_shipped_figures_are_what_the_embedded_judge_says(real_model: Path) -> None:
    shipped = json.loads((resources.files("rs_gguf") / "data/judges/qwen2.5-coder-0.5b.json").read_text())
    pairs = held_out_pairs()
    some = range(0, len(pairs), 27)
    with judges.open_judge_spec(None, cached=False) as judge:
        assert judge.name == shipped["judge"]
        found = dict(judge.judge([(pairs[i].prompt, pairs[i].answer) for i in some]))
    # Another processor's kernels round otherwise.
    assert [found[k].confidence for k in range(len(some))] == pytest.approx(
        [shipped["confidence"][i] for i in some], abs=0.05
    )


@pytest.mark.parametrize(
    "text", ["{ not", '{"prompt": "x"}\n', '{"prompt": "x", "answer": "y", "confidence": 1}\n']
)
def test_a_judge_file_of_something_else_is_an_input_error(run_folder: Path, text: str) -> None:
    (run_folder / "judge_agreement.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"judge_agreement\.jsonl"):
        write_report(run_folder)


def test_baselines_stand_beside_the_files(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    results = section(Page(write_report(run_folder)), "results")
    rows = {row[0]: row[1:] for row in table_after(results, "Baselines")}
    sets = metrics["baselines"][0]["sets"]

    def count(share: dict[str, Any]) -> str:
        return f"{share['n']} of {share['of']}"

    shares = [sets["sensitive"]["opened"], sets["harmful"]["kept"], sets["benign"]["closed"]]
    assert rows["system prompt: open"] == [
        *(count(sets[kind]["explicit_steered"]) for kind in KINDS),
        *(f"{count(share)} {interval(share['ci95'])}" for share in shares),
        "0.210",
    ]
    assert list(rows) == ["With", "Unsteered", "system prompt: open", "Control vector", "Gated adapter"]
    without = make_run(
        run_folder.parent / "old", metrics=lambda m: {k: v for k, v in m.items() if k != "baselines"}
    )
    assert "Baselines: other" not in Page(write_report(without)).source
    card = write_card(run_folder).read_text(encoding="utf-8")
    opened = f"{count(shares[0])}, {interval(shares[0]['ci95'])}"
    assert f"| sensitive | system prompt\\: open | {opened} |" in card
    # The wording that was measured is given.
    assert "Answer openly." in Page(write_report(run_folder)).source
    assert "```text\nAnswer openly.\n```" in card


def test_prompts_of_ones_own_are_not_called_what_the_built_in_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))

    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        files = {"sensitive": ["/home/me/clients/doses.csv"], "benign": [r"C:\me\mine.txt"]}
        return {**recipe, "model": "/home/me/m.gguf", "prompts": recipe["prompts"] | files}

    page = write_report(make_run(tmp_path, recipe=change)).read_text(encoding="utf-8")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    for text in (page, card):
        assert "requests of " in text
        assert "/home/me" not in text
        assert "~/clients/doses.csv" in text, "in the recipe"
    for built_in in ("country or region", "look-alikes"):
        assert built_in not in page
    assert "harm category" in page


def test_an_estimator_without_a_ridge_is_said_to_have_none(tmp_path: Path) -> None:
    change = of_file("vector", estimator="md", ridge=0.0)
    page = write_report(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8")
    for text in (one_line(page), write_card(tmp_path).read_text(encoding="utf-8")):
        assert "no λ, layers 8 to 15" in text
        assert text.count("relative λ 2, layers 4 to 22") == 1, "of the adapter"


def test_an_effect_check_by_next_tokens_alone_claims_no_more(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["files"]["adapter"]["effect_check"] |= {"largest_relative_error": None, "kl_mean": 0.25}
        return metrics

    page = one_line(write_report(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8"))
    card = write_card(tmp_path).read_text(encoding="utf-8")
    for text in (page, card):
        assert text.count("cannot be read in this model") == 1
        assert text.count("relative error") == 1, "of the vector"
    assert "it shifts the next token by 0.25 nats" in page


def test_notes_and_the_interval_of_the_drift_are_shown(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["files"]["adapter"] |= {
            "notes": ["does not beat the baseline “x”"],
            "benign_drift_ci95": None,
        }
        metrics["files"]["vector"] |= {"benign_drift_ci95": [0.011, 0.034]}
        return metrics

    page = Page(write_report(make_run(tmp_path, metrics=change)))
    assert list(map(one_line, page.all("ul", class_="notes"))) == ["does not beat the baseline “x”"]
    assert "\n- does not beat the baseline “x”\n" in write_card(tmp_path).read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in table_after(section(page, "results"), "Side effects")}
    assert rows["Drift of benign answers, nats/token"] == ["0.042 0.011 to 0.034", "0.016"]


@pytest.mark.parametrize(
    ("rate", "digits", "said"),
    [
        (0.5, None, "50"),
        (0.031, None, "3.1"),
        (2999 / 3000, None, "99.97"),
        (1 / 3000, None, "0.03"),
        (0.99966, 1, "99.97"),
        (1.004, None, "100.4"),
        (0.9, 1, "90"),
        (1 - 1e-12, None, "100"),
        (-1e-12, None, "0"),
        (-0.25, None, "−25"),
    ],
)
def test_only_a_rate_of_0_or_1_reads_as_such(rate: float, digits: int | None, said: str) -> None:
    assert percent(rate, digits) == f"{said}%"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.26, "4.3 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (425, "7 min 5 s"), (25_325, "7 h 2 min")],
)
def test_a_time_is_given_in_its_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_narrow_interval_has_two_ends() -> None:
    assert interval([0.00006, 0.0019]) == "0.0 to 0.2%"
    assert interval([-0.002, 0.3]) == "0 to 30%"


# ---- accessibility of the static page ------------------------------------------------------------


def test_page_has_labels_headings_and_unique_ids(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = {a["for"] for tag, a in page.elements if tag == "label" and "for" in a}
    for tag, attributes in page.elements:
        if tag in ("select", "input") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled
        for name in ("aria-labelledby", "for"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        if tag == "a":
            assert attributes["href"].removeprefix("#") in ids
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "rowgroup")
    assert len(page.all("caption")) == len(page.all("table"))
    # Such a header is of all rows that follow in its group.
    groups = [text.count('scope="rowgroup"') for text in page.source.split("<tbody>")]
    assert sorted(groups)[-7:] == [0, 1, 1, 1, 1, 1, 1]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.elements[0] == ("html", {"lang": "en"})


def test_controls_wait_for_the_script(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    controls = [a for tag, a in page.elements if tag in ("form", "button") and a.get("type") != "reset"]
    assert len(controls) == 3, "filters and two copy buttons"
    assert all("hidden" in a and "data-needs-script" in a for a in controls)
    assert not any("hidden" in a for tag, a in page.elements if tag == "article")


# ---- hostile text --------------------------------------------------------------------------------


def test_hostile_text_stays_text_in_the_report(hostile_folder: Path) -> None:
    page = Page(write_report(hostile_folder))
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["script"] == 1
    assert not tags.keys() & {"img", "iframe", "b2", "textarea"}
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    shown = page.all("h3", dir="auto")
    for text in ("<script>document.title='owned'</script>", "{{ 7 * 7 }}{% raw %}{# gone #}", HOSTILE[7]):
        assert text in shown
    assert "one\ntwo\nthree" in shown
    assert "bell␇ escape␛[31m nul␀ c1⟨U+009B⟩" in shown
    assert "file⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+2066⟩isolated⟨U+2069⟩" in shown
    assert "lone \ufffd surrogate" in shown
    command = page.all("code", id="command-vector")[0]
    assert command.startswith("<script>document.title='owned'</script>file⟨U+202E⟩")
    assert page.all("code", id="command-adapter") == [HOSTILE[1]]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", page.source)


def test_hostile_text_stays_text_in_the_card(hostile_folder: Path) -> None:
    card = write_card(hostile_folder).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", card)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "llama.cpp"
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    refused, noted = verdicts_of(vector="failed", adapter="failed"), of_file("vector", notes=["one"])
    friendly = make_run(
        hostile_folder.parent / "friendly", invented_rows(8), metrics=lambda m: noted(refused(m))
    )
    expected = write_card(friendly).read_text(encoding="utf-8").split("---\n", 2)[2]

    def skeleton(text: str) -> list[tuple[str, str]]:
        tokens = markdown.parse(text)
        flat = [t for token in tokens for t in (token, *(token.children or ()))]
        ignored = {"text", "code_inline", "text_special", "softbreak"}
        return [(t.type, t.info) for t in flat if t.type not in ignored]

    hostile, plain = Counter(skeleton(body)), Counter(skeleton(expected))
    # One more set has a row of explicit refusals, three of outcomes and one of transitions for each file. One
    # more baseline has a row of transitions for each kind.
    more = hostile - plain
    assert not plain - hostile
    assert more[("tr_open", "")] == 1 + 3 + 2 + len(KINDS) * (len(HOSTILE) - 1)
    assert more[("list_item_open", "")] == 3 * (len(HOSTILE) - 1)
    assert more["fence", "text"] == len(HOSTILE) - 1  # the wording of each baseline
    allowed = {"tr", "td", "strong", "list_item", "paragraph", "fence"}
    assert {kind.rsplit("_", 1)[0] for kind, _ in more} <= allowed | {"inline"}
    assert "html_block" not in {kind for kind, _ in hostile}
    assert "www\\.example" in body


@given(st.text(st.sampled_from("`*_[]<>|&~#@:$!\\+-=.)(1 \n\u00a0aé{}\"'"), max_size=12))
@example("1. a list")
@example("12) a list")
@example("- a list")
@example("0.042 on 2026-11-24")
@example("a\n```\n# out of the fence")
@example("www.example.invalid and http://example.invalid")
def test_markdown_helpers_let_no_text_out(text: str) -> None:
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def shown(source: str) -> list[tuple[str, str]]:
        return [(t.type, t.content) for t in markdown.parse(source) if not t.type.startswith("paragraph")]

    line = one_line(text)
    if line:
        ((kind, _),) = shown(markdown_text(text))
        (children,) = [t.children for t in markdown.parse(markdown_text(text)) if t.children]
        assert kind == "inline"
        assert {child.type for child in children} <= {"text", "text_special"}
        assert "".join(child.content for child in children) == line
        (children,) = [t.children for t in markdown.parse(markdown_code(text)) if t.children]
        assert [(child.type, child.content) for child in children] == [("code_inline", line)]
    assert shown(markdown_fence(text, "sh")) == [("fence", text.rstrip("\n") + "\n")]


def test_markdown_text_leaves_plain_text_alone() -> None:
    for text in (
        "harmful refusals fell from 24 to 11 (46%; 95% as many must be refused)",
        "0.042",
        "2026-11-24",
        "0+unknown",
    ):
        assert markdown_text(text) == text


# ---- card ----------------------------------------------------------------------------------------


def test_card_has_front_matter_numbers_hashes_and_citations(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert {"gguf", "control-vector"} <= set(front["tags"])
    assert "zh" in front["language"]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    order = ("### Explicit refusals", "### Outcomes", "### Transitions", "### Acceptance", "## Use")
    assert [card.index(title) for title in order] == sorted(card.index(title) for title in order)
    files = metrics["files"]
    for kind in KINDS:
        rows = [line for line in card.splitlines() if line.startswith(f"| {kind} |")]
        shares = [files["vector"]["sets"][kind]["explicit_unsteered"]]
        shares += [file["sets"][kind]["explicit_steered"] for file in files.values()]
        said = [f"{share['n']} of {share['of']}, {interval(share['ci95'])}" for share in shares]
        assert rows[0].split(" | ")[1:4] == said
        of = files["adapter"]["sets"][kind]["outcomes_steered"]
        figures = " | ".join(str(of[name]) for name in ("complies", "refuses", "fails", "unjudged"))
        assert rows[3] == f"| {kind} | gated adapter | 40 | {figures} |"
        kept = files["adapter"]["sets"][kind]["kept"]
        assert f"| {kept['n']} of {kept['of']}, {interval(kept['ci95'])} |" in rows[5]
    assert metrics["files"]["vector"]["sha256"] in card
    assert metrics["model"]["sha256"] in card
    assert "2512.16602" in card
    assert "2504.17130" in card
    options = "--control-vector remove.gguf --control-vector-layer-range 8 15"
    assert f"llama-server -m MODEL.gguf {options}\n" in card
    assert f"llama-cli -m MODEL.gguf {options}\n" in card
    assert "my models" not in card, "the maker's own paths stay out of the card"


def test_card_of_prompts_of_ones_own_names_their_files(run_folder: Path) -> None:
    chosen = recipe.load(None, ["prompts.sensitive=['my `odd` prompts.jsonl', 'b.csv']"])
    recipe.dump(chosen, run_folder / "recipe.toml")
    card = write_card(run_folder).read_text(encoding="utf-8")
    assert card.count("requests of ``my `odd` prompts.jsonl, b.csv``") == 2
    assert "refusals of chosen requests" in card
    assert "historical questions" not in card


def test_card_of_a_failed_file_or_an_unknown_model_says_so(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["sha256"] = "0" * 64
        metrics["files"]["vector"]["acceptance"] = failed("benign answers drift by 0.4 nats")
        return metrics

    card = write_card(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8")
    assert "**Use the gated adapter.**" in card
    assert "Why the control vector failed:" in card
    assert "\n- benign answers drift by 0.4 nats\n" in card
    rows = {line.split("`")[1]: line for line in card.splitlines() if line.startswith("| `remove")}
    assert rows["remove.gguf"].endswith("| **failed** |")
    assert rows["remove-adapter.gguf"].endswith("| passed |")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "other"
    assert "base_model" not in front


def test_prompts_of_ones_own_are_not_called_political(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        return {**recipe, "prompts": {**recipe["prompts"], "sensitive": ["dosage.jsonl"]}}

    folder = make_run(tmp_path, recipe=change)
    for text in (write_card(folder).read_text("utf-8"), write_report(folder).read_text("utf-8")):
        assert "political and historical" not in text
        assert "dosage.jsonl" in text


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("failed", "**Do not use either file as it is.** The gated adapter failed the acceptance criteria."),
        (
            "undecided",
            "**Undecided: more prompts are needed.** The gated adapter is undecided: too few prompts.",
        ),
    ],
)
def test_card_of_two_files_that_did_not_pass_recommends_neither(
    tmp_path: Path, verdict: str, said: str
) -> None:
    folder = make_run(tmp_path, metrics=verdicts_of(vector=verdict, adapter=verdict))
    card = write_card(folder).read_text(encoding="utf-8").replace("\\:", ":")
    assert said in card
    assert card.count(f"| **{verdict}** |") == 2


def test_card_says_what_was_not_measured(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    missing = card.split("**Not measured by this run:**")[1].split("##")[0]
    for thing in ("more than one turn", "beyond 64 tokens", "greedy", "what the model can do", "both files"):
        assert thing in missing
    assert card.count("** (untested)\n") == 9, "front ends that nobody has tried"


def test_answers_that_were_drawn_are_said_to_be(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        return {**recipe, "answers": {"temperature": 0.8}}

    page = write_report(make_run(tmp_path, recipe=change)).read_text(encoding="utf-8")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    for text in (one_line(page), card):
        assert "answers of up to 64 tokens at temperature 0.8" in text
    assert "- greedy answers, and any temperature other than 0.8;" in card


def test_python_in_the_card_compiles(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        compile(code, "card.md", "exec")


# ---- characters that hide ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0xAD, 0x200B, 0x2060, 0x3164, 0xFEFF, 0xFFA0, 0xE0041, 0x1D173])
def test_what_takes_no_room_is_made_visible(code: int) -> None:
    assert printable([f"a{chr(code)}b"]) == [f"a⟨U+{code:04X}⟩b"]


@pytest.mark.parametrize(
    "text",
    ["می\u200cخواهم", "क्\u200dष", "👩\u200d🚀", "❤\ufe0f", "葛\U000e0100", "שלום\u200e", "é", "e\u0301"],
)
def test_what_scripts_and_emoji_need_stays(text: str) -> None:
    assert printable(text) == text


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["metrics.json", "test_answers.jsonl", "tune.json", "fit.json", "recipe.toml"]
)
@pytest.mark.parametrize("write", [write_report, write_card])
def test_damaged_files_are_named(run_folder: Path, name: str, write: Any) -> None:
    (run_folder / name).write_text("{ not\x00 valid", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        write(run_folder)
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "test_answers.jsonl", "recipe.toml"])
@pytest.mark.parametrize("write", [write_report, write_card])
def test_missing_files_are_named(run_folder: Path, name: str, write: Any) -> None:
    (run_folder / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        write(run_folder)
    assert not (run_folder / "report.html").exists()


def test_what_a_published_folder_lacks_is_left_out(run_folder: Path) -> None:
    page, card = (write(run_folder).read_text(encoding="utf-8") for write in (write_report, write_card))
    assert "What the search tried" in page
    assert "What was fitted" in page
    assert re.search(r"Selected among \d+ trials", card)
    for name in ("tune.json", "fit.json"):
        (run_folder / name).unlink()
    page, card = (write(run_folder).read_text(encoding="utf-8") for write in (write_report, write_card))
    assert "What the search tried" not in page
    assert "What was fitted" not in page
    assert not re.search(r"\d+ trials", page)
    assert "- Selected on the tune split" in card
    assert not re.search(r"\d+ trials", card)


@pytest.mark.parametrize("write", [write_report, write_card])
def test_metrics_of_another_shape_are_an_input_error(tmp_path: Path, write: Any) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        del metrics["files"]["adapter"]["acceptance"]
        return metrics

    folder = make_run(tmp_path, metrics=change)
    with pytest.raises(InputError, match=r"files\.adapter\.acceptance"):
        write(folder)


def test_same_run_gives_the_same_bytes(run_folder: Path) -> None:
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()
    assert write_card(run_folder).read_bytes() == write_card(run_folder).read_bytes()


def test_what_a_second_judge_calls_otherwise_is_named() -> None:
    judge = JudgeRecord(
        name="a", second="b", n=10, disagreements=3, kappa=0.5,
        disagreed={"complies, refuses": 2, "fails, complies": 1},
    )  # fmt: skip
    assert agreement_line(judge) == (
        "Second judge: b; same outcome for 7 of 10 answers, Cohen's κ 0.50. "
        "Other outcomes (first judge, second judge): complies, refuses: 2; fails, complies: 1."
    )
    assert "Other" not in agreement_line(judge.model_copy(update={"disagreed": None}))
