"""Test a pair of files in llama.cpp against the same model with dense changes in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.adapters import PROMPTS, added, llama_logits
from fixtures.fit_samples import LAYERS, OPTIONS, WIDTH, samples_in
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.methods.pair import GatedPair
from rs_gguf.records.trials import Candidate
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

CANDIDATE = Candidate("pair", "", 0.3, 2, 4, 0.7, benign_target=0.4)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[LoraAdapter, SteeringVector]:
    method = GatedPair()
    fitted = method.fit(samples_in(tmp_path), OPTIONS)
    assert fitted is not None
    adapter, vector = method.files(fitted, CANDIDATE, "qwen2", {})
    assert isinstance(adapter, LoraAdapter)
    assert isinstance(vector, SteeringVector)
    assert vector.layers == adapter.layers == [2, 3, 4]
    steering_file.write(adapter, tmp_path / "adapter.gguf")
    steering_file.write(vector, tmp_path / "vector.gguf")
    return adapter, vector


def steering(folder: Path, scale: float = 1.0) -> Steering:
    """Return the steering of both files as they were written."""
    paths = (folder / "adapter.gguf", folder / "vector.gguf")
    adapter, vector = (steering_file.read(path).steering(path, scale) for path in paths)
    return adapter.with_added(vector)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_llama_cpp_computes_what_dense_changes_give(
    pair: tuple[LoraAdapter, SteeringVector], tmp_path: Path, scale: float
) -> None:
    """The reference adds scale · B A to the weights, and scale · direction after the layers."""
    adapter, vector = pair
    path = tmp_path / "model.gguf"
    network = write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    with added(network, adapter, scale), vector.apply(network, scale), torch.inference_mode():
        expected = np.stack([network(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])
    with torch.inference_mode():
        unsteered = np.stack([network(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])
    directions = steering(tmp_path, scale).directions
    found = llama_logits(path, tmp_path / "adapter.gguf", scale, directions)
    adapter_alone = llama_logits(path, tmp_path / "adapter.gguf", scale)
    effect = np.abs(expected - unsteered).max()
    assert effect > 0.1
    assert np.abs(adapter_alone - expected).max() > 0.05 * effect  # the vector matters
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


def test_a_constant_of_ffn_down_enters_where_the_adapter_does(tmp_path: Path) -> None:
    """Both together change the residual stream after a layer by −s d (aᵀx + c)."""
    samples = samples_in(tmp_path)
    inputs = {"ffn_down": samples.inputs["ffn_down"]}
    method = GatedPair()
    fitted: Any = method.fit(type(samples)(**{**vars(samples), "inputs": inputs}), OPTIONS)
    layer = 3
    candidate = Candidate("pair", "", 0.3, layer, layer, 0.7, benign_target=0.4)
    for name, file in zip(("adapter", "vector"), method.files(fitted, candidate, "qwen2", {}), strict=True):
        steering_file.write(file, tmp_path / f"{name}.gguf")
    write_tiny_qwen2(tmp_path / "model.gguf", n_layer=LAYERS, n_embd=WIDTH)
    with LlamaModel(tmp_path / "model.gguf", n_parallel=4, n_ctx=512, n_threads=1) as model:
        before = read_last(model, PROMPTS, [layer], ("l_out", "ffn_swiglu"))
        with model.steered(steering(tmp_path)):
            after = read_last(model, PROMPTS, [layer])
    k = list(fitted.ridges).index(0.3)
    gate = fitted.sensitive_gate["ffn_down"][k, layer] + 0.4 * fitted.benign_gate["ffn_down"][k, layer]
    constant = np.array([1, 0.4]) @ fitted.intercepts["ffn_down"][:, k, layer]
    activation = before["ffn_swiglu"][:, 0].astype(np.float64) @ gate + constant
    expected = -0.7 * activation[:, np.newaxis] * fitted.contrast[layer]
    change = (after["l_out"] - before["l_out"])[:, 0]
    np.testing.assert_allclose(change, expected, rtol=0, atol=1e-4 * np.abs(expected).max() + 1e-4)
