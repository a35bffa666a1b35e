"""A context accepts only models that continue a text token by token."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError


def write_as(architecture: str, path: Path) -> None:
    """Write the tiny model's weights under the names of another architecture."""
    tiny = path.with_name("qwen2.gguf")
    write_tiny_qwen2(tiny)
    reader, writer = gguf.GGUFReader(tiny), gguf.GGUFWriter(path, architecture)
    encoder = architecture == "t5encoder"
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        if encoder and key.endswith("head_count_kv"):  # every head has keys of its own
            continue
        name = key.replace("qwen2.", f"{architecture}.")
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    if encoder:
        writer.add_relative_attn_buckets_count(32)
    for tensor in reader.tensors:
        name, data = tensor.name, tensor.data
        if encoder and name.endswith(".bias"):
            continue
        if encoder and ("attn_k" in name or "attn_v" in name):
            data = np.repeat(data, 2, axis=0)
        if encoder and name.startswith(("blk.", "output_norm")):
            name = "enc." + name.replace("attn_output", "attn_o")
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["dream", "t5encoder"])
def test_a_model_that_does_not_continue_a_text_is_an_error(tmp_path: Path, architecture: str) -> None:
    """A diffusion model has no cache, and llama.cpp ends the process for an encoder."""
    write_as(architecture, tmp_path / "model.gguf")
    with pytest.raises(InputError, match=f"{architecture} does not continue a text token by token"):
        LlamaModel(tmp_path / "model.gguf", n_parallel=1, n_ctx=256, n_threads=1)
