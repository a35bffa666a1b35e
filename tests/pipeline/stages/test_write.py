"""Test that written files have the selected candidate's effect and provenance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rs_gguf.methods.adapter import GatedAdapter
from rs_gguf.methods.vector import ControlVector
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Fit
from rs_gguf.pipeline.stages import write as writing
from rs_gguf.records.files import save_arrays
from rs_gguf.records.trials import GATED_ADAPTER, Candidate, Trial
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.file import SteeringFile

RECIPE = Recipe(fit=Fit(estimators=["wrmd"], ridges=[0.5], gate_ridges=[0.5]))
VECTOR, ADAPTER = (
    Candidate("vector", "wrmd", 0.5, 1, 2, 1.75),
    Candidate("adapter", "", 0.5, 1, 2, 1.75, benign_target=0.25),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the fit of a model of 4 layers, and both files from it."""
    rng = np.random.default_rng(0)
    directions = {"wrmd@0.5/unit": rng.standard_normal((4, 8)), "wrmd@0.5/scales": np.arange(1.0, 5.0)}
    save_arrays(tmp_path / "directions.safetensors", directions)
    names = ("sensitive_gate/ffn_down", "benign_gate/ffn_down")
    gates = {name: rng.standard_normal((1, 4, 16)) for name in names}
    arrays = {"ridges": np.array([0.5]), "contrast": rng.standard_normal((4, 8)), **gates}
    save_arrays(tmp_path / "gated_adapter.safetensors", arrays)
    for name, candidate in (("v.gguf", VECTOR), ("a.gguf", ADAPTER)):
        trial = Trial(0, candidate, "short", 0.0, 1.0)
        writing.write(tmp_path / name, trial, RECIPE, tmp_path, "qwen2", {"model.name": "tiny"})
    return tmp_path


def test_both_files_have_their_provenance(folder: Path) -> None:
    files: list[SteeringFile] = [control_vector.read(folder / "v.gguf"), lora.read(folder / "a.gguf")]
    for file, candidate, estimator in zip(files, (VECTOR, ADAPTER), ("wrmd", GATED_ADAPTER), strict=True):
        expected = {
            "model.name": "tiny",
            "estimator": estimator,
            "ridge.relative": 0.5,
            "layers": [1, 2],
            "strength": 1.75,
            "benign_target": candidate.benign_target,
            "measured": False,
        }
        assert {name: file.provenance[name] for name in expected} == expected
        assert file.architecture == "qwen2"


def test_both_files_are_the_selected_candidates_at_scale_1(folder: Path) -> None:
    vector = ControlVector().load(folder, RECIPE.fit_options)["wrmd", 0.5].steering(VECTOR)
    np.testing.assert_equal(dict(control_vector.read(folder / "v.gguf").directions), vector)
    gates = GatedAdapter().load(folder, RECIPE.fit_options)
    assert gates is not None
    expected = gates.factors(0.5, 1, 2, 1.75, 0.25)
    np.testing.assert_equal(dict(lora.read(folder / "a.gguf").factors), expected)


def test_an_estimator_without_a_ridge_has_none_in_its_provenance(tmp_path: Path) -> None:
    directions = {"md@0/unit": np.eye(4, 8), "md@0/scales": np.ones(4)}
    save_arrays(tmp_path / "directions.safetensors", directions)
    recipe = Recipe(fit=Fit(estimators=["md"]))
    trial = Trial(0, Candidate("vector", "md", 0.0, 1, 2, 1.0), "short", 0.0, 1.0)
    writing.write(tmp_path / "v.gguf", trial, recipe, tmp_path, "qwen2", {})
    provenance = control_vector.read(tmp_path / "v.gguf").provenance
    assert provenance["estimator"] == "md"
    assert "ridge.relative" not in provenance
