"""Files of the real source tools keep their effect through `convert`, on tiny random models.

repeng, steering-vectors and saklas come from PyPI without their requirements: two pin NumPy 1 and
transformers 4, the third brings a server. The functions used here work with the installed versions.
llama-cvector-generator is built from llama.cpp's source.
"""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from fixtures.architectures import llama
from fixtures.binaries import package, program
from fixtures.tiny_gguf import write_tiny_qwen2
from safetensors.torch import save_file

from rs_gguf.cli.main import main
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.vector import SteeringVector

pytestmark = pytest.mark.slow

WIDTH, N_LAYER = 32, 4
PROMPT = torch.tensor([[5, 9, 17, 33, 2, 8]])
PAIRS = [(f"w{5 + k} w{9 + k} w3", f"w{50 + k} w{90 - k} w4") for k in range(8)]


@pytest.fixture
def network() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=N_LAYER,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(11)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, 128)}
    by_word = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    by_word.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        values: torch.Tensor = model(PROMPT).logits
    return values


def converted(path: Path, origin: str) -> SteeringVector:
    """Convert a file with the command and return the vector."""
    output = path.with_name("converted.gguf")
    done = CliRunner().invoke(main, ["convert", str(path), "--from", origin, "--output", str(output)])
    assert done.exit_code == 0, done.output
    return control_vector.read(output)


def assert_same_effect(
    vector: SteeringVector,
    scale: float,
    network: transformers.PreTrainedModel,
    theirs: torch.Tensor,
    plain: torch.Tensor,
) -> None:
    with vector.apply(network, scale):
        torch.testing.assert_close(logits(network), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.01


def test_repeng(
    network: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(package("repeng==0.4.0"))
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # NumPy 2 removed this name
    repeng = importlib.import_module("repeng")
    plain = logits(network)
    wrapped = repeng.ControlModel(network, [1, 2, 3])
    dataset = [repeng.DatasetEntry(positive=a, negative=b) for a, b in PAIRS]
    trained = repeng.ControlVector.train(wrapped, tokenizer, dataset)
    file = tmp_path / "repeng.gguf"
    (trained * np.float64(3.0)).export_gguf(file)  # the NumPy scale makes it F64
    assert any("F64" in reason for reason in control_vector.check(file).errors)
    vector = converted(file, "repeng")
    assert vector.layers == [1, 2, 3]
    theirs = {}
    for coefficient in (1.0, -0.5):
        wrapped.set_control(trained, 3.0 * coefficient)
        theirs[coefficient] = logits(wrapped)
    wrapped.unwrap()
    for coefficient, expected in theirs.items():
        assert_same_effect(vector, coefficient, network, expected, plain)


def test_steering_vectors(
    network: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(package("steering-vectors==0.12.2"))
    steering_vectors = importlib.import_module("steering_vectors")
    plain = logits(network)
    trained = steering_vectors.train_steering_vector(network, tokenizer, PAIRS, layers=[1, 3])
    file = tmp_path / "v.safetensors"
    save_file({str(layer): row for layer, row in trained.layer_activations.items()}, file)
    vector = converted(file, "steering-vectors")
    assert vector.layers == [1, 3]
    with trained.apply(network, multiplier=-4.0):
        theirs = logits(network)
    assert_same_effect(vector, -4.0, network, theirs, plain)


def test_saklas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of its formats number layers as this project does and include layer 0, which cannot be steered."""
    monkeypatch.syspath_prepend(package("saklas==5.3.0"))
    gguf_io = importlib.import_module("saklas.io.gguf_io")
    profile = importlib.import_module("saklas.core.profile")
    rows = dict(enumerate(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))))
    gguf_io.write_gguf_profile(rows, tmp_path / "v.gguf", model_hint="llama")
    assert "layer 0" in control_vector.check(tmp_path / "v.gguf").errors[0]
    profile.save_profile(rows, tmp_path / "v.safetensors", {"method": "profile"})
    for name in ("v.gguf", "v.safetensors"):
        vector = converted(tmp_path / name, "saklas")
        assert vector.layers == [1, 2]
        assert all(np.array_equal(vector.directions[layer], rows[layer].numpy()) for layer in (1, 2))


@pytest.mark.real  # uses no real model, but building the program takes minutes
def test_llama_cvector_generator(tmp_path: Path) -> None:
    """Each direction is at the layer where it was measured; the tool writes it one layer late."""
    model, positive, negative = (tmp_path / name for name in ("tiny.gguf", "positive.txt", "negative.txt"))
    write_tiny_qwen2(model, n_layer=N_LAYER, n_embd=WIDTH)
    pairs = [("RAIN FELL", "SUN SHONE"), ("COLD NIGHT", "WARM LIGHT"), ("WET STREET", "DRY AVENUE")]
    for file, texts in zip((positive, negative), zip(*pairs, strict=True), strict=True):
        file.write_text("\n".join(texts) + "\n")
    file = tmp_path / "generated.gguf"
    command = [str(program("llama-cvector-generator")), "--model", str(model), "--method", "mean"]
    command += ["--positive-file", str(positive), "--negative-file", str(negative), "--output", str(file)]
    command += ["--threads", "1", "--ctx-size", "64"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")
    assert any("one layer late" in warning for warning in control_vector.check(file).warnings)

    vector = converted(file, "cvector-generator")
    assert vector.layers == [1, 2]  # the tool leaves out the last of layers 0 to 3; layer 0 is dropped
    with llama(model) as loaded:
        tokens = [[loaded.tokenize(text) for text in pair] for pair in pairs]
        assert all(len(a) == len(b) for a, b in tokens)  # else the tool pads
        sequences = [sequence for pair in tokens for sequence in pair]
        positions = [range(len(sequence)) for sequence in sequences]
        signs = [1.0, -1.0] * len(pairs)
        measured = np.zeros((N_LAYER, WIDTH))
        for i, _, rows in loaded.read(sequences, positions, range(N_LAYER)):
            measured += signs[i] * rows["l_out"]
    measured /= np.linalg.norm(measured, axis=1, keepdims=True)
    for layer, row in vector.directions.items():
        assert row @ measured[layer] > 0.999
        assert row @ measured[layer + 1] < 0.98
