"""The published adapter, merged into the real quantised model, changes its answers as `--lora` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from scipy.special import log_softmax

from rs_gguf.cli.main import main
from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.models import header as gguf_header
from rs_gguf.models.rewrite import size_of
from rs_gguf.prompts import grid
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.steering import lora_file

pytestmark = pytest.mark.real

ADAPTER = Path(__file__).parents[2] / "vectors" / "qwen2.5-coder-0.5b-remove" / "remove-adapter.gguf"
SCALE = 3.0  # the adapter moves little at 1
SENSITIVE = 4  # prompts
TOLERANCE = 0.05  # nats of KL divergence; the adapter itself causes ten times as much


def test_the_merged_model_answers_as_the_adapted_one(real_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.gguf"
    result = CliRunner().invoke(
        main, ["merge", f"{ADAPTER}:{SCALE}", "--model", str(real_model), "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    changed = set(lora_file.read(ADAPTER).factors)
    before, after = tensors(real_model), tensors(output)
    assert list(before) == list(after)
    for name, (type_, data) in after.items():
        if name in changed:
            assert type_ == Type.Q8_0
        else:
            assert type_ == before[name][0]
            np.testing.assert_array_equal(data, before[name][1])
    prompts = [p.prompt for p in grid.grid(["sensitive"]) if p.split == "validation"][:SENSITIVE]
    with LlamaModel(real_model, n_parallel=SENSITIVE, as_stored=True) as model:
        tokens = [ChatFormat.of(model).tokenize(model, prompt) for prompt in prompts]
        plain = log_probabilities(model, tokens)
        with model.steered(Steering(adapters=[(ADAPTER, SCALE)])):
            adapted = log_probabilities(model, tokens)
    with LlamaModel(output, n_parallel=SENSITIVE, as_stored=True) as model:
        merged = log_probabilities(model, tokens)
    assert kl(merged, adapted).max() < TOLERANCE
    assert kl(plain, adapted).max() > 10 * TOLERANCE
    assert (merged.argmax(axis=1) == adapted.argmax(axis=1)).all()


def tensors(path: Path) -> dict[str, tuple[int, NDArray[np.uint8]]]:
    """Return the type and the bytes of each tensor. `GGUFReader` takes seconds for the vocabulary."""
    header = gguf_header.read(path)
    start = -(-header.end // header.alignment) * header.alignment
    data = np.memmap(path, np.uint8, "r")[start:]
    return {t.name: (t.type, data[t.offset : t.offset + size_of(t, t.type)]) for t in header.tensors}


def log_probabilities(model: LlamaModel, prompts: list[list[int]]) -> NDArray[np.float64]:
    rows = {i: logits.astype(np.float64) for i, logits in model.next_logits(prompts)}
    return np.asarray(log_softmax(np.stack([rows[i] for i in range(len(prompts))]), axis=1))


def kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sum(np.exp(p) * (p - q), axis=1))
