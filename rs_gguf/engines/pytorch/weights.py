"""Models as Hugging Face's transformers has them: configuration, network, weights. Never with remote code.

A folder (config, tokenizer, safetensors) or a GGUF file goes in; a configuration, a network without numbers,
or one with its weights and tokenizer come out, and what llama.cpp calls the family.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn

from rs_gguf.errors import InputError
from rs_gguf.models.configuration import first_line, is_gguf, keeps_bf16, read_config, source_of


def load(path: Path, *, on_cpu: bool, spread: bool) -> tuple[Any, Any]:
    """The model and its tokenizer; `spread`: over all GPUs and, where they do not suffice, main memory.

    The weights of a folder keep the type that they are published in, but for what a CPU runs in F32 (see
    `keeps_bf16`); those of a GGUF file are dequantised to F32.

    Raises:
        InputError: nothing there, weights missing, or a model or tokenizer that transformers cannot load.
    """
    if not (is_gguf(path) or (path.is_dir() and (path / "config.json").is_file())):
        raise InputError(
            f"{path}: PyTorch takes a Hugging Face folder (with config.json and safetensors) or a .gguf file."
        )
    as_published = path.is_dir() and (not on_cpu or keeps_bf16(read_config(path)))
    name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    source = source_of(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars; a library draws none
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                **source,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if spread else None,
                **{name: "auto" if as_published else torch.float32},
            )
    except Exception as error:  # as above
        raise InputError(
            f"transformers cannot load {path}: {first_line(error)} Needed are safetensors or GGUF weights "
            "of a decoder-only family that transformers knows without remote code; other GGUF files run in "
            "llama.cpp alone."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{path} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}…), which would be "
            "random numbers. Fetch the folder again."
        )
    return model, tokenizer


@contextlib.contextmanager
def adding(model: nn.Module, directions: Mapping[int, npt.NDArray[np.float32]]) -> Iterator[None]:
    """Add `directions[l]` [D] to the output of block l at every position within the `with` block.

    Hooks are removed however it ends, and none stays when attaching one fails. Nested uses add up.

    Raises:
        InputError: a block or a width that the model does not have. Nothing was changed.
    """
    blocks = decoder_blocks(model)
    beyond = [layer for layer in directions if layer >= len(blocks)]
    if beyond:
        raise InputError(
            f"The vector steers blocks {beyond}, but the model has blocks 0 to {len(blocks) - 1}. "
            "Use a vector that was fitted on this model."
        )
    width, wanted = text_config(model).hidden_size, len(next(iter(directions.values())))
    if width != wanted:
        raise InputError(
            f"The vector is {wanted} wide, but the model's residual stream is {width} wide. "
            "Use a vector that was fitted on this model."
        )
    with contextlib.ExitStack() as hooks:
        for layer, delta in directions.items():
            handle = blocks[layer].register_forward_hook(_adder(torch.from_numpy(delta)))
            hooks.callback(handle.remove)
        yield


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model, in order: element N is block N.

    They are the one module list whose length is the configuration's number of hidden layers; lists nested
    inside a block (experts) do not count, and for models with several towers the text decoder is searched
    alone. Raises `InputError` when there is not exactly one such list.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder = getattr(model, "get_decoder", None)
    root = decoder() if callable(decoder) else model
    found: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            found[name] = module
    if len(found) != 1:
        raise InputError(
            f"Cannot tell the decoder blocks of {type(model).__name__}: the configuration says {count} "
            f"layers, and the module lists of that length are {sorted(found) or 'none'}. Exactly one is "
            "needed; give a decoder-only transformers model."
        )
    return list(next(iter(found.values())))


def text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(model).__name__} has no transformers configuration. Give a transformers model, as "
            "AutoModelForCausalLM.from_pretrained returns it."
        )
    return config.get_text_config()


def _adder(delta: Any) -> Any:
    """A forward hook that adds `delta` [D] to a block's hidden states [..., D]."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        # Blocks of older transformers releases return (hidden, …), newer ones the hidden states alone.
        if isinstance(output, tuple):
            return (output[0] + delta.to(output[0]), *output[1:])
        return output + delta.to(output)

    return hook
