"""`benchmarks/quantisations.py` on a tiny model: requantising, measuring once, and fitting."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tomli_w
from fixtures.endpoints import Server, without_proxy_or_key
from fixtures.invented_run import figures_of_file
from fixtures.tiny_qwen3 import write_tiny_qwen3
from fixtures.tiny_run import LIKED, PLAIN_TEMPLATE, SMALL, Judge

from rs_gguf.errors import InputError
from rs_gguf.models.resolve import fingerprint
from rs_gguf.pipeline import remeasure as remeasuring
from rs_gguf.pipeline.settings import nested
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import JudgeRecord, ModelRecord, RunRecord
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quantisations.py"
WIDTH = 256  # one block of Q2_K
N = 4  # prompts of each kind

pytestmark = pytest.mark.slow


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    without_proxy_or_key(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Server(Judge(), ["judge"])
    yield server.url
    server.stop()


@pytest.fixture
def folder(tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published folder with a vector and an adapter for a tiny model."""
    monkeypatch.setattr(remeasuring, "_LEAST_TOKENS", 8)
    folder, model = tmp_path / "published", tmp_path / "tiny.gguf"
    folder.mkdir()
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, n_layer=2, width=WIDTH, inner=WIDTH)
    rng = np.random.default_rng(0)
    row, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in (WIDTH, (1, WIDTH), (WIDTH, 1)))
    vector, adapter = folder / "remove.gguf", folder / "remove-adapter.gguf"
    facts: dict[str, Any] = {"layers": [3, 9], "strength": 1.5}
    vector_file.write(SteeringVector({1: row}, {**facts, "estimator": "wrmd"}, "qwen3"), vector)
    factors, of_adapter = {"blk.1.ffn_down.weight": (a, b)}, {**facts, "estimator": GATED_ADAPTER}
    lora_file.write(LoraAdapter(factors, "qwen3", of_adapter), adapter)
    values = {"model": str(model), "judge": judge, "answers": {"test_tokens": 8}}
    (folder / "recipe.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    RunRecord(
        date="2026-01-01", effect="remove", judge=JudgeRecord(name="judge"), test_tokens=8, subset=True,
        model=ModelRecord(name="x", sha256=fingerprint(model), architecture="qwen3", n_layer=2, n_embd=WIDTH),
        seed=0,
        files={"vector": figures_of_file(vector), "adapter": figures_of_file(adapter, "gate")},
    ).write(folder / "metrics.json")  # fmt: skip
    return folder


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *map(str, arguments)])
    runpy.run_path(str(BENCHMARK), run_name="__main__")


def test_files_are_measured_on_each_quantisation_and_only_once(
    folder: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, recipe = tmp_path / "figures.json", tmp_path / "recipe.toml"
    recipe.write_text(f'judge = "{judge}"\n', encoding="utf-8")
    before = {path.name: sha256(path) for path in folder.iterdir()}
    options = (
        folder, "--types", "Q2_K", "--prompts", N, "--fit", recipe, "--work", tmp_path / "work",
        "--json", output,
    )  # fmt: skip
    measure(monkeypatch, *options)
    assert {path.name: sha256(path) for path in folder.iterdir()} == before
    source, smaller = figures = json.loads(output.read_text(encoding="utf-8"))
    assert smaller["quantisation"] == "Q2_K"
    assert smaller["types"]["Q2_K"] > 0.2
    assert smaller["bits_per_weight"] < source["bits_per_weight"] / 2
    hashes = set()
    for one in figures:
        record = RunRecord.of(one["published"], output)
        hashes.add(record.model.sha256)
        assert list(record.files) == ["vector", "adapter"]
        for file in record.files.values():
            assert {kind: found.n for kind, found in file.sets.items()} == dict.fromkeys(KINDS, N)
            assert file.benign_drift is not None
    assert len(hashes) == 2  # each model was measured itself
    lines = capsys.readouterr().out.splitlines()
    measured = [line.split(" | ")[1] for line in lines if ", published |" in line]
    assert measured == 2 * ["control vector, published", "gated adapter, published"]
    # Random weights answer no question. That is told, and the next model follows.
    assert len([line for line in lines if "| nothing fitted: the model cannot answer" in line]) == 2
    assert all("fitted" not in one for one in figures)

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", None)
    monkeypatch.setattr(remeasuring, "measure_files", None)
    measure(monkeypatch, *options)
    assert json.loads(output.read_text(encoding="utf-8")) == figures


def test_files_are_fitted_on_a_quantisation(
    folder: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "figures.json", tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps({**nested(SMALL), "judge": judge}), encoding="utf-8")
    measure(
        monkeypatch, folder, "--types", "--prompts", N, "--fit", recipe, "--work", tmp_path / "work",
        "--json", output,
    )  # fmt: skip
    (one,) = json.loads(output.read_text(encoding="utf-8"))
    record = RunRecord.of(one["fitted"], output)
    assert record.model.sha256 == RunRecord.of(one["published"], output).model.sha256
    assert list(record.files) == ["vector", "adapter"]
    assert record.baselines == ()


def test_an_unknown_quantisation_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no quantisation Q9"):
        measure(monkeypatch, folder, "--types", "Q9", "--work", tmp_path)
