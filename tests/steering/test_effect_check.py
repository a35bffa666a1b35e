"""The result of `check --model` for a vector, on a tiny model that llama.cpp runs."""

# mypy: disable-error-code="dict-item"
# Some rows are lists or float64 arrays; the constructors convert them.
from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_gguf
from fixtures.adapters import factors
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.records import files
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.effect_check import TOLERANCE, check_vector_effect
from rs_gguf.steering.file import check
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import write

N_LAYER, WIDTH = 4, 32


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=N_LAYER, n_embd=WIDTH)
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[LlamaModel]:
    with LlamaModel(file, n_parallel=4, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def vector(*layers: int, length: float = 1.0, width: int = WIDTH) -> SteeringVector:
    rng = np.random.default_rng(5)
    rows = {layer: rng.standard_normal(width) for layer in layers}
    return SteeringVector({n: length * row / np.linalg.norm(row) for n, row in rows.items()}, {}, "qwen2")


@pytest.mark.parametrize("scale", [1.0, -0.5, 3.0, 1e-4])
def test_every_layer_changes_by_scale_times_direction(model: LlamaModel, scale: float) -> None:
    """The check accepts the short direction, although rounding makes its relative error larger."""
    effect = check_vector_effect(vector(1, 2, 3).scaled(scale), model)
    assert effect.reasons == ()
    assert effect.effect_observed
    assert list(effect.relative_error) == ["1", "2", "3"]
    assert effect.largest_relative_error < (TOLERANCE if abs(scale) > 0.01 else 0.1)
    assert effect.kl_mean is not None
    assert effect.kl_mean > 0


def test_a_zero_direction_among_others_is_accepted(model: LlamaModel) -> None:
    rows = {1: np.zeros(WIDTH, np.float32), 2: vector(2).directions[2]}
    effect = check_vector_effect(SteeringVector(rows), model)
    assert effect.effect_observed
    assert effect.relative_error["1"] == 0.0


@pytest.mark.parametrize(
    ("steering", "message", "loader_says"),
    [
        (vector(1, width=16), "width 16 but tiny.gguf has 32", "control vector n_embd does not match model"),
        (vector(1, 7, 9), "layers [7, 9] do not exist: tiny.gguf has layers 0 to 3", ""),
        (vector(1, N_LAYER), "If the file counts layers from 1", ""),
        (
            vector(2, length=1e-12),
            "so short that F32 rounding of the residual stream removes it (largest norm 1e-12)",
            "",
        ),
        (
            SteeringVector({1: 1e-9 * np.ones(WIDTH), 2: np.ones(WIDTH)}),
            "layers [1]: the direction is so short that F32 rounding",
            "",
        ),
        (
            SteeringVector({n: np.full(WIDTH, 3e38) for n in (1, 2)}),
            "probabilities are NaN or infinite: the direction norms are too large",
            "",
        ),
    ],
)
def test_a_vector_that_does_not_fit_the_model_is_reported(
    tmp_path: Path, file: Path, steering: SteeringVector, message: str, loader_says: str
) -> None:
    write(steering, tmp_path / "v.gguf")
    assert check(tmp_path / "v.gguf").valid  # only the model shows the error
    report = check(tmp_path / "v.gguf", file)
    assert len(report.errors) == 1
    assert message in report.errors[0]
    assert report.loader_says == loader_says
    assert report.effect is not None
    assert not report.effect.effect_observed


def test_a_file_fitted_on_another_model_file_is_reported(tmp_path: Path, file: Path) -> None:
    """A model of the same shape passes the effect check, but the measurements do not hold for it."""
    for sha256, expected in ((files.sha256(file), False), ("0" * 64, True), (None, False)):
        facts = {"model.name": "other"} | ({"model.sha256": sha256} if sha256 else {})
        write(SteeringVector(vector(1).directions, facts), tmp_path / "v.gguf")
        matrix = {"blk.1.ffn_down.weight": factors(1, 2 * WIDTH, WIDTH)}
        lora.write(LoraAdapter(matrix, "qwen2", facts), tmp_path / "a.gguf")
        for report in (check(tmp_path / "v.gguf", file), check(tmp_path / "a.gguf", file)):
            assert report.valid
            assert sum("fitted on another model file, 'other'" in w for w in report.warnings) == expected


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0.0, "ignores control vectors"),
        (0.5, "does not change by the direction (relative error 0.5 at layer"),
        (0.99, "does not change by the direction (relative error 0.01 at layer"),
        (-1.0, "does not change by the direction (relative error 2 at layer"),
    ],
)
def test_a_runtime_with_another_effect_is_found(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, factor: float, message: str
) -> None:
    steered = LlamaModel.steered

    @contextlib.contextmanager
    def changed(self: LlamaModel, steering: Steering) -> Iterator[None]:
        with steered(self, steering.scaled(factor)):
            yield

    monkeypatch.setattr(LlamaModel, "steered", changed)
    effect = check_vector_effect(vector(1, 2, 3), model)
    assert not effect.effect_observed
    assert len(effect.reasons) == 1
    assert message in effect.reasons[0]


def test_a_single_layer_without_effect_is_found(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steered = LlamaModel.steered

    @contextlib.contextmanager
    def changed(self: LlamaModel, steering: Steering) -> Iterator[None]:
        with steered(self, Steering({n: row * (n != 2) for n, row in steering.directions.items()})):
            yield

    monkeypatch.setattr(LlamaModel, "steered", changed)
    effect = check_vector_effect(vector(1, 2, 3), model)
    assert effect.reasons[0].startswith("layers [2]: the residual stream does not change")
    assert effect.relative_error["2"] == pytest.approx(1.0)


def test_a_full_disk_raises_and_is_not_an_error_of_the_adapter(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    lora.write(LoraAdapter({"blk.1.ffn_down.weight": factors(1, 2 * WIDTH, WIDTH)}, "qwen2"), path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"cannot write.*set TMPDIR"):
        check(path, file)


def test_a_failure_after_loading_raises_and_is_not_an_error_of_the_adapter(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise InputError("no memory")

    lora.write(LoraAdapter({"blk.1.ffn_down.weight": factors(1, 2 * WIDTH, WIDTH)}, "qwen2"), tmp_path / "a")
    monkeypatch.setattr(LlamaModel, "next_logits", full)
    with pytest.raises(InputError, match="no memory"):
        check(tmp_path / "a", file)


@pytest.mark.slow
def test_a_template_with_a_long_system_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_gguf, "CHAT_TEMPLATE", 1030 * "x" + tiny_gguf.CHAT_TEMPLATE)
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=N_LAYER, n_embd=WIDTH)
    write(vector(1), tmp_path / "v.gguf")
    matrix = {"blk.1.ffn_down.weight": factors(1, 2 * WIDTH, WIDTH)}
    lora.write(LoraAdapter(matrix, "qwen2"), tmp_path / "a.gguf")
    assert check(tmp_path / "v.gguf", tmp_path / "tiny.gguf").errors == ()
    assert check(tmp_path / "a.gguf", tmp_path / "tiny.gguf").errors == ()
