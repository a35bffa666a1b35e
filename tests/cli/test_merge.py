"""`rs-export merge`: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.adapters import factors
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli import merge as cli_merge
from rs_gguf.cli.main import main
from rs_gguf.steering import lora_file, merge_check, vector_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.merge import TYPES
from rs_gguf.steering.vector import SteeringVector

OUT = "blk.1.attn_output.weight"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["merge", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_embd=64)
    return path


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    a, b = factors(1, 64, 64)
    path = model.with_name("adapter.gguf")
    lora_file.write(LoraAdapter({OUT: (a, b * np.float32(0.25))}, "qwen2", {"model.sha256": "ab" * 32}), path)
    return path


def test_a_merge_says_what_changed_and_what_was_observed(model: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.gguf"
    code, stdout, stderr = invoke(f"{adapter}:0.5", "--model", model, "--output", output, "--type", "q8_0")
    assert code == 0
    changed, effect, check, path = stdout.splitlines()
    assert changed == "changed matrices: 1 F32 as Q8_0"
    assert effect.startswith("effect of the adapters: next-token KL divergence up to ")
    assert "32 positions" in check
    assert "(tolerance 0.05)" in check
    assert path == str(output)
    assert stderr.startswith(f"warning: {adapter}: the file was fitted on another model file")


def test_without_the_check_no_model_is_run(model: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.gguf"
    code, stdout, _ = invoke(adapter, f"{adapter}:-0.5", "--model", model, "--output", output, "--no-check")
    assert (code, stdout) == (0, f"changed matrices: 1 F32 as F32\n{output}\n")


def test_a_failed_check_is_exit_code_1(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rs_gguf.steering.merge.EXACT", -1.0)
    code, stdout, stderr = invoke(adapter, "--model", model, "--output", tmp_path / "merged.gguf")
    assert (code, stdout) == (1, "")
    assert "Error: the merged model differs from the model with the adapter" in stderr
    assert list(tmp_path.iterdir()) == []
    assert merge_check.EXACT > 0


def test_what_cannot_be_merged_is_exit_code_2(model: Path, adapter: Path, tmp_path: Path) -> None:
    vector_file.write(SteeringVector({1: np.ones(64, np.float32)}), tmp_path / "v.gguf")
    code, _, stderr = invoke(tmp_path / "v.gguf", "--model", model, "--output", tmp_path / "merged.gguf")
    assert (code, stderr.count("Error:")) == (2, 1)
    assert "--control-vector" in stderr
    code, _, stderr = invoke(adapter, "--model", model, "--output", model)
    assert code == 2
    assert "is one of the inputs" in stderr


def test_the_help_lists_the_types() -> None:
    assert tuple(TYPES) == cli_merge._TYPES
