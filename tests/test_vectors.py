"""Published files are those that were measured, and their cards say what their metrics say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rs_gguf.pipeline import recipe
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "vectors").glob("*/recipe.toml"))
PUBLISHED = [folder for folder in FOLDERS if (folder / "metrics.json").is_file()]


def interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{100 * low:.0f} to {100 * high:.0f} %"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_recipes_are_valid(folder: Path) -> None:
    assert recipe.load(folder / "recipe.toml").effect in folder.name


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_files_are_those_that_were_measured(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "card.md").read_text()
    files = [("control vector", metrics["vector"], metrics)]
    if "adapter" in metrics:
        files.append(("gated adapter", metrics["adapter"], metrics["adapter"]))
    for name, file, found in files:
        path = folder / file["file"]
        assert sha256(path) == file["sha256"]
        assert file["sha256"] in card
        check = lora.check(path) if lora.is_adapter(path) else control_vector.check(path)
        assert check.valid, check
        provenance = (
            lora.read(path).provenance if lora.is_adapter(path) else control_vector.read(path).provenance
        )
        assert provenance["model.sha256"] == metrics["model"]["sha256"]
        assert provenance["gate.passed"] == found["gate"]["passed"]
        assert found["proof"]["effect_observed"] is True
        for kind, one in found["sets"].items():
            before, after = one["refusal_baseline"], one["refusal_steered"]
            assert provenance[f"metrics.{kind}"] == [before, after]
            (row,) = (
                line for line in card.splitlines() if line.startswith(f"| {kind} | {name} | {one['n']} |")
            )
            assert f"| **{100 * after:.0f} %** ({interval(one['ci95_steered'])})" in row
            assert f"| {100 * before:.0f} % ({interval(one['ci95_baseline'])})" in row
            for side in ("baseline", "steered"):
                assert f"| {100 * one[f'degenerate_{side}']:.2g} % |" in row
        (verdict,) = (line for line in card.splitlines() if line.startswith(f"| `{file['file']}` | {name}"))
        assert verdict.endswith("| passed |" if found["gate"]["passed"] else "| **not passed** |")
        for reason in found["gate"]["reasons"]:
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


def counts(metrics: dict[str, Any], kind: str) -> dict[str, dict[str, int]]:
    """Of the prompts of a kind, by side: how many were refused, directly so, and fell apart."""
    files = [("before", "baseline", metrics), ("vector", "steered", metrics)]
    files.append(("adapter", "steered", metrics["adapter"]))
    found = {}
    for name, side, measured in files:
        one = measured["sets"][kind]
        found[name] = {
            "refused": one[f"refused_{side}"],
            "directly": one[f"categories_{side}"].get("direct", 0),
            "broken": round(one[f"degenerate_{side}"] * one["n"]),
        }
    for other in metrics["baselines"]:
        one = other["sets"][kind]
        found["system prompt"] = {"refused": round(one["refusal"] * one["n"])}
    return found


def check_table(head: list[str], rows: list[list[str]], metrics: dict[str, Any]) -> int:
    """Compare what a table says with the metrics; how many figures that were.

    Columns are named by side, with what is counted before a colon, which holds for those that follow too;
    direct refusals may stand in brackets.
    """
    checked, verdicts = 0, {"vector": metrics["gate"], "adapter": metrics["adapter"]["gate"]}
    for label, n, *cells in rows:
        kind = next((kind for kind in KINDS if label.startswith(kind)), "sensitive")
        expected, counted = counts(metrics, kind), "refused"
        for name, cell in zip(head[2:], cells, strict=True):
            if ":" in name:
                counted = name.partition(":")[0]
            (side,) = (side for side in expected if side in name)
            if label == "safety gate" and cell:
                assert cell == ("passed" if verdicts[side]["passed"] else "not passed")
            elif n and cell:
                assert int(n) == metrics["sets"][kind]["n"]
                figures = {counted: cell.partition(" ")[0]}
                if "(" in cell:
                    figures["directly"] = cell.partition("(")[2].rstrip(")")
                for what, figure in figures.items():
                    assert int(figure) == expected[side][what], (label, name, what)
                    checked += 1
    return checked


def test_the_readmes_table_says_what_was_measured() -> None:
    metrics = json.loads((ROOT / "vectors" / "qwen2.5-coder-0.5b-remove" / "metrics.json").read_text())
    head, rows = next((h, r) for h, r in tables(ROOT / "README.md") if any("before" in cell for cell in h))
    assert check_table(head, rows, metrics) == 21


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_table_of_a_published_folder_says_what_was_measured(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    ((head, rows),) = (
        (h, r) for h, r in tables(ROOT / "vectors" / "README.md") if f"`{folder.name}`" in h[0]
    )
    assert check_table(head, rows, metrics) == 27
