"""Published files are those that were measured, and their cards say what their metrics say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rs_gguf import control_vector, lora, recipe
from rs_gguf.files import sha256

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "vectors").glob("*/recipe.toml"))
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
