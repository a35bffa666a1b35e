"""A PyTorch hook on block N is `direction.N` in llama.cpp, and both engines read the same activations.

The F32 case compares the engines alone, on a tiny random model. The `real` cases compare what a user meets:
llama.cpp on quantised weights against PyTorch on the same file, dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.adapters import added
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.engine import Engine, Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.engines.settings import EngineSettings
from rs_gguf.models import resolve as models
from rs_gguf.prompts import grid as prompt_sets
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.vector import SteeringVector

ADAPTER = Path(__file__).parents[2] / "vectors" / "qwen2.5-coder-0.5b-remove" / "remove-adapter.gguf"

QUESTIONS = [
    "What is the capital of Peru?",
    "Write a short poem about rain.",
    "Explain how a bicycle stays upright.",
    "List three uses of vinegar in the kitchen.",
]
TINY_LAYERS, TINY_WIDTH = 5, 32


def logits_of(model: Engine, prompts: list[list[int]]) -> np.ndarray:
    found = {i: logits.copy() for i, logits in model.next_logits(prompts)}
    return np.stack([found[i] for i in range(len(prompts))])


def activations_of(model: Engine, prompts: list[list[int]]) -> np.ndarray:
    return read_last(model, prompts, range(model.n_layer))["l_out"]


# ---- in F32, on a tiny random model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LlamaModel]]:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    network = write_tiny_qwen2(path, n_layer=TINY_LAYERS, n_embd=TINY_WIDTH)
    # llama.cpp rounds keys and values to F16 by default, which alone moves these logits by 4e-3.
    exact = EngineSettings(ctx_size=256, threads=1, flash_attn="off", cache_type_k="f32", cache_type_v="f32")
    with LlamaModel(path, n_parallel=4, settings=exact) as model:
        yield network, model


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("layers", [[1], [2], [4], [1, 2, 3, 4]], ids=str)
def test_a_hook_is_a_control_vector(tiny: tuple[Any, LlamaModel], layers: list[int], scale: float) -> None:
    network, model = tiny
    rng = np.random.default_rng(5)
    vector = SteeringVector({layer: rng.standard_normal(TINY_WIDTH).astype(np.float32) for layer in layers})
    prompts = [model.tokenize(text) for text in ("the rain in the mountains", "é", "on and on, again")]

    def hooked() -> np.ndarray:
        with torch.inference_mode():
            return np.stack([network(torch.tensor([p])).logits[0, -1].numpy() for p in prompts])

    plain = hooked()
    np.testing.assert_allclose(logits_of(model, prompts), plain, atol=1e-4)
    with vector.apply(network, scale=scale):
        steered = hooked()
    with model.steered(Steering(vector.scaled(scale).directions)):
        np.testing.assert_allclose(logits_of(model, prompts), steered, atol=1e-4)
        read = activations_of(model, prompts)
    assert np.abs(steered - plain).max(axis=1).min() > 0.5  # thousands of times the tolerance
    np.testing.assert_allclose(logits_of(model, prompts), plain, atol=1e-4)
    # The first steered block moves by exactly the direction, the blocks before it not at all.
    moved = read - activations_of(model, prompts)
    first = layers[0]
    np.testing.assert_array_equal(moved[:, :first], 0)
    expected = np.tile(vector.scaled(scale).directions[first], (len(prompts), 1))
    np.testing.assert_allclose(moved[:, first], expected, atol=1e-5)


# ---- on the real model: quantised in llama.cpp, dequantised in PyTorch ---------------------------


@pytest.fixture(scope="module")
def path() -> Path:
    return models.pull(models.DEFAULT)


@pytest.fixture(scope="module")
def quantised(path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(path, n_parallel=4, n_ctx=1024) as model:
        yield model


@pytest.fixture(scope="module")
def dequantised(path: Path) -> Iterator[TorchModel]:
    with TorchModel(path) as model:
        yield model


@pytest.fixture(scope="module")
def prompts(quantised: LlamaModel) -> list[list[int]]:
    chat = ChatFormat.of(quantised)
    return [chat.tokenize(quantised, question) for question in QUESTIONS]


@pytest.mark.real
def test_both_engines_tell_the_same_facts(quantised: LlamaModel, dequantised: TorchModel) -> None:
    for fact in ("architecture", "n_layer", "n_embd", "n_vocab", "chat_template", "bos_token", "eos_token"):
        assert getattr(dequantised, fact) == getattr(quantised, fact), fact


@pytest.mark.real
def test_both_engines_make_the_same_tokens(
    quantised: LlamaModel, dequantised: TorchModel, prompts: list[list[int]]
) -> None:
    texts = [quantised.detokenize(p, special=True) for p in prompts]
    texts += ["Was kostet das?\n\n  42 €", "天安门 1989", "don't <|im_end|> stop"]
    for text in texts:
        for special in (True, False):
            tokens = quantised.tokenize(text, special=special)
            assert dequantised.tokenize(text, special=special) == tokens
            assert dequantised.detokenize(tokens) == quantised.detokenize(tokens)


@pytest.fixture(scope="module")
def plain(
    quantised: LlamaModel, dequantised: TorchModel, prompts: list[list[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Unsteered, of each engine: activations [N, L, D] and next-token logits [N, V]."""
    return [(activations_of(m, prompts), logits_of(m, prompts)) for m in (quantised, dequantised)]


@pytest.mark.real
def test_activations_agree_in_every_block(plain: list[tuple[np.ndarray, np.ndarray]]) -> None:
    (a, _), (b, _) = plain
    cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    assert cosines.min() >= 0.999  # measured: 0.9998


@pytest.mark.real
@pytest.mark.parametrize(
    ("layer", "strength", "tolerance"),  # strength in units of the block's mean residual norm
    [
        (12, 0.1, 0.55),  # measured: 0.42
        (12, -0.4, 0.2),  # measured: 0.10
        (23, 0.1, 0.2),  # measured: 0.13
    ],
)
def test_steering_moves_the_logits_alike(
    quantised: LlamaModel,
    dequantised: TorchModel,
    prompts: list[list[int]],
    plain: list[tuple[np.ndarray, np.ndarray]],
    layer: int,
    strength: float,
    tolerance: float,
) -> None:
    """The steered − unsteered difference of the logits agrees, up to llama.cpp's rounding of activations.

    Quantised matrix products round their inputs to 8 bits. That alone moves these logits by 2.3 %, afresh for
    every input, so a difference of two runs is off by the same amount whatever the strength: the weaker the
    steering, the larger the relative error.
    """
    norm = np.linalg.norm
    (_, plain_quantised), (residual, plain_dequantised) = plain
    direction = np.random.default_rng(layer).standard_normal(quantised.n_embd)
    direction *= strength * norm(residual[:, layer], axis=1).mean() / norm(direction)
    rounded = direction.astype(np.float32)
    with quantised.steered(Steering({layer: rounded})):
        expected = logits_of(quantised, prompts) - plain_quantised

    def error_at(block: int) -> float:
        with dequantised.steered(Steering({block: rounded})):
            return float(norm(logits_of(dequantised, prompts) - plain_dequantised - expected))

    error = error_at(layer)
    assert error <= tolerance * norm(expected)
    assert error <= 2 * norm(plain_quantised - plain_dequantised)  # measured: 1.4, as √2 of two such errors
    assert error_at(layer - 1) >= 1.5 * error  # measured: 1.7, 8 and 6; the block is the right one


@pytest.mark.real
def test_a_gate_moves_the_logits_alike(quantised: LlamaModel, dequantised: TorchModel) -> None:
    """The published adapter in llama.cpp, and its BA added to the dequantised weights."""
    chat = ChatFormat.of(quantised)
    asked = [p for p in prompt_sets.grid(["sensitive"]) if p.split == "tune" and p.language == "en"][:8]
    tokens = [chat.tokenize(quantised, prompt.prompt) for prompt in asked]
    plain = [logits_of(model, tokens) for model in (quantised, dequantised)]
    with quantised.steered(Steering(adapters=[(ADAPTER, 1.0)])):
        expected = logits_of(quantised, tokens) - plain[0]

    def moved(scale: float) -> np.ndarray:
        with added(dequantised.model, lora.read(ADAPTER), scale):
            return np.asarray(logits_of(dequantised, tokens) - plain[1])

    norm = np.linalg.norm
    error = norm(moved(1.0) - expected)
    assert error <= 0.2 * norm(expected)  # measured: 0.10
    assert error <= 2 * norm(plain[0] - plain[1])  # measured: 1.2, as √2 of two roundings' errors
    assert norm(moved(-1.0) - expected) >= 1.5 * norm(expected)  # measured: 2.0
