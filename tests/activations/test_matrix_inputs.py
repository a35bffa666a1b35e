"""The inputs of output matrices are what llama.cpp multiplies, times the factors of their products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGUFWriter

from rs_gguf.activations.matrix_inputs import InputReader
from rs_gguf.engines.engine import read_last
from rs_gguf.engines.llama.model import LlamaModel

LAYERS = 3
TENSORS = {"attn_output": "kqv_out", "ffn_down": "ffn_swiglu"}  # their inputs' names in the graph of Qwen2
PROMPTS = [[5, 9, 17, 40, 3], [7, 8], [100, 3, 60, 44, 8, 21, 22]]


def test_an_input_is_the_tensor_that_the_graph_multiplies_by_the_matrix(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=LAYERS)
    with LlamaModel(tmp_path / "tiny.gguf", n_parallel=3, n_ctx=512, n_threads=1) as model:
        reader = InputReader(model)
        assert reader.groups == {
            matrix: [f"blk.{layer}.{matrix}.weight" for layer in range(LAYERS)] for matrix in TENSORS
        }
        last = [(len(prompt) - 1,) for prompt in PROMPTS]
        found = {i: rows for i, _, rows in reader.read(PROMPTS, last, reader.names, [2, 0])}
        expected = read_last(model, PROMPTS, range(LAYERS), ("l_out", *TENSORS.values()))
    for i, rows in found.items():
        np.testing.assert_array_equal(rows.pop("l_out"), expected["l_out"][i, [2, 0]])
        assert rows.keys() == set(reader.names)
        for matrix, tensor in TENSORS.items():
            for layer, name in enumerate(reader.groups[matrix]):
                np.testing.assert_array_equal(rows[name], expected[tensor][i, layer])


@pytest.mark.parametrize("gated", [True, False])
def test_an_input_has_the_factors_of_its_product(gated: bool, tmp_path: Path) -> None:
    """A family scales all products; the expert of every token may have a weight of its own, σ(z)."""
    shapes = {"token_embd.weight": (99, 16), "blk.0.attn_output.weight": (16, 16)}
    shapes["blk.0.ffn_down_shexp.weight"] = (16, 8)
    if gated:
        shapes["blk.0.ffn_gate_inp_shexp.weight"] = (16, 1)
    writer = GGUFWriter(tmp_path / "m.gguf", "granitemoe")
    writer.add_block_count(1)
    writer.add_embedding_length(16)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    attention, expert = (f"blk.0.{name}.weight" for name in ("attn_output", "ffn_down_shexp"))
    rows = {
        attention: np.arange(16, dtype=np.float32),
        expert: np.arange(8, dtype=np.float32),
        "blk.0.ffn_gate_inp_shexp.product": np.array([0.7], np.float32),
    }

    def read(
        sequences: Any, positions: Any, layers: Any, tensors: Any, matrices: Sequence[str]
    ) -> Iterator[tuple[int, int, dict[str, Any]]]:
        yield 0, 3, {name: rows[name] for name in matrices}

    model: Any = SimpleNamespace(
        path=tmp_path / "m.gguf",
        architecture="granitemoe",
        n_layer=1,
        metadata={"granitemoe.residual_scale": "0.5"},
        read=read,
    )
    ((_, position, found),) = InputReader(model).read([[1]], [[3]], [attention, expert])
    assert position == 3
    np.testing.assert_allclose(found[attention], 0.5 * rows[attention])
    weight = 1 / (1 + math.exp(-0.7)) if gated else 1.0
    np.testing.assert_allclose(found[expert], 0.5 * weight * rows[expert], rtol=1e-6)
