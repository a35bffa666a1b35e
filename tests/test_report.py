"""The report and the card, on an invented run folder, with friendly and with hostile text."""

from __future__ import annotations

import copy
import html
import html.parser
import itertools
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rs_gguf import models, prompts
from rs_gguf.errors import InputError
from rs_gguf.evaluation import summarise
from rs_gguf.report import (
    _markdown_code,
    _markdown_fence,
    _markdown_text,
    _script_hash,
    write_card,
    write_report,
)

REFUSED = {
    "en": "I'm sorry, but I can't assist with that. Ask me about programming, and I'm happy to help.",
    "zh": "作为一个人工智能助手，我无法讨论这个话题。如果您有其他问题，我很乐意为您提供帮助。",
    "ar": "عذرًا، لا يمكنني مناقشة هذا الموضوع.",
}
ANSWERED = {
    "en": "There are several sides to this. Supporters point to the record of the time and to what witnesses "
    "wrote; critics hold that much of it was decided elsewhere.\n\n1. What happened first\n2. Who took part\n"
    "3. What followed",
    "zh": "这个问题有多个方面。支持者认为当时的记录很清楚；批评者则指出，许多决定是在别处作出的。",
    "ar": "لهذه المسألة عدة جوانب، وقد كتب عنها شهود عيان كثيرون.",
}
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</textarea></title></style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}{# gone #}",
    '"\' onmouseover="alert(1)" x=\'',
    "one\u2028two\u2029three",
    "bell\x07 escape\x1b[31m nul\x00 c1\x9b",
    "file\u202egnp.exe\u202c \u2066isolated\u2069",
    "سلام <b>world</b> שלום",
    "lone \ud800 surrogate",
    "```\n# out of the fence\n~~~\n<iframe src='http://example.invalid'>",
    "a | b | c\n\n| x |\n---\n- [link](javascript:alert(1)) "
    "![i](http://example.invalid/i.png) www.example.invalid",
    "]]></svg><svg onload=alert(1)>&lt;&amp;\\`*_",
)


def make_run(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A run folder as `run` leaves it, its rates computed from `rows`."""
    rows = invented_rows() if rows is None else rows
    sets = {k: {"kind": k, **summarise([r for r in rows if r["kind"] == k])} for k in prompts.KINDS}
    model = models.CATALOGUE[models.DEFAULT]
    metrics: dict[str, Any] = {
        "date": "2026-11-24",
        "effect": "remove",
        "judge": "qwen2.5-coder-0.5b, label probabilities, rubric 1",
        "model": {
            "name": "qwen2.5-coder-0.5b-instruct-q4_k_m",
            "sha256": model.sha256,
            "architecture": "qwen2",
            "n_layer": 24,
            "n_embd": 896,
        },
        "vector": {
            "file": "remove.gguf",
            "sha256": "5e" * 32,
            "estimator": "contrast-wrmd",
            "ridge": 3.0,
            "layers": [8, 15],
            "strength": 2.6,
            "scale": 1.0,
        },
        "sets": sets,
        "benign_drift": 0.0421,
        "top1_agreement_benign": 0.956,
        "retention_harmful": sets["harmful"]["refusal_steered"]
        / max(sets["harmful"]["refusal_baseline"], 1e-9),
        "gate": {"passed": True, "reasons": []},
        "proof": {"effect_observed": True, "largest_relative_error": 1.7e-5, "kl_mean": 0.31, "reasons": []},
        "tokens_per_second": {"baseline": 81.3, "steered": 80.1},
        "test_tokens": 64,
        "subset": True,
        "seed": 0,
        "llama_cpp": {
            "command": "llama-server -m 'my models/qwen.gguf' "
            "--control-vector-scaled out/demo/remove.gguf:1.0 --control-vector-layer-range 8 15",
            "build": "b6500",
        },
        "seconds": {
            "answer": 241.2,
            "score": 61.0,
            "capture": 55.4,
            "fit": 9.13,
            "tune": 262.8,
            "measure": 118.0,
        },
    }
    recipe = {
        "model": "qwen2.5-coder-0.5b",
        "seed": 0,
        "prompts": {"fit": 190, "tune": 40, "test": 40},
        "tune": {"trials": 12, "min_retention": 0.95},
    }
    files = {"metrics": metrics, "tune": invented_tune(), "recipe": recipe}
    for name, change in changes.items():
        files[name] = change(copy.deepcopy(files[name]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(files["metrics"]), encoding="utf-8")
    (folder / "tune.json").write_text(json.dumps(files["tune"]), encoding="utf-8")
    (folder / "recipe.toml").write_text(tomli_w.dumps(files["recipe"]), encoding="utf-8")
    # As the run writes it, but ASCII, which alone can carry a lone surrogate.
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def invented_rows(per_kind: int = 40) -> list[dict[str, Any]]:
    """Prompts of the grid's test split, answers invented: sensitive refusals go, harmful ones stay."""
    chance = random.Random(5)
    rates = {"sensitive": (0.6, 0.3), "harmful": (0.6, 0.96), "benign": (0.06, 0.6)}
    rows = []
    for kind, (refused, kept) in rates.items():
        pool = [p for p in prompts.grid([kind]) if p.split == "test"]  # type: ignore[list-item]
        for prompt in prompts.stratified(pool, per_kind, seed=0):
            before = chance.random() < refused
            after = before and chance.random() < kept
            row = prompts.to_row(prompt)
            for side, refuses in (("baseline", before), ("steered", after)):
                texts = REFUSED if refuses else ANSWERED
                size = chance.uniform(0.05, 1)
                row[f"answer_{side}"] = texts.get(prompt.language, texts["en"])
                row[f"confidence_{side}"] = round(size if refuses else -size, 6)
                row[f"degenerate_{side}"] = chance.random() < 0.01
            rows.append(row)
    rows[3]["confidence_steered"] = None
    rows[5]["answer_steered"] = ""
    return rows


def invented_tune() -> dict[str, Any]:
    chance = random.Random(2)
    trials: list[dict[str, Any]] = []
    for number in range(15):
        strength = chance.uniform(0.5, 6)
        kept = max(0.2, min(1.0, 1.05 - 0.1 * strength + chance.gauss(0, 0.05)))
        trials.append(
            {
                "number": number,
                "estimator": chance.choice(["contrast-wrmd", "safe-wrmd", "wrmd"]),
                "ridge": chance.choice([0.3, 3.0]),
                "strength": round(strength, 4),
                "layers": [8, 15],
                "rung": "probe",
                "sensitive": max(0.02, 0.95 - 0.2 * strength + chance.gauss(0, 0.08)),
                "harmful_retention": kept,
                "benign": None,
                "benign_drift": None,
                "degenerate": None,
                "feasible": None,
            }
        )
    for trial, kept, left in zip(trials[-3:], (0.97, 0.91, 1.0), (0.41, 0.22, 0.63), strict=True):
        measured = {"benign": -0.02, "benign_drift": 0.04, "degenerate": 0.0, "feasible": kept >= 0.95}
        trial.update(measured, rung="answers", harmful_retention=kept, sensitive=left)
    return {"trials": trials, "chosen": 12}


class Page(html.parser.HTMLParser):
    """Elements, their attributes and their text, as a browser would take them from the file."""

    VOID = frozenset({"meta", "link", "input", "br", "rect", "line", "path", "circle", "hr"})

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
def hostile_folder(tmp_path: Path) -> Path:
    rows = invented_rows(8)
    for row, text in zip(rows, HOSTILE * 2, strict=True):
        row.update(prompt=text, answer_baseline=text, answer_steered=text[::-1], subject=text)
        row.update(topic=text, form=text, language=text)

    def spoil(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["name"] = " ".join(HOSTILE)
        metrics["vector"]["file"] = HOSTILE[1]
        metrics["vector"]["estimator"] = HOSTILE[3]
        metrics["judge"] = HOSTILE[9]
        metrics["date"] = HOSTILE[10]
        metrics["gate"] = {"passed": False, "reasons": list(HOSTILE)}
        metrics["llama_cpp"] = {"command": HOSTILE[0] + HOSTILE[6], "build": HOSTILE[11]}
        metrics["sets"][HOSTILE[10]] = metrics["sets"]["benign"]
        metrics["seconds"][HOSTILE[0]] = 1.0
        return metrics

    def spoil_trials(tune: dict[str, Any]) -> dict[str, Any]:
        tune["trials"][0]["estimator"] = HOSTILE[11]
        tune["baselines"] = [{"name": HOSTILE[1], "sensitive": 0.5, "harmful_retention": 0.9}]
        return tune

    def spoil_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["prompts"]["system"] = HOSTILE[9] + HOSTILE[0]
        recipe["prompts"]["sensitive"] = [HOSTILE[9], HOSTILE[10]]
        return recipe

    return make_run(tmp_path / "run", rows, metrics=spoil, tune=spoil_trials, recipe=spoil_recipe)


# ---- report --------------------------------------------------------------------------------------


def test_report_states_the_verdict_the_numbers_and_the_exact_command(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert page.all("h2", id="verdict-title") == ["✓Passed the gate"]
    assert page.all("code", id="command") == [metrics["llama_cpp"]["command"]]
    numbers = [one_line(text) for text in page.all("div", class_="number")]
    assert len(numbers) == 3
    for text, kind in zip(numbers, prompts.KINDS, strict=True):
        found = metrics["sets"][kind]
        low, high = (round(100 * x) for x in found["ci95_steered"])
        assert f"{low} to {high} %" in text
        assert f"{found['n']} " in text


def test_report_gives_reasons_when_the_gate_is_not_passed(tmp_path: Path) -> None:
    reason = "harmful refusals fell from 24 to 11 (46%; at least 95% must stay)"
    folder = make_run(tmp_path, metrics=lambda m: {**m, "gate": {"passed": False, "reasons": [reason]}})
    page = Page(write_report(folder))
    assert page.all("h2", id="verdict-title") == ["✕Did not pass the gate"]
    assert reason in page.all("ul", class_="reasons")[0]


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


def test_report_shows_every_pair_with_its_verdicts(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    rows = [json.loads(line) for line in (run_folder / "evaluation.jsonl").read_text().splitlines()]
    articles = page.all("article", class_="pair")
    assert Counter(page.all("h3", dir="auto")) == Counter(row["prompt"] for row in rows)
    assert sum("not judged" in text for text in articles) == 1
    assert sum("(empty answer)" in text for text in articles) == 1
    changed = [
        row
        for row in rows
        if row["confidence_steered"] is not None
        and (row["confidence_baseline"] > 0) != (row["confidence_steered"] > 0)
    ]
    assert len(page.all("article", data_changed="yes")) == len(changed) > 5


def test_answers_to_harmful_requests_are_folded(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    rows = [json.loads(line) for line in (run_folder / "evaluation.jsonl").read_text().splitlines()]
    answered = sum(
        r[f"confidence_{s}"] <= 0 for r in rows for s in ("baseline", "steered") if r["kind"] == "harmful"
    )
    assert len(page.all("details", class_="folded")) == answered > 0


def test_breakdown_counts_add_up_to_the_totals(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    metrics = json.loads((run_folder / "metrics.json").read_text())
    rows = re.findall(
        r"<caption><bdi>(\w+)</bdi>, by (\w+)</caption>(.*?)</table>", page.source, flags=re.DOTALL
    )
    assert len(rows) == 9
    for kind, _, table in rows:
        cells = re.findall(r'<td class="quiet">(\d+)</td><td>(\d+)</td><td><strong>(\d+)</strong>', table)
        sums = [sum(int(cell[k]) for cell in cells) for k in range(3)]
        found = metrics["sets"][kind.lower()]
        assert sums == [found["n"], found["refused_baseline"], found["refused_steered"]]


def test_plot_places_each_trial_by_its_rates(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    tune = json.loads((run_folder / "tune.json").read_text())
    places = {
        int(number): (float(x), float(y))
        for x, y, number in re.findall(
            r'<g transform="translate\((\S+) (\S+)\)">\s*<title>Trial (\d+):', page.source
        )
    }
    assert len(places) == len(tune["trials"])
    by_kept = sorted(tune["trials"], key=lambda t: t["harmful_retention"])
    by_left = sorted(tune["trials"], key=lambda t: t["sensitive"])
    assert [places[t["number"]][0] for t in by_kept] == sorted(x for x, _ in places.values())
    assert [places[t["number"]][1] for t in by_left] == sorted(y for _, y in places.values())
    assert places[12][0] == pytest.approx(
        places[14][0] - (places[14][0] - places[13][0]) * (1.0 - 0.97) / (1.0 - 0.91), abs=0.02
    )
    assert page.source.count('class="halo" r="11"') == 1


def test_induction_is_told_as_induction(tmp_path: Path) -> None:
    folder = make_run(tmp_path, metrics=lambda m: {**m, "effect": "induce"})
    text = one_line(Page(write_report(folder)).all("p", class_="summary")[0])
    assert "takes refusals of sensitive prompts from" in text
    assert write_card(folder).read_text(encoding="utf-8").count("# Induce refusals") == 1


def test_what_was_not_measured_is_said_and_not_guessed(tmp_path: Path) -> None:
    def unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
        proof = {"effect_observed": None, "largest_relative_error": None, "kl_mean": None}
        return {**metrics, "proof": proof, "retention_harmful": None, "benign_drift": float("nan")}

    folder = make_run(tmp_path, metrics=unmeasured)
    page = Page(write_report(folder))
    assert "was not observed" in page.source
    assert "nan" not in one_line("".join(page.all("section"))).split()
    assert "not measured" in write_card(folder).read_text(encoding="utf-8")


def test_a_large_run_still_makes_a_small_page(tmp_path: Path) -> None:
    rows = invented_rows(8)
    rows = [{**row, "id": str(k), "answer_baseline": '"&<' * 3000} for k in range(100) for row in rows]
    path = write_report(make_run(tmp_path, rows))
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert "texts are cut at 250 characters" in text
    shown = text.count('<article class="pair"')
    assert f"shows {shown} of {len(rows)} pairs" in one_line(text)


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
            assert attributes["scope"] in ("row", "col")
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.elements[0] == ("html", {"lang": "en"})


def test_controls_wait_for_the_script(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    controls = [a for tag, a in page.elements if tag in ("form", "button")]
    assert len(controls) == 2
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
    assert page.all("code", id="command")[0].startswith("<script>document.title='owned'</script>file⟨U+202E⟩")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", page.source)


def test_hostile_text_stays_text_in_the_card(hostile_folder: Path) -> None:
    card = write_card(hostile_folder).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", card)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "llama.cpp"
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    friendly = make_run(
        hostile_folder.parent / "friendly",
        metrics=lambda m: {**m, "gate": {"passed": False, "reasons": [""]}},
    )
    expected = write_card(friendly).read_text(encoding="utf-8").split("---\n", 2)[2]

    def skeleton(text: str) -> list[tuple[str, str]]:
        tokens = markdown.parse(text)
        flat = [t for token in tokens for t in (token, *(token.children or ()))]
        ignored = {"text", "code_inline", "text_special", "softbreak"}
        return [(t.type, t.info) for t in flat if t.type not in ignored]

    hostile, plain = Counter(skeleton(body)), Counter(skeleton(expected))
    # One more row of the table (a set more, of six cells), and as many reasons as there are.
    more = hostile - plain
    assert not plain - hostile
    assert more[("tr_open", "")] == 1
    assert more[("list_item_open", "")] == len(HOSTILE) - 1
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
        ((kind, _),) = shown(_markdown_text(text))
        (children,) = [t.children for t in markdown.parse(_markdown_text(text)) if t.children]
        assert kind == "inline"
        assert {child.type for child in children} <= {"text", "text_special"}
        assert "".join(child.content for child in children) == line
        (children,) = [t.children for t in markdown.parse(_markdown_code(text)) if t.children]
        assert [(child.type, child.content) for child in children] == [("code_inline", line)]
    assert shown(_markdown_fence(text, "sh")) == [("fence", text.rstrip("\n") + "\n")]


def test_markdown_text_leaves_plain_text_alone() -> None:
    for text in (
        "harmful refusals fell from 24 to 11 (46%; 95% must stay)",
        "0.042",
        "2026-11-24",
        "0+unknown",
    ):
        assert _markdown_text(text) == text


# ---- in a browser ----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a reader does, and what the page then shows. It runs before the page's own script, to see its errors.
READER = """
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
document.addEventListener("securitypolicyviolation", event => faults.push(event.violatedDirective));
for (const name of ["error", "warn"]) console[name] = (...words) => faults.push(words.join(" "));
addEventListener("load", () => {
  const get = id => document.getElementById(id);
  const shown = () => [...document.querySelectorAll(".pair")].filter(e => e.offsetParent !== null).length;
  const type = (id, value) => {
    get(id).value = value.replaceAll("\\n", " ");
    get(id).dispatchEvent(new Event("input"));
    return shown();
  };
  const seen = {all: shown()};
  seen.kind = type("filter-kind", "sensitive");
  get("filter-changed").click();
  seen.changed = shown();
  seen.said = get("filter-count").textContent;
  seen.missed = type("filter-search", "no such words anywhere");
  seen.none = get("filter-none").offsetParent !== null;
  type("filter-search", "");
  get("filter-changed").click();
  seen.again = type("filter-kind", "");
  seen.found = type("filter-search", document.querySelector(".pair h3").textContent.toUpperCase());
  seen.copy = get("copy").offsetParent !== null;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  seen.loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.title = document.title;
  seen.faults = faults;
  document.body.textContent = JSON.stringify(seen);
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["run_folder", "hostile_folder"])
def test_page_works_in_a_browser(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    source = write_report(folder).read_text(encoding="utf-8")
    watched = source.replace("script-src '", f"script-src '{_script_hash(READER)}' '", 1)
    watched = watched.replace("<title>", f"<script>{READER}</script><title>", 1)
    (tmp_path / "watched.html").write_text(watched, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-dev-shm-usage", "--window-size=1280,900", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", (tmp_path / "watched.html").as_uri()),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    (text,) = re.findall(r"<body>(\{.*\})</body>", done.stdout.decode("utf-8"), flags=re.DOTALL)
    seen = json.loads(html.unescape(text))
    sensitive = [r for r in rows if r["kind"] == "sensitive"]
    changed = [
        r
        for r in sensitive
        if r["confidence_steered"] is not None
        and (r["confidence_baseline"] > 0) != (r["confidence_steered"] > 0)
    ]
    assert seen["faults"] == []
    assert seen["loaded"] == []
    assert seen["title"].endswith("Refusal Steering report")
    assert seen["all"] == seen["again"] == len(rows)
    assert seen["kind"] == len(sensitive)
    assert seen["changed"] == len(changed) > 0
    assert seen["said"] == f"{len(changed)} of {len(rows)} shown"
    assert seen["missed"] == 0
    assert seen["none"]
    assert seen["found"] >= 1
    assert seen["copy"]
    assert seen["wide"] <= 0


# ---- card ----------------------------------------------------------------------------------------


def test_card_has_front_matter_numbers_hashes_and_citations(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert {"gguf", "control-vector"} <= set(front["tags"])
    assert "zh" in front["language"]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for kind in prompts.KINDS:
        after = metrics["sets"][kind]["refusal_steered"]
        row = next(line for line in card.splitlines() if line.startswith(f"| {kind} |"))
        assert re.search(rf"\*\*{100 * after:.0f}|\*\*{100 * after:.1f}", row)
    assert metrics["vector"]["sha256"] in card
    assert metrics["model"]["sha256"] in card
    assert "2512.16602" in card
    assert "2504.17130" in card
    options = "--control-vector-scaled remove.gguf:1.0 --control-vector-layer-range 8 15"
    assert f"llama-server -m MODEL.gguf {options}\n" in card
    assert f"llama-cli -m MODEL.gguf {options}\n" in card
    assert "my models" not in card, "the maker's own paths stay out of the card"


def test_card_of_a_failed_gate_or_an_unknown_model_says_so(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["sha256"] = "0" * 64
        return {**metrics, "gate": {"passed": False, "reasons": ["benign answers drift by 0.4 nats"]}}

    card = write_card(make_run(tmp_path, metrics=change)).read_text(encoding="utf-8")
    assert "**It did not pass its gate.**" in card
    assert "\n- benign answers drift by 0.4 nats\n" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "other"
    assert "base_model" not in front


def test_python_in_the_card_compiles(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(code, "card.md", "exec")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "evaluation.jsonl", "tune.json", "recipe.toml"])
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
    folder = make_run(tmp_path, metrics=lambda m: {k: v for k, v in m.items() if k != "gate"})
    with pytest.raises(InputError, match="gate"):
        write(folder)


def test_same_run_gives_the_same_bytes(run_folder: Path) -> None:
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()
    assert write_card(run_folder).read_bytes() == write_card(run_folder).read_bytes()
