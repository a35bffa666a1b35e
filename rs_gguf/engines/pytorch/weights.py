"""A transformers model with its weights, and hooks at its decoder blocks. Never with remote code.

A folder (config, tokenizer, safetensors) or a GGUF file goes in; the network and its tokenizer come out.
Within a `with` block, directions are added to the outputs of blocks, or those outputs are read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from rs_gguf.errors import InputError
from rs_gguf.models.architecture import llama_cpp_name
from rs_gguf.models.configuration import first_line, is_gguf, keeps_bf16, read_config, source


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
    given = source(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars; a library draws none
            tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                **given,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if spread else None,
                **{name: "auto" if as_published else torch.float32},
            )
    except Exception as error:  # its error family depends on its version and on the file
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
    """The configuration of a transformers model, or of its text decoder if it has several towers.

    Raises:
        InputError: it has none.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(model).__name__} has no transformers configuration. Give a transformers model, as "
            "AutoModelForCausalLM.from_pretrained returns it."
        )
    return config.get_text_config()


@contextlib.contextmanager
def adding(model: nn.Module, directions: Mapping[int, NDArray[np.float32]]) -> Iterator[None]:
    """Within the block, have decoder block N give h + `directions[N]` [D], at every position.

    Hooks are removed however the block ends, and none stays when attaching one fails. Nested uses add up.

    Raises:
        InputError: a layer or a width that the model does not have, before any change.
    """
    blocks, width = decoder_blocks(model), text_config(model).hidden_size
    beyond = [layer for layer in directions if layer >= len(blocks)]
    if beyond:
        raise InputError(
            f"The vector steers blocks {beyond}, but the model has blocks 0 to {len(blocks) - 1}. "
            "Use a vector that was fitted on this model."
        )
    for row in directions.values():
        if len(row) != width:
            raise InputError(
                f"The vector is {len(row)} wide, but the model's residual stream is {width} wide. "
                "Use a vector that was fitted on this model."
            )
    with contextlib.ExitStack() as hooks:
        for layer, row in directions.items():
            handle = blocks[layer].register_forward_hook(_adder(torch.from_numpy(np.array(row))))
            hooks.callback(handle.remove)
        yield


def _adder(delta: torch.Tensor) -> Any:
    """A forward hook that adds `delta` [D] to a block's hidden states [..., D]."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        # Blocks of older transformers releases return (hidden, …), newer ones the hidden states alone.
        if isinstance(output, tuple):
            return (output[0] + delta.to(output[0]), *output[1:])
        return output + delta.to(output)

    return hook


@contextlib.contextmanager
def reading(
    model: nn.Module, layers: Collection[int], rows: Sequence[int], columns: Sequence[int]
) -> Iterator[dict[int, NDArray[np.float32]]]:
    """Within the block, keep the outputs of blocks {layer: [n, D]} at n places of a batch of hidden states.

    The forward pass ends as soon as all `layers` are read, which leaves the block without an error.

    Raises:
        InputError: a model whose residual is several streams.
    """
    blocks = decoder_blocks(model)
    read: dict[int, NDArray[np.float32]] = {}

    def reader(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.ndim != 3:
                family = llama_cpp_name(text_config(model).model_type)
                raise InputError(
                    f"architecture {family!r} keeps a residual of several streams, so its activations cannot "
                    "be read."
                )
            found = hidden[list(rows), list(columns)]  # a copy: the next block may add in place
            read[layer] = found.float().cpu().numpy()
            if len(read) == len(layers):
                raise _AllRead

        return hook

    # Attached here and not for good: hooks run in order, and those that steer must come first.
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(blocks[layer].register_forward_hook(reader(layer)).remove)
        with contextlib.suppress(_AllRead):
            yield read


class _AllRead(Exception):
    """Ends a forward pass whose deeper blocks nobody needs."""
