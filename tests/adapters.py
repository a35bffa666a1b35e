"""Random adapters of the tiny qwen2 model, and the logits that llama.cpp and PyTorch give under them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
import transformers

from rs_gguf.lora import Factors, LoraAdapter

PROMPTS = [[5, 9, 17, 40, 3], [7, 8], [100, 3, 60, 44, 8, 21, 22]]
_MODULES = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}


def factors(rank: int, width: int, out: int, seed: int = 0) -> Factors:
    """A [rank, width] and B [out, rank], standard normal."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rank, width)).astype(np.float32),
        rng.standard_normal((out, rank)).astype(np.float32),
    )


def random_adapter(seed: int = 0, rank: int = 2, layers: tuple[int, ...] = (0, 1, 2)) -> LoraAdapter:
    """Changes of both writing matrices of `write_tiny_qwen2`'s blocks, strong enough to be seen."""
    found = {}
    for layer in layers:
        found[f"blk.{layer}.attn_output.weight"] = factors(rank, 32, 32, seed + layer)
        found[f"blk.{layer}.ffn_down.weight"] = factors(1, 64, 32, seed + layer + 50)
    return LoraAdapter({name: (a, b * np.float32(0.05)) for name, (a, b) in found.items()}, "qwen2")


def llama_logits(model: Path, adapter: Path | None, scale: float = 1.0) -> npt.NDArray[np.float32]:
    """Next-token logits [N, V] of `PROMPTS`, through llama-cpp-python's own `lora_path`.

    The cache is F32: the usual F16 would round keys and values, steered or not.
    """
    llm = llama_cpp.Llama(
        str(model), lora_path=None if adapter is None else str(adapter), lora_scale=scale,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_ctx=256, n_threads=1, verbose=False,
    )  # fmt: skip
    rows = []
    for prompt in PROMPTS:
        llm.reset()
        llm.eval(prompt)
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
        rows.append(row.copy())
    llm.close()
    return np.stack(rows)


@contextlib.contextmanager
def added(network: transformers.Qwen2ForCausalLM, adapter: LoraAdapter, scale: float = 1.0) -> Iterator[None]:
    """Within the block, scale · B A is in the weights."""
    weights, before = network.state_dict(), {}
    with torch.inference_mode():
        for name, (a, b) in adapter.factors.items():
            _, layer, matrix, _ = name.split(".")
            weight = weights[f"model.layers.{layer}.{_MODULES[matrix]}.weight"]
            before[name] = weight, weight.clone()
            weight += scale * torch.from_numpy(b @ a)
    try:
        yield
    finally:
        with torch.inference_mode():
            for weight, values in before.values():
                weight.copy_(values)


def torch_logits(
    network: transformers.Qwen2ForCausalLM, adapter: LoraAdapter, scale: float = 1.0
) -> npt.NDArray[np.float32]:
    """The same in PyTorch, with scale · B A added to the weights for the time being."""
    with added(network, adapter, scale), torch.inference_mode():
        return np.stack([network(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])
