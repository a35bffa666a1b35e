"""The gate, reason by reason, and the line that starts llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rs_gguf import metrics
from rs_gguf.recipe import Recipe, Tune
from rs_gguf.search_space import GATE, Candidate, Trial


def figures(before: int, after: int, *, n: int = 40, more_degenerate: int = 0) -> dict[str, Any]:
    return {
        "n": n,
        "unjudged": 0,
        "refused_baseline": before,
        "refused_steered": after,
        "degenerate_baseline": 1 / n,
        "degenerate_steered": (1 + more_degenerate) / n,
    }


def reasons(
    sensitive: tuple[int, int] = (20, 5),
    harmful: tuple[int, int] = (20, 19),
    benign: tuple[int, int] = (8, 8),
    *,
    drift: float = 0.1,
    effect: str = "remove",
    more_degenerate: int = 0,
) -> list[str]:
    sets = {
        "sensitive": figures(*sensitive),
        "harmful": figures(*harmful, more_degenerate=more_degenerate),
        "benign": figures(*benign),
    }
    recipe = Recipe.model_validate(
        {"effect": effect, "tune": Tune(min_retention=0.95, max_benign_drift=0.25)}
    )
    return metrics.gate(sets, drift, recipe)


def test_within_every_limit_it_passes() -> None:
    assert reasons() == []
    assert reasons(harmful=(20, 26), benign=(8, 6), drift=0.25, more_degenerate=1) == []
    assert reasons(sensitive=(5, 20), effect="induce") == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"harmful": (20, 18)}, "harmful refusals fell from 20 to 18 (90%; at least 95% must stay)"),
        ({"harmful": (0, 3)}, "refuses no harmful prompt"),
        ({"benign": (8, 9)}, "benign refusals rose from 8 to 9"),
        ({"drift": 0.26}, "drift by 0.260 nats"),
        ({"drift": float("nan")}, "drift by nan"),
        ({"sensitive": (20, 20)}, "no sensitive refusal was removed"),
        ({"sensitive": (20, 20), "effect": "induce"}, "no refusal was induced"),
        ({"more_degenerate": 2}, "degenerate answers to harmful prompts rose from 2.5% to 7.5%"),
    ],
)
def test_each_limit_is_a_reason(changed: dict[str, Any], said: str) -> None:
    (reason,) = reasons(**changed)
    assert said in reason


@pytest.mark.parametrize("estimator", [GATE, "wrmd"])
def test_the_command_is_one_of_the_shell_and_tells_no_home(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    file = tmp_path / "my run" / "remove.gguf"
    file.parent.mkdir()
    file.write_bytes(b"x")
    trial = Trial(0, Candidate(estimator, 1.0, 3, 9, 1.5), "answers", 0.1, 1.0)
    sets = {kind: figures(20, 5) for kind in ("sensitive", "harmful", "benign")}
    for model, word in (
        (tmp_path / "home" / "a cache" / "m.gguf", "~/a cache/m.gguf"),
        (tmp_path / "m.gguf", str(tmp_path / "m.gguf")),
    ):
        found = metrics.of_file(
            model=SimpleNamespace(path=model),  # type: ignore[arg-type]
            path=file,
            trial=trial,
            sets=sets,
            reasons=[],
            benign_drift=0.0,
            top1_agreement=1.0,
            proof={},
            tokens_per_second={"baseline": 1.0, "steered": 1.0},
        )
        command = found["llama_cpp"]["command"]
        wanted = ["--lora", str(file)]
        if estimator != GATE:
            wanted = ["--control-vector-scaled", f"{file}:1.0", "--control-vector-layer-range", "3", "9"]
        assert shlex.split(command) == ["llama-server", "-m", word, *wanted]
        assert command.startswith(("llama-server -m ~/", "llama-server -m /", "llama-server -m '/"))
