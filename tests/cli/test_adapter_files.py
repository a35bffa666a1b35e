"""`rs-export check`, `inspect`, `combine` and `convert` on LoRA adapters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.adapters import factors, random_adapter
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.main import main
from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

DOWN = "blk.1.ffn_down.weight"


PROVENANCE: dict[str, Any] = {"method": "gate", "model.sha256": "ab" * 32, "strength": 0.5}


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    lora.write(LoraAdapter(random_adapter().factors, "qwen2", PROVENANCE), tmp_path / "a.gguf")
    return tmp_path / "a.gguf"


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    control_vector.write(
        SteeringVector({1: np.ones(32, np.float32)}, architecture="qwen2"), tmp_path / "v.gguf"
    )
    return tmp_path / "v.gguf"


def test_check_of_the_file_alone(adapter: Path) -> None:
    assert invoke("check", adapter) == (0, f"{adapter}: valid\n", "")
    code, stdout, _ = invoke("check", adapter, "--json")
    assert code == 0
    report = json.loads(stdout)
    assert (report["valid"], report["errors"], report["warnings"], report["effect_check"]) == (
        True,
        [],
        [],
        None,
    )


@pytest.mark.slow
def test_check_on_a_model_observes_the_effect(adapter: Path, model: Path) -> None:
    code, stdout, _ = invoke("check", adapter, "--model", model)
    assert code == 0
    assert "effect observed on the model: each product changes by B A x" in stdout
    code, stdout, _ = invoke("check", adapter, "--model", model, "--json")
    effect = json.loads(stdout)["effect_check"]
    assert effect["effect_observed"]
    assert set(effect["relative_error"]) == set(random_adapter().factors)
    assert effect["kl_mean"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "no logit changes"), (0.95, "does not change by B A x")]
)
def test_check_finds_a_runtime_with_another_effect(
    adapter: Path, model: Path, factor: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered = LlamaModel.steered

    @contextlib.contextmanager
    def changed(self: LlamaModel, steering: Steering) -> Iterator[None]:
        with steered(self, steering.scaled(factor)):
            yield

    monkeypatch.setattr(LlamaModel, "steered", changed)
    code, stdout, _ = invoke("check", adapter, "--model", model)
    assert code == 1
    assert message in stdout
    assert "effect observed" not in stdout
    assert stdout.endswith("not valid\n")


def test_check_on_another_model_reports_why_and_exits_1(tmp_path: Path, model: Path) -> None:
    lora.write(LoraAdapter({DOWN: factors(1, 8, 32)}, "qwen2"), tmp_path / "a.gguf")
    code, stdout, _ = invoke("check", tmp_path / "a.gguf", "--model", model)
    assert code == 1
    assert "error: llama.cpp cannot load the adapter" in stdout
    assert f"tensor '{DOWN}' has incorrect shape" in stdout


@pytest.mark.slow
def test_check_on_a_model_skips_a_change_of_zero(tmp_path: Path, model: Path) -> None:
    whole = random_adapter()
    a, b = whole.factors[DOWN]
    path = tmp_path / "zero.gguf"
    lora.write(LoraAdapter({**whole.factors, DOWN: (a, 0 * b)}, whole.architecture), path)
    code, stdout, stderr = invoke("check", path, "--model", model, "--json")
    assert (code, stderr) == (0, "")
    assert set(json.loads(stdout)["effect_check"]["relative_error"]) == set(whole.factors) - {DOWN}


def test_check_of_a_damaged_adapter(adapter: Path) -> None:
    adapter.write_bytes(adapter.read_bytes()[:-400])
    code, stdout, _ = invoke("check", adapter)
    assert code == 1
    assert "not a sound GGUF file" in stdout
    code, _, stderr = invoke("inspect", adapter)
    assert (code, stderr.count("Error:")) == (2, 1)


def test_inspect_shows_matrices_rank_norms_and_provenance(adapter: Path) -> None:
    code, stdout, _ = invoke("inspect", adapter, "--json")
    assert code == 0
    content = json.loads(stdout)
    expected = random_adapter()
    assert (content["kind"], content["architecture"], content["rank"]) == ("adapter", "qwen2", 2)
    assert (content["layers"], content["matrices"]) == ([0, 1, 2], ["attn_output", "ffn_down"])
    assert content["norms"] == pytest.approx(expected.norms)
    assert content["provenance"] == PROVENANCE
    code, stdout, _ = invoke("inspect", adapter)
    assert code == 0
    assert "…" not in stdout  # no hash is cut off
    for text in ("adapter", "ffn_down", "strength", "gate", DOWN, f"{expected.norms[DOWN]:.4g}"):
        assert text in stdout


def test_inspect_compares_adapters(adapter: Path, tmp_path: Path) -> None:
    a, b = random_adapter().factors[DOWN]
    lora.write(LoraAdapter({DOWN: (a, -2 * b)}, "qwen2"), tmp_path / "b.gguf")
    code, stdout, _ = invoke("inspect", adapter, "--against", tmp_path / "b.gguf", "--json")
    assert code == 0
    assert json.loads(stdout)["cosine"] == {DOWN: pytest.approx(-1)}
    assert "-1.000" in invoke("inspect", adapter, "--against", tmp_path / "b.gguf")[1]


def test_inspect_names_the_kind_of_a_vector(vector: Path) -> None:
    content = json.loads(invoke("inspect", vector, "--against", vector, "--json")[1])
    assert (content["kind"], content["width"], content["cosine"]) == (
        "control vector",
        32,
        {"1": pytest.approx(1)},
    )


def test_combine_adds_adapters(adapter: Path, tmp_path: Path) -> None:
    code, stdout, _ = invoke("combine", f"{adapter}:0.5", f"{adapter}:-2", "--output", tmp_path / "sum.gguf")
    assert (code, stdout) == (0, f"{tmp_path / 'sum.gguf'}\n")
    total = lora.read(tmp_path / "sum.gguf")
    assert total.rank == 4
    for name, (a, b) in random_adapter().factors.items():
        sum_a, sum_b = total.factors[name]
        np.testing.assert_allclose(sum_b @ sum_a, -1.5 * b @ a, atol=1e-5)
    assert total.provenance["combine.1.weight"] == -2.0
    assert total.provenance["combine.1.method"] == "gate"


def test_a_vector_and_an_adapter_cannot_be_combined(adapter: Path, vector: Path, tmp_path: Path) -> None:
    for arguments in (
        ("combine", vector, f"{adapter}:2", "--output", tmp_path / "sum.gguf"),
        ("inspect", adapter, "--against", vector),
    ):
        code, _, stderr = invoke(*arguments)
        assert code == 2
        assert f"{vector} is a control vector and {adapter} a LoRA adapter" in stderr
        assert f"--control-vector {vector} --lora {adapter}" in stderr
    assert not (tmp_path / "sum.gguf").exists()


def test_convert_to_peft(adapter: Path, model: Path, tmp_path: Path) -> None:
    code, stdout, _ = invoke(
        "convert", adapter, "--to", "peft", "--model", model, "--output", tmp_path / "peft"
    )
    assert (code, stdout) == (0, f"{tmp_path / 'peft'}\n")
    names = {path.name for path in (tmp_path / "peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --from"),
        (["--from", "repeng", "--to", "peft"], "give either --from"),
        (["--to", "peft"], "--to peft needs --model"),
        (["--to", "peft", "--model", "m.gguf", "--base", 1], "accepts neither --base nor --architecture"),
        (["--to", "peft", "--model", "m.gguf", "--architecture", "qwen2"], "nor --architecture"),
        (["--from", "repeng", "--model", "m.gguf"], "--model is accepted only with --to"),
        (["--from", "repeng"], "needs no conversion"),
        (["--to", "peft", "--model", "./absent.gguf"], "cannot find the model './absent.gguf'"),
    ],
)
def test_convert_refuses_options_that_do_not_match(
    adapter: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    code, _, stderr = invoke("convert", adapter, *options, "--output", tmp_path / "out")
    assert code == 2
    assert message in stderr
    assert stderr.count("Error:") == 1
    assert not (tmp_path / "out").exists()


def test_only_adapters_are_exported_to_peft(vector: Path, model: Path, tmp_path: Path) -> None:
    code, _, stderr = invoke(
        "convert", vector, "--to", "peft", "--model", model, "--output", tmp_path / "out"
    )
    assert code == 2
    assert "not a usable LoRA adapter" in stderr
