"""Load a transformers model and hook its decoder layers. Remote code is never run.

A folder (config, tokenizer, safetensors) or a GGUF file goes in; the network and its tokenizer come out.
Inside a `with` block, hooks add directions to the outputs of layers, or read these outputs.
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
    """Return the model and its tokenizer.

    The weights of a folder keep their published type, except if the CPU runs them in F32 (see `keeps_bf16`).
    Weights of a GGUF file are dequantised to F32.

    Args:
        path: a Hugging Face folder or a GGUF file.
        on_cpu: the model runs on the CPU.
        spread: spread the layers over all GPUs and, if these are too small, main memory.

    Raises:
        InputError: `path` is not a model, weights are missing, or transformers cannot load the model.
    """
    if not (is_gguf(path) or (path.is_dir() and (path / "config.json").is_file())):
        raise InputError(
            f"{path} is not a model for PyTorch. Give a Hugging Face folder with config.json and "
            "safetensors, or a .gguf file."
        )
    as_published = path.is_dir() and (not on_cpu or keeps_bf16(read_config(path)))
    dtype_option = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    location = source(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a library draws no progress bars
            tokenizer = transformers.AutoTokenizer.from_pretrained(**location)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                **location,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if spread else None,
                **{dtype_option: "auto" if as_published else torch.float32},
            )
    except Exception as error:  # the class depends on the version of transformers and on the file
        raise InputError(
            f"transformers cannot load {path}: {first_line(error)} Give safetensors or GGUF weights of a "
            "decoder-only family that transformers supports without remote code. Other GGUF files run only "
            "in the llama.cpp engine."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{path} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}…), which would be "
            "random numbers. Download the model again."
        )
    return model, tokenizer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model, in order: element N is layer N.

    They are the only module list as long as the configuration's number of hidden layers. Lists nested inside
    a layer (experts) do not count. In a model with several towers, only the text decoder is searched.

    Raises:
        InputError: the number of such lists is not 1, or the model has no configuration.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder = getattr(model, "get_decoder", None)
    root = decoder() if callable(decoder) else model
    lists: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            lists[name] = module
    if len(lists) != 1:
        raise InputError(
            f"cannot find the decoder layers of {type(model).__name__}: its configuration has {count} "
            f"layers, and the module lists of that length are {sorted(lists) or 'none'}. Exactly one is "
            "needed. Give a decoder-only transformers model."
        )
    return list(next(iter(lists.values())))


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a transformers model, or of its text decoder if it has several towers.

    Raises:
        InputError: the model has no configuration.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(model).__name__} has no transformers configuration. Give a transformers model, as "
            "AutoModelForCausalLM.from_pretrained returns it."
        )
    return config.get_text_config()


@contextlib.contextmanager
def add_directions(model: nn.Module, directions: Mapping[int, NDArray[np.float32]]) -> Iterator[None]:
    """Add `directions[N]` [D] to the output of layer N at every position, inside the `with` block.

    The hooks are removed when the `with` block ends, also by an error or if a hook cannot be attached. Nested
    uses add up.

    Raises:
        InputError: the model lacks a layer or the width. The model is then unchanged.
    """
    layers, width = decoder_layers(model), text_config(model).hidden_size
    missing = [layer for layer in directions if layer >= len(layers)]
    if missing:
        raise InputError(
            f"the vector steers layers {missing}, but the model has layers 0 to {len(layers) - 1}. "
            "Use a vector that was fitted on this model."
        )
    for row in directions.values():
        if len(row) != width:
            raise InputError(
                f"the vector has width {len(row)}, but the model's residual stream has width {width}. "
                "Use a vector that was fitted on this model."
            )
    with contextlib.ExitStack() as hooks:
        for layer, row in directions.items():
            handle = layers[layer].register_forward_hook(_adder(torch.from_numpy(np.array(row))))
            hooks.callback(handle.remove)
        yield


def _adder(delta: torch.Tensor) -> Any:
    """Return a forward hook that adds `delta` [D] to a layer's hidden states [..., D]."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        # Older transformers releases return (hidden, …) from a layer, newer ones only the hidden states.
        if isinstance(output, tuple):
            return (output[0] + delta.to(output[0]), *output[1:])
        return output + delta.to(output)

    return hook


@contextlib.contextmanager
def read_activations(
    model: nn.Module, layers: Collection[int], rows: Sequence[int], columns: Sequence[int]
) -> Iterator[dict[int, NDArray[np.float32]]]:
    """Copy activations {layer: [n, D]} at n (row, column) places of a batch, inside the `with` block.

    The forward pass ends as soon as all `layers` are read. That ends the `with` block without an error.

    Raises:
        InputError: the residual of the model consists of several streams.
    """
    modules = decoder_layers(model)
    activations: dict[int, NDArray[np.float32]] = {}

    def reader(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.ndim != 3:
                family = llama_cpp_name(text_config(model).model_type)
                raise InputError(
                    f"cannot read activations of architecture {family!r}: its residual consists of "
                    "several streams. Use another model."
                )
            # Indexing copies, which is needed: the next layer may add to the tensor in place.
            copied = hidden[list(rows), list(columns)]
            activations[layer] = copied.float().cpu().numpy()
            if len(activations) == len(layers):
                raise _AllRead

        return hook

    # Attached for each use and not once: hooks run in order, and the steering hooks must run first.
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(modules[layer].register_forward_hook(reader(layer)).remove)
        with contextlib.suppress(_AllRead):
            yield activations


class _AllRead(Exception):
    """Ends a forward pass whose deeper layers are not needed."""


def pad_left(device: torch.device | str, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask [n, T], padded on the left: rows end in the last column."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)  # the padding is masked, so any id serves
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, longest - len(row) :] = torch.tensor(row)
        mask[k, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
