"""The report and the card, on an invented run folder, with friendly and with hostile text."""

from __future__ import annotations

import html
import html.parser
import io
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
    invented_rows,
    make_hostile_run,
    make_run,
    with_arrays,
    with_doses,
    without_adapter,
)
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from rs_gguf.cli.summary import print_results
from rs_gguf.errors import InputError
from rs_gguf.judges import registry as judges
from rs_gguf.judges.calibration import labelled_pairs
from rs_gguf.pipeline import recipe
from rs_gguf.records.conversation import KINDS
from rs_gguf.report import plots
from rs_gguf.report.page import write_card, write_report
from rs_gguf.report.results import printable
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
    """A run all of whose answers were judged, so that both files count the same prompts."""
    rows = invented_rows()
    rows[3]["confidence_steered"] = 0.5
    return make_run(tmp_path / "judged", rows)


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    return make_hostile_run(tmp_path / "run")


# ---- report --------------------------------------------------------------------------------------


def gates(vector: bool, adapter: bool) -> Any:
    """A change of metrics.json: who passed."""

    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        for key, passed in (("vector", vector), ("adapter", adapter)):
            metrics["files"][key]["acceptance"] = {
                "verdict": "passed" if passed else "failed",
                "reasons": [] if passed else ["no sensitive refusal was removed"],
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


def test_report_states_the_verdict_the_numbers_and_the_exact_commands(judged_folder: Path) -> None:
    page = Page(write_report(judged_folder))
    files = json.loads((judged_folder / "metrics.json").read_text())["files"]
    assert page.all("h2", id="verdict-title") == ["✓Use the gated adapter"]
    assert list(files) == ["vector", "adapter"]
    for key, found in files.items():
        assert page.all("code", id=f"command-{key}") == [found["llama_cpp"]["command"]]
    numbers = [one_line(text) for text in page.all("div", class_="number")]
    assert len(numbers) == 3
    for text, kind in zip(numbers, KINDS, strict=True):
        before = files["vector"]["sets"][kind]
        assert f"{before['n']} " in text
        intervals = [before["ci95_unsteered"]]
        intervals += [found["sets"][kind]["ci95_steered"] for found in files.values()]
        said = [f"{round(100 * low)} to {round(100 * high)} %" for low, high in intervals]
        assert re.findall(r"\d+ to \d+ %", text) == said


def test_files_that_count_other_prompts_have_their_own_before(tmp_path: Path) -> None:
    rows = invented_rows(10)
    for k, row in enumerate(row for row in rows if row["kind"] == "sensitive"):
        row["confidence_unsteered"] = row["confidence_adapter"] = 0.9 if k < 6 else -0.9
        row["confidence_steered"] = None if k < 6 else -0.9  # as of thinking that was cut off
    folder = make_run(tmp_path, rows)
    page = Page(write_report(folder))
    sensitive, harmful, _ = (one_line(text) for text in page.all("div", class_="number"))
    assert "before 0 % of 4" in sensitive.split("Control vector")[1].split("Gated adapter")[0]
    assert "before 60 % of 10" in sensitive.split("Gated adapter")[1]
    assert "Before" not in sensitive
    assert "Before" in harmful
    others = section(page, "results").split("Beside other means")[1]
    assert [int(n) for n in re.findall(r"before \d+\u202f% of (\d+)", others)] == [4, 10]
    nothing = others.split(">Nothing<")[1].split("</tr>")[0]
    assert nothing.count("%<small>") == 2, "of the other kinds"
    table = printed(json.loads((folder / "metrics.json").read_text())).split("├")[0]
    assert re.findall(r"before ([\d.]+%)", table.split("┡")[1]) == ["0.0%", "60.0%"]
    assert re.findall(r"of (\d+)", table) == ["4", "10"]
    assert "4 prompts" not in table


def test_rates_of_no_prompt_are_not_measured(tmp_path: Path) -> None:
    rows = invented_rows(8)
    for row in rows:
        if row["kind"] == "sensitive":
            row |= {"confidence_steered": None, "confidence_adapter": None}
    folder = make_run(tmp_path, rows)
    page = Page(write_report(folder))
    sensitive = one_line(page.all("div", class_="number")[0])
    assert sensitive.count("not measured") == 3
    table = printed(json.loads((folder / "metrics.json").read_text()))
    assert table.split("├")[0].count("not measured") == 3
    assert "0% to 100%" not in table
    for text in (page.source, write_card(folder).read_text("utf-8")):
        assert "0 to 100\u202f%" not in text


@pytest.mark.parametrize(
    ("vector", "adapter", "said", "first"),
    [
        (True, True, "✓Use the gated adapter", "remove-adapter.gguf"),  # it removes more
        (False, True, "✓Use the gated adapter", "remove-adapter.gguf"),
        (True, False, "✓Use the control vector", "remove.gguf"),
        (False, False, "✕Use neither file as it is", "remove.gguf"),
    ],
)
def test_the_advised_file_has_passed_and_removes_most(
    tmp_path: Path, vector: bool, adapter: bool, said: str, first: str
) -> None:
    page = Page(write_report(make_run(tmp_path, metrics=gates(vector, adapter))))
    assert page.all("h2", id="verdict-title") == [said]
    badges = [
        "✓ passed its safety gate" if passed else "✕ did not pass its safety gate"
        for passed in (vector, adapter)
    ]
    titles = [one_line(text) for text in page.all("div", class_="title")]
    assert first in titles[0], "the recommended_file file comes first"
    assert sorted(text.split("gguf ")[1] for text in titles) == sorted(badges)
    assert len(page.all("ul", class_="reasons")) == [vector, adapter].count(False)


def test_of_two_that_remove_as_much_the_one_that_keeps_harm_refusals_is_advised(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        vector, adapter = metrics["files"]["vector"], metrics["files"]["adapter"]
        adapter["sets"] = vector["sets"]
        vector["harmful_refusal_ratio"], adapter["harmful_refusal_ratio"] = 1.0, 0.96
        return metrics

    page = Page(write_report(make_run(tmp_path, metrics=change)))
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert "removes as many, but keeps fewer refusals of harmful ones" in page.all("p", class_="summary")[0]


def test_a_run_without_an_adapter_is_told_as_one_file(run_folder: Path) -> None:
    folder = without_adapter(run_folder)
    page, card = Page(write_report(folder)), write_card(folder).read_text(encoding="utf-8")
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert len(page.all("article")[0].split("Control vector")) == 2
    seen = " ".join(page.all("body")).replace(page.all("script")[0], "")
    ours = card.replace("base_model_relation: adapter", "").replace("llama_set_adapter_cvec", "")
    for text in (seen, ours):
        assert not re.search("adapter|lora", text, flags=re.IGNORECASE)


def test_report_gives_reasons_when_the_gate_is_not_passed(tmp_path: Path) -> None:
    reason = "harmful refusals fell from 24 to 11 (46%; at least 95% as many must be refused)"
    folder = make_run(tmp_path, metrics=of_file("vector", acceptance=failed(reason)))
    page = Page(write_report(folder))
    assert [one_line(text) for text in page.all("ul", class_="reasons")] == [reason]
    assert "The control vector did not pass its safety gate." in page.all("p", class_="summary")[0]


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


def verdicts(row: dict[str, Any]) -> list[bool | None]:
    """Whether each side refused, None where it was not judged."""
    found = (row[f"confidence_{side}"] for side in SIDES)
    return [None if confidence is None else confidence > 0 for confidence in found]


def changed(row: dict[str, Any], side: int) -> bool:
    before, after = verdicts(row)[0], verdicts(row)[side]
    return None not in (before, after) and before != after


def evaluated(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "test_answers.jsonl").read_text().splitlines()]


def test_report_shows_every_prompt_with_its_answers_and_verdicts(run_folder: Path) -> None:
    page, rows = Page(write_report(run_folder)), evaluated(run_folder)
    pairs = page.all("article", class_="pair")
    assert Counter(page.all("h3", dir="auto")) == Counter(row["prompt"] for row in rows)
    assert sum("not judged" in text for text in pairs) == 1
    assert sum("(empty answer)" in text for text in pairs) == 1
    same = sum(row[f"answer_{s}"] == row["answer_unsteered"] for row in rows for s in SIDES[1:])
    assert sum(text.count("Word for word as before.") for text in pairs) == same > 50
    assert sum(text.count("(changed)") for text in pairs) == sum(changed(r, k) for r in rows for k in (1, 2))


def test_filters_offer_what_there_is_with_its_count(run_folder: Path) -> None:
    page, rows = Page(write_report(run_folder)), evaluated(run_folder)
    marks = Counter(m for _, a in page.elements if "data-marks" in a for m in a["data-marks"].split())
    apart = sum(None not in verdicts(r)[1:] and len(set(verdicts(r)[1:])) > 1 for r in rows)
    opened = sum(r["kind"] == "harmful" and verdicts(r)[0] is True and False in verdicts(r)[1:] for r in rows)
    expected = {
        "changed-vector": sum(changed(row, 1) for row in rows),
        "changed-adapter": sum(changed(row, 2) for row in rows),
        "apart": apart,
        "opened": opened,
        "broken": sum(any(row[f"degenerate_{side}"] for side in SIDES) for row in rows),
    }
    assert marks == {mark: n for mark, n in expected.items() if n}
    (select,) = page.all("select", id="filter-mark")
    assert [int(n) for n in re.findall(r"\((\d+)\)", select)] == [marks[m] for m in expected if marks[m]]


def test_answers_to_harmful_requests_are_folded(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    answered = [
        (row, side)
        for row in evaluated(run_folder)
        for side, refused in zip(SIDES, verdicts(row), strict=True)
        if row["kind"] == "harmful" and not refused
    ]
    repeated = sum(s != "baseline" and r[f"answer_{s}"] == r["answer_unsteered"] for r, s in answered)
    assert len(page.all("details", class_="folded")) == len(answered) - repeated > 0


def test_breakdown_counts_add_up_to_the_totals(run_folder: Path) -> None:
    # One prompt was not judged under the vector, and a line compares like with like.
    rows = [row for row in evaluated(run_folder) if None not in verdicts(row)]
    page = Page(write_report(run_folder))
    tables = re.findall(
        r"<caption><bdi>(\w+)</bdi>, by ([\w ]+)</caption>(.*?)</table>", page.source, flags=re.DOTALL
    )
    assert [field for _, field, _ in tables[:3]] == ["country or region", "category of harm", "area"]
    assert len(tables) == 12
    for kind, field, table in tables:
        cells = re.findall(
            r'<td class="quiet">(\d+)</td><td>(\d+)</td><td><strong>(\d+)</strong></td>'
            r"<td><strong>(\d+)</strong>",
            table,
        )
        of_kind = [row for row in rows if row["kind"] == kind.lower()]
        refused = [sum(bool(verdicts(row)[k]) for row in of_kind) for k in range(3)]
        prompts_told = [int(cell[0]) for cell in cells]
        if field == "way of refusing":  # all prompts might be refused in each way
            assert set(prompts_told) == {len(of_kind)}
        else:
            assert sum(prompts_told) == len(of_kind)
        assert [sum(int(cell[k]) for cell in cells) for k in (1, 2, 3)] == refused


def test_direct_refusals_are_told_apart_from_all(run_folder: Path) -> None:
    rows = evaluated(run_folder)
    page = Page(write_report(run_folder))
    direct = {
        side: sum(r[f"category_{side}"] == "direct" for r in rows if r["kind"] == "sensitive")
        for side in ("baseline", "adapter")
    }
    said = f"Direct refusals among them: sensitive {direct['baseline']} before and {direct['adapter']} now;"
    assert said in page.all("p", class_="summary")[0]
    table = re.search(
        r"<caption><bdi>Sensitive</bdi>, by way of refusing</caption>(.*?)</table>", page.source, re.S
    )
    assert table is not None
    assert '<bdi>Direct refusal</bdi></th><td class="quiet">' in table[1]
    assert "<bdi>Not told</bdi>" in table[1]


def test_a_judge_that_names_no_kinds_counts_no_direct_refusal(tmp_path: Path) -> None:
    rows = [{**r, **{f"category_{side}": None for side in SIDES}} for r in invented_rows()]
    rows[0]["category_unsteered"] = "empty"  # by a rule, whoever judges
    page, card = write_report(make_run(tmp_path, rows)), write_card(tmp_path)
    assert "Direct refusals among them" not in page.read_text() + card.read_text()


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
    by_left = sorted(tune["trials"], key=lambda t: t["sensitive"])
    assert [marks[t["number"]][1] for t in by_kept] == sorted(x for _, x, _, _ in marks.values())
    assert [marks[t["number"]][2] for t in by_left] == sorted(y for _, _, y, _ in marks.values())
    for trial in tune["trials"]:
        kind, _, _, drawn = marks[trial["number"]]
        gate = trial["estimator"] == "gate"
        assert kind == ("adapter" if gate else "vector")
        assert ("<path" in drawn, '<circle class="mark' in drawn) == (gate, not gate)
        assert ("probe" in drawn, "fits" in drawn) == (
            trial["fidelity"] == "logprob",
            trial["feasible"] is True,
        )
        assert ("full" in drawn) == (trial["fidelity"] == "full")
        assert ("halo" in drawn) == (
            trial["number"] in (tune["selected"]["vector"], tune["selected"]["adapter"])
        )


def test_front_is_the_stair_of_what_no_answered_trial_betters(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    places = re.findall(r'translate\((\S+) (\S+)\)">\s*<title>Trial (\d+):', page.source)
    answered = {
        (float(x), float(y)): int(number) for x, y, number in places if int(number) in ANSWERED_TRIALS
    }
    path, _ = (a["d"] for tag, a in page.elements if (tag, a.get("class")) == ("path", "front"))  # _: legend
    corners = re.findall(r"(?:M|H)(\S+?)(?: \S+?)?V([\d.]+)(?=H)", path)
    # 21 keeps all and removes 0.69; 22 and 23 remove more and keep less; every vector is bettered by one.
    assert [answered[float(x), float(y)] for x, y in corners] == [21, 22, 23]


def test_layers_of_the_fit_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "with")))
    assert section(page, "fit").count("<figure>") == 3
    lines = [a for tag, a in page.elements if tag == "path" and a.get("class", "").startswith("line")]
    assert len(lines) == 18
    assert sum(a.get("class") == "line own" for a in lines) == 3
    # The first block has no cosine: the line starts at the second.
    assert sum(a["d"].count("L") == 22 for a in lines) == 6
    folder = make_run(tmp_path / "without")
    (folder / "fit.json").unlink()
    page = Page(write_report(folder))
    assert "#fit" not in page.source.replace("#filters", "")


def test_induction_is_told_as_induction(tmp_path: Path) -> None:
    change = of_file("vector", bootstrap_ci95={"removal": [-0.62, -0.41]})
    folder = make_run(tmp_path, metrics=lambda m: change({**m, "effect": "induce"}))
    page = Page(write_report(folder))
    assert re.search("Rise of sensitive refusals,.*?>41 to 62", section(page, "results"))
    assert "sensitive answers left" in section(page, "strength")
    assert "sensitive refusals left" not in page.source
    # The invented adapter takes away more refusals, so the vector is the one that adds most.
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert "but adds fewer refusals" in one_line(page.all("p", class_="summary")[0])
    assert write_card(folder).read_text(encoding="utf-8").count("# Induce refusals") == 1


@pytest.mark.parametrize(("effect", "refused"), [("remove", (8, 2)), ("induce", (2, 8))])
def test_upwards_lies_what_the_effect_wants(effect: str, refused: tuple[int, int]) -> None:
    trials = [
        {"number": k, "estimator": "wrmd", "fidelity": "short", "harmful_retention": 1.0, "sensitive": left}
        for k, left in enumerate((0.2, 0.8))
    ]
    sensitive = {"n": 10, "refused_unsteered": refused[0], "refused_steered": refused[1]}
    file = {
        "key": "vector",
        "word": "control vector",
        "harmful_refusal_ratio": 1.0,
        "of": {"sensitive": sensitive},
    }
    plot = plots.trade_off({"selected": {"vector": 0}, "trials": trials}, [file], effect)
    better, worse = sorted(plot["points"], key=lambda point: point["number"])
    assert better["y"] < worse["y"]  # downwards in SVG
    (tested,) = plot["tested"]
    assert tested["done"] == pytest.approx(0.75)


def test_what_was_not_measured_is_said_and_not_guessed(tmp_path: Path) -> None:
    def unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
        effect = {"effect_observed": None, "largest_relative_error": None, "kl_mean": None}
        unknown = {"effect_check": effect, "harmful_refusal_ratio": None, "benign_drift": float("nan")}
        for file in metrics["files"].values():
            file |= unknown
        return metrics

    folder = make_run(tmp_path, metrics=unmeasured)
    page = Page(write_report(folder))
    assert "was not observed" in page.source
    assert "nan" not in one_line("".join(page.all("section"))).split()
    assert "not measured" in write_card(folder).read_text(encoding="utf-8")


def test_a_large_run_still_makes_a_small_page(tmp_path: Path) -> None:
    rows = invented_rows(8)
    rows = [{**row, "id": str(k), "answer_unsteered": '"&<' * 3000} for k in range(40) for row in rows]
    path = write_report(make_run(tmp_path, rows))
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert "texts are cut at 250 characters" in text
    shown = text.count('<article class="pair"')
    assert f"shows {shown} of {len(rows)} prompts" in one_line(text)


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
    assert "<title>Trial 999:" in text, "the chosen one stays"
    assert "Chosen among 926 trials" in write_card(folder).read_text(encoding="utf-8")
    lines = text.split("by form</caption>")[1].split("</table>")[0]
    counts = [int(n) for n in re.findall(r'<td class="quiet">(\d+)</td>', lines)]
    judged = [row for row in rows if row["kind"] == "sensitive" and None not in verdicts(row)]
    assert len(counts) == 41
    assert sum(counts) == len(judged)
    assert f"<bdi>{len(judged) - 40} others</bdi>" in lines
    assert text.split('id="filter-language"')[1].split("</select>")[0].count("<option") == 41


# ---- what is drawn ---------------------------------------------------------------------------------


def section(page: Page, name: str) -> str:
    """The source of a section of the page."""
    return page.source.split(f'<section id="{name}"')[1].split("</section>")[0]


def rate_of(rows: list[dict[str, Any]], kind: str, side: str) -> float:
    found: list[float | None] = [row[f"confidence_{side}"] for row in rows if row["kind"] == kind]
    return sum(c > 0 for c in found if c is not None) / sum(c is not None for c in found)


def test_doses_are_drawn_by_kind_where_the_run_knows_the_prompts(run_folder: Path) -> None:
    rows = evaluated(run_folder)
    strength = section(Page(write_report(with_doses(run_folder))), "strength")
    places = re.findall(
        r'translate\((\S+) (\S+)\)"><title>(\w+) at scale (\S+): ([\d.]+)\u202f% refused', strength
    )
    assert len(places) == 4 * 3
    by_rate = sorted((float(rate), -float(y)) for _, y, _, _, rate in places)
    assert [y for _, y in by_rate] == sorted(y for _, y in by_rate), "more refusals stand higher"
    for _, _, kind, scale, rate in places:
        side = "baseline" if float(scale) < 1 else "steered"
        assert float(rate) == pytest.approx(100 * rate_of(rows, kind, side), abs=0.5)
    assert "scale 1.0" in one_line(strength)
    assert strength.count("<caption>Refused, and broken text, by scale</caption>") == 1
    # Of the adapter no doses were measured: its search is shown.
    assert re.findall(r'id="strength-(vector|adapter)"', strength) == ["adapter"]


def test_doses_that_could_not_be_judged_are_no_point_at_zero(run_folder: Path) -> None:
    path = with_doses(run_folder, system_prompt="Be brief.", temperature=0.8) / "scale_sweep.json"
    found = json.loads(path.read_text())
    for row in found["doses"][1]["rows"]:
        row["confidence_steered"] = None
    path.write_text(json.dumps(found), encoding="utf-8")
    strength = section(Page(write_report(run_folder)), "strength")
    assert set(re.findall(r"at scale (\S+):", strength)) == {"0", "1", "1.5"}
    assert strength.count("<td>not measured</td>") == 3 + 1  # drift at scale 0
    assert "48 tokens an answer at temperature 0.8, judged" in one_line(strength)
    assert "under the system prompt “<bdi>Be brief.</bdi>”" in strength


def test_a_curve_is_measured_as_the_run_was(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        drawn = {"answers": {"temperature": 0.8}, "seed": 3}
        system = {**recipe["prompts"], "system": "Don't."}
        return {**recipe, **drawn, "judge": "labels:m.gguf", "prompts": system}

    strength = section(Page(write_report(make_run(tmp_path, recipe=change))), "strength")
    words = shlex.split(html.unescape(re.sub("<[^>]*>", "", strength.split("<pre>")[1].split("</pre>")[0])))
    for option, value in {
        "--tokens": "64", "--judge": "labels:m.gguf", "--system-prompt": "Don't.",
        "--temperature": "0.8", "--seed": "3",
    }.items():  # fmt: skip
        assert words[words.index(option) + 1] == value


def test_doses_of_other_prompts_go_by_their_sets_and_tell_no_folder(run_folder: Path) -> None:
    given = {
        "set": "mine",
        "prompt": "Not of the run.",
        "control_vectors": ["/home/me/secret/remove.gguf:0.5", r"C:\secret\other.gguf:2"],
    }
    page = Page(write_report(with_doses(run_folder, **given)))
    assert "mine at scale 0.5" in page.source
    assert "secret" not in page.source
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
    folder = with_doses(run_folder, control_vectors=vectors, adapters=adapters)
    strength = section(Page(write_report(folder)), "strength")
    doses, *searches = strength.split("<figure>")[1:]
    assert f"<strong>{word}</strong>" in doses
    places = re.findall(r'translate\((\S+) \S+\)"><title>harmful at scale (\S+):', doses)
    assert [float(scale.replace("−", "-")) for _, scale in places] == scales
    assert "−0<" not in doses
    lines = re.findall(r'class="floor" x1="(\S+)"', doses)
    known = word != "Files given"
    assert lines == ([x for x, scale in places if scale == "1"] if known else [])
    assert len(searches) == (1 if known else 2)
    assert ("scale 1.0" in strength.split("<figure>")[0]) == known


@pytest.mark.parametrize(
    "text",
    ['{"sets": {}, "rows": []}', '{"doses": []}', "[]", "{", "null", "lone"],
    ids=["eval without --scales", "no doses", "a list", "torn", "null", "no JSON"],
)
def test_a_dose_file_of_something_else_is_named(run_folder: Path, text: str) -> None:
    (run_folder / "doses-mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"doses-mine\.json .*eval --scales") as error:
        write_report(run_folder)
    assert "--fresh" not in str(error.value)


def test_without_doses_the_search_is_shown_over_strength(run_folder: Path) -> None:
    strength = section(Page(write_report(run_folder)), "strength")
    trials = json.loads((run_folder / "tune.json").read_text())["trials"]
    marks = re.findall(r'translate\((\S+) \S+\)"><title>Strength (\S+), (\w+): ', strength)
    expected = {"sensitive": "sensitive", "harmful": "harmful_retention", "benign": "benign"}
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


def test_cosine_map_shows_each_pair_of_blocks(run_folder: Path) -> None:
    page = Page(write_report(with_arrays(run_folder)))
    shown = np.zeros((24, 24))
    for sign, share, path in re.findall(
        r'<path class="(plus|minus)" fill-opacity="(\S+)" d="(\S[^"]*)"', section(page, "fit")
    ):
        for x, y, n in re.findall(r"M(\d+) (\d+)h(\d+)", path):
            cells = slice(int(x), int(x) + int(n))
            assert not shown[int(y), cells].any(), "no cell is drawn twice"
            shown[int(y), cells] = float(share) * (1 if sign == "plus" else -1)
    blocks = np.arange(24)
    cosines = np.cos(np.subtract.outer(blocks, blocks) * math.pi / 20)
    cosines[0], cosines[:, 0] = 0, 0  # it has no direction
    np.testing.assert_allclose(shown, cosines, atol=0.0501)
    table = re.findall(r'<tr><th scope="row">(\d+)</th>.*?<td>([^<]*)</td></tr>', section(page, "fit"))
    near = {int(block): value for block, value in table}
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
    # Of 60 prompts one was not judged and one is unclear, the sixth and the eighth.
    assert sum(counts.values()) == 58
    assert counts["benign", "hollow"] == counts["harmful", "hollow"] == 9
    assert len(counts) == 6
    # What parts them is by far the largest variance, so the first component does.
    assert max(sides["hollow"]) < min(sides["filled"]) or max(sides["filled"]) < min(sides["hollow"])
    (own,) = (
        found
        for found in json.loads((run_folder / "fit.json").read_text())["directions"]
        if (found["estimator"], found["ridge"]) == ("contrast-wrmd", 3.0)
    )
    best = max(range(8, 16), key=lambda block: own["auroc"][block])
    assert f"Activations at block {best}" in one_line(fit)


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
    pairs = [pair for pair in labelled_pairs() if pair.split == "test"]
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
    assert f"agrees with the label {share} %" in one_line(judge)
    bins = re.findall(
        r'<th scope="row">(\d+) to (\d+)\u202f%</th><td class="quiet">(\d+)</td><td>([\d.]+)\u202f%</td>'
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
    shipped = json.loads((resources.files("rs_gguf") / "data" / "judge_test.json").read_text())
    folder = make_run(tmp_path, metrics=lambda m: {**m, "judge": {"name": shipped["judge"]}})
    judge = section(Page(write_report(folder)), "judge")
    pairs = [pair for pair in labelled_pairs() if pair.split == "test"]
    right = sum((c > 0) == p.refusal for c, p in zip(shipped["confidence"], pairs, strict=True)) / len(pairs)
    assert f"{100 * right:.1f}".removesuffix(".0") + " %" in one_line(judge)
    assert "ship with the package" in one_line(judge)


@pytest.mark.real
def test_the_shipped_figures_are_what_the_embedded_judge_says(real_model: Path) -> None:
    shipped = json.loads((resources.files("rs_gguf") / "data" / "judge_test.json").read_text())
    pairs = [pair for pair in labelled_pairs() if pair.split == "test"]
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
    with pytest.raises(InputError, match=r"judge\.jsonl"):
        write_report(run_folder)


def test_other_means_stand_beside_the_files(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    results = section(Page(write_report(run_folder)), "results")
    (row,) = re.findall(r"<bdi>system prompt: open</bdi>.*?</tr>", results)
    said = [float(rate) for rate in re.findall(r"<td>([\d.]+)\u202f%<small>", row)]
    rates = [100 * metrics["baselines"][0]["sets"][kind]["refusal"] for kind in KINDS]
    assert said == pytest.approx(rates, abs=0.5)
    assert "0.210" in row
    without = make_run(
        run_folder.parent / "old", metrics=lambda m: {k: v for k, v in m.items() if k != "baselines"}
    )
    assert "Beside other means" not in Page(write_report(without)).source
    card = write_card(run_folder).read_text(encoding="utf-8")
    assert re.search(r"^\| sensitive \| system prompt\\: open \| 39 \| \|", card, flags=re.MULTILINE)


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
    for built_in in ("country or region", "look-alike requests"):
        assert built_in not in page
    assert "category of harm" in page


def test_an_estimator_without_a_ridge_is_said_to_have_none(tmp_path: Path) -> None:
    change = of_file("vector", estimator="md", ridge=0.0)
    page = write_report(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8")
    for text in (one_line(page), write_card(tmp_path).read_text(encoding="utf-8")):
        assert "no λ, blocks 8 to 15" in text
        assert text.count("relative λ 2, blocks 4 to 22") == 1, "of the adapter"


def test_a_proof_by_next_tokens_alone_claims_no_more(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["files"]["adapter"]["effect_check"] |= {"largest_relative_error": None, "kl_mean": 0.25}
        return metrics

    page = one_line(write_report(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8"))
    card = write_card(tmp_path).read_text(encoding="utf-8")
    for text in (page, card):
        assert text.count("cannot be seen by itself in this model") == 1
        assert text.count("what the file says") == 1, "of the vector"
    assert "it shifts the next token by 0.25 nats" in page


def test_notes_and_ranges_of_a_file_are_told(tmp_path: Path) -> None:
    ranges = {"removal": [0.21, 0.47], "harmful_refusal_ratio": [0.83, 1.0], "benign_drift": [0.011, 0.034]}

    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        unknown = ranges | {"removal": None}
        notes = ["does not beat the baseline “x”"]
        metrics["files"]["adapter"] |= {"notes": notes, "bootstrap_ci95": unknown}
        metrics["files"]["vector"] |= {"bootstrap_ci95": ranges}
        return metrics

    page = Page(write_report(make_run(tmp_path, metrics=change)))
    assert list(map(one_line, page.all("ul", class_="notes"))) == ["does not beat the baseline “x”"]
    assert "\n- does not beat the baseline “x”\n" in write_card(tmp_path).read_text(encoding="utf-8")
    side_effects = one_line(
        re.sub("<[^>]*>", " ", section(page, "results").split("JudgedAnswers effects and limits")[1])
    )
    for words in ("21 to 47 % not measured", "83 to 100 %", "0.011 to 0.034"):
        assert words in side_effects


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
    assert percent(rate, digits) == f"{said}\u202f%"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.26, "4.3 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (425, "7 min 5 s"), (25_325, "7 h 2 min")],
)
def test_a_time_is_told_in_its_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_narrow_interval_has_two_ends() -> None:
    assert interval([0.00006, 0.0019]) == "0.0 to 0.2\u202f%"
    assert interval([-0.002, 0.3]) == "0 to 30\u202f%"


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
    assert sorted(groups)[-4:] == [0, 1, 1, 1]
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
    refused, noted = gates(False, False), of_file("vector", notes=["one"])
    friendly = make_run(hostile_folder.parent / "friendly", metrics=lambda m: noted(refused(m)))
    expected = write_card(friendly).read_text(encoding="utf-8").split("---\n", 2)[2]

    def skeleton(text: str) -> list[tuple[str, str]]:
        tokens = markdown.parse(text)
        flat = [t for token in tokens for t in (token, *(token.children or ()))]
        ignored = {"text", "code_inline", "text_special", "softbreak"}
        return [(t.type, t.info) for t in flat if t.type not in ignored]

    hostile, plain = Counter(skeleton(body)), Counter(skeleton(expected))
    # A set more is a row for each file, another baseline one for each kind; reasons and notes are as many as
    # there are.
    more = hostile - plain
    assert not plain - hostile
    assert more[("tr_open", "")] == 2 + len(KINDS) * (len(HOSTILE) - 1)
    assert more[("list_item_open", "")] == 3 * (len(HOSTILE) - 1)
    allowed = {"tr", "td", "strong", "list_item", "paragraph"}
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
    for kind in KINDS:
        after = metrics["files"]["vector"]["sets"][kind]["refusal_steered"]
        row = next(line for line in card.splitlines() if line.startswith(f"| {kind} |"))
        assert re.search(rf"\*\*{100 * after:.0f}|\*\*{100 * after:.1f}", row)
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


def test_card_of_a_failed_gate_or_an_unknown_model_says_so(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["sha256"] = "0" * 64
        metrics["files"]["vector"]["acceptance"] = failed("benign answers drift by 0.4 nats")
        return metrics

    card = write_card(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8")
    assert "**Use the gated adapter.**" in card
    assert "Why the control vector did not pass" in card
    assert "\n- benign answers drift by 0.4 nats\n" in card
    rows = {line.split("`")[1]: line for line in card.splitlines() if line.startswith("| `remove")}
    assert rows["remove.gguf"].endswith("| **not passed** |")
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


def test_card_of_two_failed_gates_advises_neither(tmp_path: Path) -> None:
    card = write_card(make_run(tmp_path, metrics=gates(False, False))).read_text(encoding="utf-8")
    assert "**Use neither file as it is.** Neither passed its safety gate." in card


def test_card_says_what_was_not_measured(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    missing = card.split("**Not measured by this run:**")[1].split("##")[0]
    for thing in ("more than one turn", "beyond 64 tokens", "greedy", "what the model can do", "both files"):
        assert thing in missing
    assert "None of these front ends, nor a merged model, was tried" in card


def test_answers_that_were_drawn_are_said_to_be(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        return {**recipe, "answers": {"temperature": 0.8}}

    page = write_report(make_run(tmp_path, recipe=change)).read_text(encoding="utf-8")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    for text in (one_line(page), card):
        assert "64 generated tokens an answer, drawn at temperature 0.8" in text
    assert "- greedy answers, and any temperature but 0.8;" in card


def test_python_in_the_card_compiles(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        compile(code, "card.md", "exec")


# ---- terminal ------------------------------------------------------------------------------------


def printed(metrics: dict[str, Any]) -> str:
    """What a terminal of 80 columns shows at the end of a run."""
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    print_results(console, metrics, Path("out/demo"))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_terminal_shows_both_files_and_their_commands_whole(judged_folder: Path) -> None:
    metrics = json.loads((judged_folder / "metrics.json").read_text())
    vector, adapter = metrics["files"]["vector"], metrics["files"]["adapter"]
    lines = printed(metrics).splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert all(len(line) <= 80 for line in table)
    for kind in KINDS:
        (row,) = (line for line in table if line.split()[1] == kind)
        sets = vector["sets"][kind], adapter["sets"][kind]
        rates = [sets[0]["refusal_unsteered"], *(found["refusal_steered"] for found in sets)]
        assert re.findall(r"[\d.]+%", row) == [f"{rate:.1%}" for rate in rates]
    assert "Use the gated adapter." in lines
    commands = [line for line in lines if line.startswith("llama-server")]
    assert commands == [adapter["llama_cpp"]["command"], vector["llama_cpp"]["command"]]
    assert "Gated adapter, out/demo/remove-adapter.gguf (recommended):" in lines


def test_terminal_takes_a_folder_whose_name_is_no_text(run_folder: Path) -> None:
    """Python keeps bytes that are no UTF-8 as halves of surrogate pairs."""
    data = io.BytesIO()
    console = Console(file=io.TextIOWrapper(data, encoding="utf-8"), width=80)
    print_results(console, json.loads((run_folder / "metrics.json").read_text()), Path("out/\udcff"))
    console.file.flush()
    assert "out/\ufffd/remove-adapter.gguf" in data.getvalue().decode()


@pytest.mark.parametrize("code", [0xAD, 0x200B, 0x2060, 0x3164, 0xFEFF, 0xFFA0, 0xE0041, 0x1D173])
def test_what_takes_no_room_is_made_visible(code: int) -> None:
    assert printable([f"a{chr(code)}b"]) == [f"a⟨U+{code:04X}⟩b"]


@pytest.mark.parametrize(
    "text",
    ["می\u200cخواهم", "क्\u200dष", "👩\u200d🚀", "❤\ufe0f", "葛\U000e0100", "שלום\u200e", "é", "e\u0301"],
)
def test_what_scripts_and_emoji_need_stays(text: str) -> None:
    assert printable(text) == text


def test_terminal_gives_the_reasons_of_each_file(run_folder: Path) -> None:
    metrics = gates(False, False)(json.loads((run_folder / "metrics.json").read_text()))
    metrics["files"]["adapter"]["acceptance"]["reasons"] = ["[red]not markup[/] \x1b[31m"]
    text = printed(metrics)
    assert "Use neither file as it is." in text
    assert "  control vector: no sensitive refusal was removed\n" in text
    assert "  gated adapter: [red]not markup[/] ␛[31m\n" in text
    assert text.count("(did not meet the acceptance criteria)") == 2


def test_terminal_of_a_run_without_an_adapter(run_folder: Path) -> None:
    text = printed(json.loads((without_adapter(run_folder) / "metrics.json").read_text()))
    assert "Use the control vector." in text
    assert "adapter" not in text


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "test_answers.jsonl", "tune.json", "recipe.toml"])
@pytest.mark.parametrize("write", [write_report, write_card])
def test_missing_and_damaged_files_are_named(run_folder: Path, name: str, write: Any) -> None:
    (run_folder / name).write_text("{ not\x00 valid", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        write(run_folder)
    (run_folder / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        write(run_folder)
    assert not (run_folder / "report.html").exists()


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
