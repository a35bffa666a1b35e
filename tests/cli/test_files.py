"""`rs-export check`, `inspect`, `convert` and `combine` on control vectors."""

# mypy: disable-error-code="dict-item"
# Some rows are lists or float64 arrays; the constructors convert them.
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fixtures.tiny_gguf import write_tiny_qwen2
from safetensors.torch import save_file

from rs_gguf.cli.main import main
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.container import finish
from rs_gguf.steering.vector import SteeringVector

WIDTH = 32


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def strict(text: str) -> Any:
    """Parse JSON strictly: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def row(seed: int, width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).standard_normal(width)


def written(path: Path, vector: SteeringVector) -> Path:
    control_vector.write(vector, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=4, n_embd=WIDTH)
    return path


@pytest.mark.slow
def test_check_on_a_model_prints_effect_and_divergence(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path / "v.gguf", SteeringVector({1: row(1), 3: row(3)}, {}, "qwen2"))
    code, stdout, _ = invoke("check", path, "--model", model)
    assert code == 0
    assert "effect observed on the model: the output of every layer changes by its direction" in stdout
    assert "next-token KL divergence, steered from unsteered: " in stdout
    code, stdout, _ = invoke("check", path, "--model", model, "--json")
    assert code == 0
    report = strict(stdout)
    assert (report["valid"], report["errors"], report["loader_says"]) == (True, [], "")
    assert report["effect_check"]["effect_observed"]
    assert set(report["effect_check"]["relative_error"]) == {"1", "3"}
    assert report["effect_check"]["kl_mean"] > 0


def test_check_on_another_model_is_strict_json_too(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path / "v.gguf", SteeringVector({1: row(1, 16)}, {}, "qwen2"))
    code, stdout, _ = invoke("check", path, "--model", model, "--json")
    report = strict(stdout)
    assert code == 1
    assert report["effect_check"]["kl_mean"] is None
    assert report["loader_says"] == "control vector n_embd does not match model"
    assert "llama.cpp would log: control vector n_embd" in invoke("check", path, "--model", model)[1]


def test_check_prints_the_line_that_the_loader_would_log(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.0", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, stdout, _ = invoke("check", tmp_path / "v.gguf")
    assert code == 1
    assert "error: 'direction.0': layer 0 cannot be steered" in stdout
    assert "llama.cpp would log: invalid (zero) direction tensor layer index in " in stdout
    assert stdout.endswith("v.gguf: not valid\n")


def test_inspect_shows_layers_norms_provenance_and_cosines(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"method": "wrmd", "strength": 0.5, "layers": [1, 3]}
    path = written(tmp_path / "v.gguf", SteeringVector({1: [3.0, 4.0], 3: [0.0, 2.0]}, facts, "qwen2"))
    other = written(tmp_path / "w.gguf", SteeringVector({1: [-3.0, -4.0], 2: [1.0, 0.0]}))
    code, stdout, _ = invoke("inspect", path, "--against", other, "--json")
    assert code == 0
    assert strict(stdout) == {
        "file": str(path),
        "kind": "control vector",
        "architecture": "qwen2",
        "width": 2,
        "layers": [1, 3],
        "norms": {"1": 5.0, "3": 2.0},
        "provenance": {"layers": [1, 3], "method": "wrmd", "strength": 0.5},
        "cosine": {"1": pytest.approx(-1.0)},
    }
    code, stdout, _ = invoke("inspect", path, "--against", other)
    assert code == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if "│" in line]
    assert ["1", "5", "-1.000"] in lines
    assert ["3", "2", ""] in lines
    assert "wrmd" in stdout


def test_inspect_escapes_untrusted_text(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x9b31mred\r\u202e"
    path = written(tmp_path / "v.gguf", SteeringVector({1: [1.0]}, {"note": hostile}, hostile))
    code, stdout, _ = invoke("inspect", path)
    assert code == 0
    assert not set(stdout) & set("\x1b\x9b\r\u202e")
    assert "\\x1b[2J\\x9b31mred\\r\\u202e" in stdout
    assert strict(invoke("inspect", path, "--json")[1])["provenance"]["note"] == hostile


def test_convert_explains_its_changes_and_asks_for_the_model(tmp_path: Path) -> None:
    save_file({"layer_2": torch.from_numpy(row(2)).float()}, tmp_path / "v.safetensors")
    command = ("convert", tmp_path / "v.safetensors", "--from", "huggingface")
    code, stdout, stderr = invoke(*command, "--output", tmp_path / "v.gguf", "--base", 1)
    assert (code, stdout) == (0, f"{tmp_path / 'v.gguf'}\n")
    assert "Moved every direction by -1: huggingface numbers layer 0 as 1" in stderr
    assert "give the model family with --architecture" in stderr
    assert "model_hint is missing" in invoke("check", tmp_path / "v.gguf")[1]
    code, _, stderr = invoke(*command, "--output", tmp_path / "w.gguf", "--architecture", "qwen2")
    assert (code, stderr) == (0, "")
    assert invoke("check", tmp_path / "w.gguf") == (0, f"{tmp_path / 'w.gguf'}: valid\n", "")
    assert control_vector.read(tmp_path / "w.gguf").architecture == "qwen2"


def test_combine_adds_vectors_of_different_layers(tmp_path: Path) -> None:
    a = written(
        tmp_path / "a.gguf", SteeringVector({1: [1.0, 2.0], 2: [1.0, 0.0]}, {"method": "md"}, "qwen2")
    )
    b = written(tmp_path / "b.gguf", SteeringVector({2: [0.0, 4.0], 5: [2.0, 2.0]}, {"method": "rmd"}))
    code, stdout, _ = invoke("combine", a, f"{b}:-0.5", "--output", tmp_path / "sum.gguf")
    assert (code, stdout) == (0, f"{tmp_path / 'sum.gguf'}\n")
    total = control_vector.read(tmp_path / "sum.gguf")
    assert {n: values.tolist() for n, values in total.directions.items()} == {
        1: [1.0, 2.0],
        2: [1.0, -2.0],
        5: [-1.0, -1.0],
    }
    assert (total.provenance["combine.0.method"], total.provenance["combine.1.method"]) == ("md", "rmd")
    assert (total.provenance["combine.0.weight"], total.provenance["combine.1.weight"]) == (1.0, -0.5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["a.gguf", "narrow.gguf"], "widths 2 and 1: they belong to different models"),
        (["a.gguf", "a.gguf:-1"], "every direction is zero"),
        (["a.gguf:much"], "Give PATH or PATH:SCALE"),
        (["a.gguf:nan"], "finite number"),
    ],
)
def test_combine_refuses_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("a.gguf"), SteeringVector({1: [1.0, 2.0]}))
    written(Path("narrow.gguf"), SteeringVector({1: [1.0]}))
    code, _, stderr = invoke("combine", *parts, "--output", "sum.gguf")
    assert code == 2
    assert message in stderr
    assert not Path("sum.gguf").exists()


def test_glp_files_are_inspected_and_converted_both_ways(tmp_path: Path, model: Path) -> None:
    source, adapter, back = tmp_path / "v.gguf", tmp_path / "a.gguf", tmp_path / "w.gguf"
    unit = (row(2) / np.linalg.norm(row(2))).astype(np.float32)
    writer = gguf.GGUFWriter(source, "controlvector")
    writer.add_string("glp.mode", "project")
    writer.add_float32("glp.alpha_default", 1.0)
    writer.add_tensor("direction.2", unit)
    finish(writer)
    code, stdout, _ = invoke("check", source)
    assert code == 1
    assert "llama.cpp would add them" in stdout
    code, stdout, _ = invoke("inspect", source, "--against", source, "--json")
    assert code == 0
    content = strict(stdout)
    assert (content["kind"], content["alpha"], content["layers"]) == ("GLP projection", 1.0, [2])
    assert content["cosine"] == {"2": pytest.approx(1)}
    assert "GLP projection" in invoke("inspect", source)[1]
    code, stdout, stderr = invoke("convert", source, "--from", "glp", "--model", model, "--output", adapter)
    assert (code, stdout) == (0, f"{adapter}\n")
    assert "changes what each matrix adds" in stderr
    code, _, stderr = invoke("convert", adapter, "--to", "glp", "--model", model, "--output", back)
    assert code == 0
    assert "removes the whole component" in stderr
    content = strict(invoke("inspect", source, "--against", back, "--json")[1])
    assert content["cosine"] == {"2": pytest.approx(1)}


def test_glp_files_need_their_model(tmp_path: Path) -> None:
    code, _, stderr = invoke("convert", tmp_path / "v.gguf", "--from", "glp", "--output", tmp_path / "a.gguf")
    assert code == 2
    assert "--from glp needs --model" in stderr
