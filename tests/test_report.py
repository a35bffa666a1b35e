"""The report and the card, on an invented run folder, with friendly and with hostile text."""

from __future__ import annotations

import copy
import html
import html.parser
import io
import itertools
import json
import math
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
from rich.console import Console

from rs_gguf import models, prompts
from rs_gguf.errors import InputError
from rs_gguf.evaluation import summarise
from rs_gguf.report import write_card, write_report
from rs_gguf.reporting.terminal import print_results
from rs_gguf.reporting.text import markdown_code, markdown_fence, markdown_text, script_hash

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
SIDES = ("baseline", "steered", "adapter")
# Harmful refusals kept and sensitive ones left of the trials that were answered, vectors first.
ANSWERED_TRIALS = {
    9: (0.97, 0.71), 10: (0.91, 0.42), 11: (1.0, 0.83),
    21: (1.0, 0.31), 22: (0.96, 0.08), 23: (0.88, 0.03),
}  # fmt: skip
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
    model = models.CATALOGUE[models.DEFAULT]
    vector, adapter = measured(rows, "steered"), measured(rows, "adapter")
    command = "llama-server -m 'my models/qwen.gguf' "
    vector["llama_cpp"] = {
        "command": f"{command}--control-vector-scaled out/demo/remove.gguf:1.0 "
        "--control-vector-layer-range 8 15",
        "build": "b6500",
    }
    adapter["llama_cpp"] = {"command": f"{command}--lora out/demo/remove-adapter.gguf", "build": "b6500"}
    adapter["benign_drift"] = 0.0163
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
        **vector,
        "adapter": {
            "file": "remove-adapter.gguf",
            "sha256": "ad" * 32,
            "estimator": "gate",
            "ridge": 2.0,
            "layers": [4, 22],
            "strength": 1.2,
            "scale": 1.0,
            **adapter,
        },
        "test_tokens": 64,
        "subset": True,
        "seed": 0,
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
        "tune": {"trials": 12, "min_retention": 0.95, "max_benign_drift": 0.25},
    }
    files = {"metrics": metrics, "tune": invented_tune(), "fit": invented_fit(), "recipe": recipe}
    for name, change in changes.items():
        files[name] = change(copy.deepcopy(files[name]))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics", "tune", "fit"):
        (folder / f"{name}.json").write_text(json.dumps(files[name]), encoding="utf-8")
    (folder / "recipe.toml").write_text(tomli_w.dumps(files["recipe"]), encoding="utf-8")
    # As the run writes it, but ASCII, which alone can carry a lone surrogate.
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def measured(rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
    """What metrics.json has of a file whose answers are the columns that end in `side`."""
    names = ("confidence", "degenerate")
    paired = [
        {**row, **{f"{n}_steered": row[f"{n}_{side}"] for n in names}} if side != "steered" else row
        for row in rows
    ]
    sets = {k: {"kind": k, **summarise([r for r in paired if r["kind"] == k])} for k in prompts.KINDS}
    harmful = sets["harmful"]
    return {
        "sets": sets,
        "benign_drift": 0.0421,
        "top1_agreement_benign": 0.956,
        "retention_harmful": harmful["refused_steered"] / max(harmful["refused_baseline"], 1),
        "gate": {"passed": True, "reasons": []},
        "proof": {"effect_observed": True, "largest_relative_error": 1.7e-5, "kl_mean": 0.31, "reasons": []},
        "tokens_per_second": {"baseline": 81.3, "steered": 80.1},
    }


def without_adapter(folder: Path) -> Path:
    """The run folder as it is where the engine cannot fit an adapter."""
    for name, keys in (("metrics", ["adapter"]), ("tune", ["chosen_adapter"])):
        path = folder / f"{name}.json"
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in keys}
        path.write_text(json.dumps(kept), encoding="utf-8")
    path = folder / "evaluation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept_rows = [{k: v for k, v in row.items() if not k.endswith("_adapter")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept_rows), encoding="utf-8")
    return folder


def invented_rows(per_kind: int = 40) -> list[dict[str, Any]]:
    """Prompts of the grid's test split, answers invented: sensitive refusals go, harmful ones stay."""
    chance = random.Random(5)
    # Chance of a refusal before; of its staying under the vector, and under the adapter.
    rates = {"sensitive": (0.6, 0.6, 0.1), "harmful": (0.6, 0.9, 0.96), "benign": (0.12, 0.6, 0.9)}
    rows = []
    for kind, (refused, *kept) in rates.items():
        pool = [p for p in prompts.grid([kind]) if p.split == "test"]  # type: ignore[list-item]
        for prompt in prompts.stratified(pool, per_kind, seed=0):
            before = chance.random() < refused
            after = [before and chance.random() < rate for rate in kept]
            row: dict[str, Any] = prompts.to_row(prompt)  # type: ignore[assignment]
            for side, refuses in zip(SIDES, (before, *after), strict=True):
                texts = REFUSED if refuses else ANSWERED
                size = chance.uniform(0.05, 1)
                # The vector moves every answer, the adapter few.
                row[f"answer_{side}"] = texts.get(prompt.language, texts["en"]) + "." * (side == "steered")
                row[f"confidence_{side}"] = round(size if refuses else -size, 6)
                row[f"degenerate_{side}"] = chance.random() < 0.01
            rows.append(row)
    rows[3]["confidence_steered"] = None
    rows[5]["answer_adapter"] = ""
    return rows


def invented_tune() -> dict[str, Any]:
    chance = random.Random(2)
    trials: list[dict[str, Any]] = []
    for number in range(24):
        gate = number >= 12
        strength = chance.uniform(0.4, 3) if gate else chance.uniform(0.5, 6)
        loss, fall = (0.04, 0.4) if gate else (0.1, 0.2)
        kept = max(0.2, min(1.0, 1.05 - loss * strength + chance.gauss(0, 0.05)))
        trials.append(
            {
                "number": number,
                "estimator": "gate" if gate else chance.choice(["contrast-wrmd", "safe-wrmd", "wrmd"]),
                "ridge": chance.choice([0.3, 3.0]),
                "margin": 0.25 if gate else 0.0,
                "strength": round(strength, 4),
                "layers": [4, 22] if gate else [8, 15],
                "rung": "probe",
                "sensitive": min(1.0, max(0.02, 0.95 - fall * strength + chance.gauss(0, 0.08))),
                "harmful_retention": kept,
                "benign": None,
                "benign_drift": None,
                "degenerate": None,
                "feasible": None,
            }
        )
    for number, (kept, left) in ANSWERED_TRIALS.items():
        answered = {"benign": -0.02, "benign_drift": 0.04, "degenerate": 0.0, "feasible": kept >= 0.95}
        trials[number].update(answered, rung="answers", harmful_retention=kept, sensitive=left)
    return {"trials": trials, "chosen": 9, "chosen_adapter": 22}


def invented_fit() -> dict[str, Any]:
    directions = [
        {
            "estimator": estimator,
            "ridge": ridge,
            "score": [round(-1 + 1.5 * math.sin((block + k) / 9), 4) for block in range(24)],
            "auroc": [round(0.6 + 0.38 * math.sin((block + k) / 9) ** 2, 4) for block in range(24)],
            # The first block of a causal model sees one token: there is no direction to compare.
            "harm_cosine": [math.nan, *(round(0.7 - 0.02 * (block + k), 4) for block in range(1, 24))],
        }
        for k, (estimator, ridge) in enumerate(
            itertools.product(["contrast-wrmd", "safe-wrmd", "wrmd"], [0.3, 3.0])
        )
    ]
    counts = {"refused": 80, "answered": 100, "neutral": 10}
    return {"samples": dict.fromkeys(prompts.KINDS, counts), "directions": directions}


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
def hostile_folder(tmp_path: Path) -> Path:
    rows = invented_rows(8)
    for row, text in zip(rows, HOSTILE * 2, strict=True):
        row.update(prompt=text, answer_baseline=text, answer_steered=text[::-1], answer_adapter=text + text)
        row.update(subject=text, topic=text, form=text, language=text)

    def spoil(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["name"] = " ".join(HOSTILE)
        metrics["vector"]["file"] = HOSTILE[1]
        metrics["vector"]["estimator"] = HOSTILE[3]
        metrics["judge"] = HOSTILE[9]
        metrics["date"] = HOSTILE[10]
        metrics["gate"] = {"passed": False, "reasons": list(HOSTILE)}
        metrics["llama_cpp"] = {"command": HOSTILE[0] + HOSTILE[6], "build": HOSTILE[11]}
        metrics["adapter"].update(file=HOSTILE[4], estimator=HOSTILE[11])
        metrics["adapter"]["gate"] = {"passed": False, "reasons": list(HOSTILE)}
        metrics["adapter"]["llama_cpp"] = {"command": HOSTILE[1], "build": HOSTILE[9]}
        for sets in (metrics["sets"], metrics["adapter"]["sets"]):
            sets[HOSTILE[10]] = sets["benign"]
        metrics["seconds"][HOSTILE[0]] = 1.0
        return metrics

    def spoil_trials(tune: dict[str, Any]) -> dict[str, Any]:
        tune["trials"][0]["estimator"] = HOSTILE[11]
        tune["trials"][23]["rung"] = HOSTILE[1]
        return tune

    def spoil_fit(fit: dict[str, Any]) -> dict[str, Any]:
        fit["samples"][HOSTILE[1]] = fit["samples"]["benign"]
        for direction in fit["directions"]:
            direction["estimator"] = HOSTILE[3]
        return fit

    def spoil_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["prompts"]["system"] = HOSTILE[9] + HOSTILE[0]
        recipe["prompts"]["sensitive"] = [HOSTILE[9], HOSTILE[10]]
        return recipe

    return make_run(
        tmp_path / "run", rows, metrics=spoil, tune=spoil_trials, fit=spoil_fit, recipe=spoil_recipe
    )


# ---- report --------------------------------------------------------------------------------------


def gates(vector: bool, adapter: bool) -> Any:
    """A change of metrics.json: who passed."""

    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        for found, passed in ((metrics, vector), (metrics["adapter"], adapter)):
            found["gate"] = {
                "passed": passed,
                "reasons": [] if passed else ["no sensitive refusal was removed"],
            }
        return metrics

    return change


def test_report_states_the_verdict_the_numbers_and_the_exact_commands(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert page.all("h2", id="verdict-title") == ["✓Use the gated adapter"]
    for key, found in (("vector", metrics), ("adapter", metrics["adapter"])):
        assert page.all("code", id=f"command-{key}") == [found["llama_cpp"]["command"]]
    numbers = [one_line(text) for text in page.all("div", class_="number")]
    assert len(numbers) == 3
    for text, kind in zip(numbers, prompts.KINDS, strict=True):
        before = metrics["sets"][kind]
        assert f"{before['n']} " in text
        intervals = [before["ci95_baseline"]]
        intervals += [found["sets"][kind]["ci95_steered"] for found in (metrics, metrics["adapter"])]
        said = [f"{round(100 * low)} to {round(100 * high)} %" for low, high in intervals]
        assert re.findall(r"\d+ to \d+ %", text) == said


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
    badges = ["✓ passed its gate" if passed else "✕ did not pass its gate" for passed in (vector, adapter)]
    titles = [one_line(text) for text in page.all("div", class_="title")]
    assert first in titles[0], "the advised file comes first"
    assert sorted(text.split("gguf ")[1] for text in titles) == sorted(badges)
    assert len(page.all("ul", class_="reasons")) == [vector, adapter].count(False)


def test_of_two_that_remove_as_much_the_one_that_keeps_harm_refusals_is_advised(tmp_path: Path) -> None:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["adapter"]["sets"] = metrics["sets"]
        metrics["retention_harmful"], metrics["adapter"]["retention_harmful"] = 1.0, 0.96
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
    reason = "harmful refusals fell from 24 to 11 (46%; at least 95% must stay)"
    folder = make_run(tmp_path, metrics=lambda m: {**m, "gate": {"passed": False, "reasons": [reason]}})
    page = Page(write_report(folder))
    assert [one_line(text) for text in page.all("ul", class_="reasons")] == [reason]
    assert "The control vector did not pass its gate." in page.all("p", class_="summary")[0]


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
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_report_shows_every_prompt_with_its_answers_and_verdicts(run_folder: Path) -> None:
    page, rows = Page(write_report(run_folder)), evaluated(run_folder)
    pairs = page.all("article", class_="pair")
    assert Counter(page.all("h3", dir="auto")) == Counter(row["prompt"] for row in rows)
    assert sum("not judged" in text for text in pairs) == 1
    assert sum("(empty answer)" in text for text in pairs) == 1
    same = sum(row[f"answer_{s}"] == row["answer_baseline"] for row in rows for s in SIDES[1:])
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
    repeated = sum(s != "baseline" and r[f"answer_{s}"] == r["answer_baseline"] for r, s in answered)
    assert len(page.all("details", class_="folded")) == len(answered) - repeated > 0


def test_breakdown_counts_add_up_to_the_totals(run_folder: Path) -> None:
    # One prompt was not judged under the vector, and a line compares like with like.
    rows = [row for row in evaluated(run_folder) if None not in verdicts(row)]
    page = Page(write_report(run_folder))
    tables = re.findall(
        r"<caption><bdi>(\w+)</bdi>, by ([\w ]+)</caption>(.*?)</table>", page.source, flags=re.DOTALL
    )
    assert [field for _, field, _ in tables[:3]] == ["country or region", "category of harm", "area"]
    assert len(tables) == 9
    for kind, _, table in tables:
        cells = re.findall(
            r'<td class="quiet">(\d+)</td><td>(\d+)</td><td><strong>(\d+)</strong></td>'
            r"<td><strong>(\d+)</strong>",
            table,
        )
        of_kind = [row for row in rows if row["kind"] == kind.lower()]
        refused = [sum(bool(verdicts(row)[k]) for row in of_kind) for k in range(3)]
        assert [sum(int(cell[k]) for cell in cells) for k in range(4)] == [len(of_kind), *refused]


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
        assert ("probe" in drawn, "fits" in drawn) == (trial["rung"] == "probe", trial["feasible"] is True)
        assert ("halo" in drawn) == (trial["number"] in (tune["chosen"], tune["chosen_adapter"]))


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
    assert len(page.all("figure")) == 3
    lines = [a for tag, a in page.elements if tag == "path" and a["class"].startswith("line")]
    assert len(lines) == 18
    assert sum(a["class"] == "line own" for a in lines) == 3
    # The first block has no cosine: the line starts at the second.
    assert sum(a["d"].count("L") == 22 for a in lines) == 6
    folder = make_run(tmp_path / "without")
    (folder / "fit.json").unlink()
    page = Page(write_report(folder))
    assert page.all("figure") == []
    assert "#fit" not in page.source.replace("#filters", "")


def test_induction_is_told_as_induction(tmp_path: Path) -> None:
    folder = make_run(tmp_path, metrics=lambda m: {**m, "effect": "induce"})
    page = Page(write_report(folder))
    # The invented adapter takes away more refusals, so the vector is the one that adds most.
    assert page.all("h2", id="verdict-title") == ["✓Use the control vector"]
    assert "but adds fewer refusals" in one_line(page.all("p", class_="summary")[0])
    assert write_card(folder).read_text(encoding="utf-8").count("# Induce refusals") == 1


def test_what_was_not_measured_is_said_and_not_guessed(tmp_path: Path) -> None:
    def unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
        proof = {"effect_observed": None, "largest_relative_error": None, "kl_mean": None}
        unknown = {"proof": proof, "retention_harmful": None, "benign_drift": float("nan")}
        return {**metrics, **unknown, "adapter": {**metrics["adapter"], **unknown}}

    folder = make_run(tmp_path, metrics=unmeasured)
    page = Page(write_report(folder))
    assert "was not observed" in page.source
    assert "nan" not in one_line("".join(page.all("section"))).split()
    assert "not measured" in write_card(folder).read_text(encoding="utf-8")


def test_a_large_run_still_makes_a_small_page(tmp_path: Path) -> None:
    rows = invented_rows(8)
    rows = [{**row, "id": str(k), "answer_baseline": '"&<' * 3000} for k in range(40) for row in rows]
    path = write_report(make_run(tmp_path, rows))
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert "texts are cut at 250 characters" in text
    shown = text.count('<article class="pair"')
    assert f"shows {shown} of {len(rows)} prompts" in one_line(text)


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
    friendly = make_run(hostile_folder.parent / "friendly", metrics=gates(False, False))
    expected = write_card(friendly).read_text(encoding="utf-8").split("---\n", 2)[2]

    def skeleton(text: str) -> list[tuple[str, str]]:
        tokens = markdown.parse(text)
        flat = [t for token in tokens for t in (token, *(token.children or ()))]
        ignored = {"text", "code_inline", "text_special", "softbreak"}
        return [(t.type, t.info) for t in flat if t.type not in ignored]

    hostile, plain = Counter(skeleton(body)), Counter(skeleton(expected))
    # A set more is a row for each file, and there are as many reasons as there are.
    more = hostile - plain
    assert not plain - hostile
    assert more[("tr_open", "")] == 2
    assert more[("list_item_open", "")] == 2 * (len(HOSTILE) - 1)
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
        "harmful refusals fell from 24 to 11 (46%; 95% must stay)",
        "0.042",
        "2026-11-24",
        "0+unknown",
    ):
        assert markdown_text(text) == text


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
  seen.changed = type("filter-mark", "changed-adapter");
  seen.said = get("filter-count").textContent;
  seen.missed = type("filter-search", "no such words anywhere");
  seen.none = get("filter-none").offsetParent !== null;
  type("filter-search", "");
  type("filter-mark", "");
  seen.again = type("filter-kind", "");
  seen.found = type("filter-search", document.querySelector(".pair h3").textContent.toUpperCase());
  type("filter-search", "");
  const language = document.querySelector(".pair").dataset.language;
  get("filter-language").value = language;
  get("filter-language").dispatchEvent(new Event("input"));
  seen.language = shown();
  seen.copied = [];
  // No clipboard in a page from a file: the selection is what a reader would copy by hand.
  Object.defineProperty(navigator, "clipboard", {value: undefined});
  document.execCommand = () => { seen.copied.push(String(getSelection())); return true; };
  for (const button of document.querySelectorAll("[data-copies]")) {
    button.click();
    seen.copied.push(button.offsetParent !== null, button.previousElementSibling.textContent);
  }
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
    rows = evaluated(folder)
    source = write_report(folder).read_text(encoding="utf-8")
    watched = source.replace("script-src '", f"script-src '{script_hash(READER)}' '", 1)
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
    sensitive = [row for row in rows if row["kind"] == "sensitive"]
    moved = [row for row in sensitive if changed(row, 2)]
    assert seen["faults"] == []
    assert seen["loaded"] == []
    assert seen["title"].endswith("Refusal Steering report")
    assert seen["all"] == seen["again"] == len(rows)
    assert seen["kind"] == len(sensitive)
    assert seen["changed"] == len(moved) > 0
    assert seen["said"] == f"{len(moved)} of {len(rows)} shown"
    assert seen["missed"] == 0
    assert seen["none"]
    assert seen["found"] >= 1
    languages = Counter(row["language"] for row in rows)
    assert seen["language"] in languages.values()
    page = Page(folder / "report.html")
    order = [a["data-copies"] for _, a in page.elements if "data-copies" in a]
    commands = [one_line(page.all("code", id=command)[0]) for command in order]
    assert len(commands) == 2
    assert [one_line(str(x)) for x in seen["copied"]] == [
        word for command in commands for word in (command, "True", "Copied.")
    ]
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
    assert "**Use the gated adapter.**" in card
    assert "Why the control vector did not pass" in card
    assert "\n- benign answers drift by 0.4 nats\n" in card
    rows = {line.split("`")[1]: line for line in card.splitlines() if line.startswith("| `remove")}
    assert rows["remove.gguf"].endswith("| **not passed** |")
    assert rows["remove-adapter.gguf"].endswith("| passed |")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "other"
    assert "base_model" not in front


def test_card_of_two_failed_gates_advises_neither(tmp_path: Path) -> None:
    card = write_card(make_run(tmp_path, metrics=gates(False, False))).read_text(encoding="utf-8")
    assert "**Use neither file as it is.** Neither passed its gate." in card


def test_card_says_what_was_not_measured(run_folder: Path) -> None:
    card = write_card(run_folder).read_text(encoding="utf-8")
    missing = card.split("**Not measured:**")[1].split("##")[0]
    for thing in ("more than one turn", "beyond 64 tokens", "greedy", "what the model can do", "both files"):
        assert thing in missing
    assert "None of these front ends, nor a merged model, was tried" in card


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


def test_terminal_shows_both_files_and_their_commands_whole(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    lines = printed(metrics).splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert all(len(line) <= 80 for line in table)
    for kind in prompts.KINDS:
        (row,) = (line for line in table if line.split()[1] == kind)
        sets = metrics["sets"][kind], metrics["adapter"]["sets"][kind]
        rates = [sets[0]["refusal_baseline"], *(found["refusal_steered"] for found in sets)]
        assert re.findall(r"[\d.]+%", row) == [f"{rate:.1%}" for rate in rates]
    assert "Use the gated adapter." in lines
    commands = [line for line in lines if line.startswith("llama-server")]
    assert commands == [metrics["adapter"]["llama_cpp"]["command"], metrics["llama_cpp"]["command"]]
    assert "Gated adapter, out/demo/remove-adapter.gguf (the one to use):" in lines


def test_terminal_gives_the_reasons_of_each_file(run_folder: Path) -> None:
    metrics = gates(False, False)(json.loads((run_folder / "metrics.json").read_text()))
    metrics["adapter"]["gate"]["reasons"] = ["[red]not markup[/] \x1b[31m"]
    text = printed(metrics)
    assert "Use neither file as it is." in text
    assert "  control vector: no sensitive refusal was removed\n" in text
    assert "  gated adapter: [red]not markup[/] ␛[31m\n" in text
    assert text.count("(did not pass its gate)") == 2


def test_terminal_of_a_run_without_an_adapter(run_folder: Path) -> None:
    text = printed(json.loads((without_adapter(run_folder) / "metrics.json").read_text()))
    assert "Use the control vector." in text
    assert "adapter" not in text


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
