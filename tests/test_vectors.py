"""Published files are those that were measured, and their cards say what their metrics say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rs_gguf.evaluation.paired_statistics import wilson
from rs_gguf.pipeline import recipe
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import Outcomes, RunRecord
from rs_gguf.steering import file as steering_file

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "vectors").glob("*/recipe.toml"))
WORDS = {"vector": "control vector", "adapter": "gated adapter"}
PUBLISHED = [folder for folder in FOLDERS if (folder / "metrics.json").is_file()]


def interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def not_complied(outcomes: Outcomes) -> int:
    """What the published cards call refused: the measurement of schema 1 counted failures as refusals."""
    return outcomes.refuses + outcomes.fails


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_recipes_are_valid(folder: Path) -> None:
    assert recipe.load(folder / "recipe.toml").effect in folder.name


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_files_are_those_that_were_measured(folder: Path) -> None:
    record = RunRecord.read(folder / "metrics.json")
    card = (folder / "card.md").read_text()
    assert {"vector"} <= record.files.keys() <= WORDS.keys()
    for key, file in record.files.items():
        name, path = WORDS[key], folder / file.file
        assert sha256(path) == file.sha256
        assert file.sha256 in card
        check = steering_file.check(path)
        assert check.valid, check
        provenance = steering_file.read(path).provenance
        assert provenance["model.sha256"] == record.model.sha256
        assert provenance["acceptance.passed"] == file.passed
        assert file.effect_check.effect_observed is True
        for kind, one in file.sets.items():
            refused = [not_complied(of) for of in (one.outcomes_unsteered, one.outcomes_steered)]
            n = one.n - one.outcomes_steered.unjudged
            before, after = (count / n for count in refused)
            before_ci95, after_ci95 = (wilson(count, n) for count in refused)
            assert provenance[f"metrics.{kind}"] == pytest.approx([before, after])
            (row,) = (line for line in card.splitlines() if line.startswith(f"| {kind} | {name} | {n} |"))
            assert f"| **{100 * after:.0f} %** ({interval(after_ci95)})" in row
            assert f"| {100 * before:.0f} % ({interval(before_ci95)})" in row
            for degenerate in (one.degenerate_unsteered, one.degenerate_steered):
                assert f"| {100 * degenerate:.2g} % |" in row
        (verdict,) = (line for line in card.splitlines() if line.startswith(f"| `{file.file}` | {name}"))
        assert verdict.endswith("| passed |" if file.passed else "| **not passed** |")
        for reason in file.acceptance.reasons:
            assert reason.split("(")[0].strip() in card.replace("\\", "")


# ---- the tables that people read first ---------------------------------------------------------------


def tables(path: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The head of each table and its rows."""
    table: list[list[str]] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            cells = line.replace("*", "").strip().removeprefix("|").removesuffix("|").split("|")
            table.append([cell.strip() for cell in cells])
        elif table:
            yield table[0], table[2:]
            table = []


def counts(folder: Path, record: RunRecord, kind: str) -> dict[str, dict[str, int]]:
    """Return counts of the prompts of a kind, by side: refused, directly refused and degenerate."""
    sides = {"before": ("unsteered", "vector"), "vector": ("steered", "vector")}
    sides["adapter"] = ("steered", "adapter")
    counts = {}
    for name, (side, key) in sides.items():
        one = record.files[key].sets[kind]
        outcomes: Outcomes = getattr(one, f"outcomes_{side}")
        counts[name] = {
            "refused": not_complied(outcomes),
            "directly": outcomes.explicit,
            "broken": round(getattr(one, f"degenerate_{side}") * one.n),
        }
    # Schema 1 compared totals. They are not transitions, so the record has no baselines.
    for other in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["baselines"]:
        figures = other["sets"][kind]
        counts["system prompt"] = {"refused": round(figures["refusal"] * figures["n"])}
    return counts


def check_table(head: list[str], rows: list[list[str]], folder: Path) -> int:
    """Compare what a table says with the metrics; how many figures that were.

    Columns are named by side, with what is counted before a colon, which holds for those that follow too;
    direct refusals may stand in brackets.
    """
    checked, record = 0, RunRecord.read(folder / "metrics.json")
    files = record.files
    for label, n, *cells in rows:
        kind = next((kind for kind in KINDS if label.startswith(kind)), "sensitive")
        expected, counted = counts(folder, record, kind), "refused"
        for name, cell in zip(head[2:], cells, strict=True):
            if ":" in name:
                counted = name.partition(":")[0]
            (side,) = (side for side in expected if side in name)
            if label == "safety gate" and cell:
                assert cell == ("passed" if files[side].passed else "not passed")
            elif n and cell:
                assert int(n) == files["vector"].sets[kind].n
                figures = {counted: cell.partition(" ")[0]}
                if "(" in cell:
                    figures["directly"] = cell.partition("(")[2].rstrip(")")
                for what, figure in figures.items():
                    assert int(figure) == expected[side][what], (label, name, what)
                    checked += 1
    return checked


def test_the_readmes_table_says_what_was_measured() -> None:
    folder = ROOT / "vectors" / "qwen2.5-coder-0.5b-remove"
    head, rows = next((h, r) for h, r in tables(ROOT / "README.md") if any("before" in cell for cell in h))
    assert check_table(head, rows, folder) == 21


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_table_of_a_published_folder_says_what_was_measured(folder: Path) -> None:
    ((head, rows),) = (
        (h, r) for h, r in tables(ROOT / "vectors" / "README.md") if f"`{folder.name}`" in h[0]
    )
    assert check_table(head, rows, folder) == 27
