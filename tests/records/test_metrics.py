"""The gate, reason by reason, what baselines do better, spreads, and the line that starts llama.cpp."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from fixtures.invented_run import figures_of_file

from rs_gguf.records import metrics
from rs_gguf.records.trials import GATE


@pytest.mark.parametrize("estimator", [GATE, "wrmd"])
def test_the_command_is_one_of_the_shell_and_tells_no_home(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for folder in ("", "home"):
        (tmp_path / folder / "my run").mkdir(parents=True)
        (tmp_path / folder / "my run" / "remove.gguf").write_bytes(b"x")
    (tmp_path / "home" / "a cache").mkdir()
    for model in (tmp_path / "home" / "a cache" / "m.gguf", tmp_path / "m.gguf"):
        model.write_bytes(b"x")
    for model, word, file, named in (
        (
            tmp_path / "home" / "a cache" / "m.gguf", "~/a cache/m.gguf",
            tmp_path / "home" / "my run" / "remove.gguf", "~/my run/remove.gguf",
        ),
        (
            tmp_path / "m.gguf", str(tmp_path / "m.gguf"),
            tmp_path / "my run" / "remove.gguf", str(tmp_path / "my run" / "remove.gguf"),
        ),
        (  # a folder, of which the user has a GGUF file elsewhere
            tmp_path, "MODEL.gguf",
            tmp_path / "my run" / "remove.gguf", str(tmp_path / "my run" / "remove.gguf"),
        ),
    ):  # fmt: skip
        found = figures_of_file(
            file,
            estimator,
            model=model,
            benign_drift=math.nan,  # none was answered
        )
        command = found["llama_cpp"]["command"]
        wanted = ["--lora", named]
        if estimator != GATE:
            wanted = ["--control-vector", named, "--control-vector-layer-range", "3", "9"]
        assert shlex.split(command) == ["llama-server", "-m", word, *wanted]
        assert command.startswith(f"llama-server -m {word[0]}")
        assert found["benign_drift"] is None  # JSON knows no NaN


def test_what_is_kept_of_harm_and_both_speeds_are_told(tmp_path: Path) -> None:
    (tmp_path / "remove.gguf").write_bytes(b"x")
    found = figures_of_file(tmp_path / "remove.gguf", tokens_per_second=(40.0, 30.0))
    assert found["retention_harmful"] == 0.25
    assert found["tokens_per_second"] == {"baseline": 40.0, "steered": 30.0}


def rates(before: tuple[float, float], after: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """Refusal of sensitive and of harmful prompts."""
    names = ("sensitive", "harmful", "benign")
    return {
        name: {"n": 40, "refusal_baseline": b, "refusal_steered": a, "ci95_steered": [a, a],
               "degenerate_steered": 0.0}
        for name, b, a in zip(names, (*before, 0.2), (*after, 0.2), strict=True)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("effect", "file", "other", "beaten"),
    [
        ("remove", (0.1, 0.4), (0.3, 0.4), True),
        ("remove", (0.1, 0.5), (0.3, 0.7), True),  # more refusals of harm than unsteered are no merit
        ("remove", (0.1, 0.4), (0.3, 0.5), False),  # fewer refusals of harm kept
        ("remove", (0.3, 0.5), (0.1, 0.2), False),
        ("remove", (0.3, 0.5), (0.3, 0.5), False),
        ("remove", (0.6, 0.5), (0.7, 0.5), False),  # nothing was removed
        ("induce", (0.9, 0.5), (0.7, 0.5), True),
        ("induce", (0.7, 0.5), (0.9, 0.5), False),
    ],
)
def test_a_baseline_is_beaten_by_more_of_the_effect_at_no_less_harm_kept(
    effect: str, file: tuple[float, float], other: tuple[float, float], beaten: bool
) -> None:
    before = (0.6, 0.5)
    baseline = metrics.of_baseline("system prompt", rates(before, other), 0.3)
    assert set(baseline) == {"name", "sets", "benign_drift"}
    assert set(baseline["sets"]["harmful"]) == {"kind", "n", "refusal", "ci95", "degenerate"}
    notes = metrics.beside(rates(before, file), [baseline], effect)
    assert len(notes) == (not beaten)
    if notes:
        assert "does not beat the baseline “system prompt”" in notes[0]
        assert f"{file[0]:.0%} against {other[0]:.0%}" in notes[0]
