"""Export a GGUF LoRA adapter as a folder that Hugging Face's PEFT loads with the same effect.

In: an adapter and its model. Out: `adapter_model.safetensors` and `adapter_config.json`. PEFT adds
lora_alpha / r · B A to the weight of each module, as its documentation of LoRA says. lora_alpha is therefore
r, and the factors stay as in the GGUF file. The names and shapes of the modules come from the model, built
without its weights, through the tables with which the `gguf` package converts models.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save
from torch import nn

from rs_gguf.errors import InputError, VerificationError
from rs_gguf.models import configuration
from rs_gguf.models import resolve as models
from rs_gguf.models.architecture import llama_cpp_family, llama_cpp_name, split_name
from rs_gguf.records.files import from_home
from rs_gguf.steering.container import write_compared
from rs_gguf.steering.lora import LoraAdapter

# Matrices whose rows and columns have the same order in every GGUF file as in PyTorch.
_EXPORTED = ("attn_output", "ffn_down")


def export(adapter: LoraAdapter, model: str, folder: str | Path) -> None:
    """Write `folder` for `PeftModel.from_pretrained(model, folder)`; read the files back and compare.

    The same adapter gives the same bytes. `model` is a Hugging Face folder, hub id, GGUF file or catalogue
    name; only its configuration is read.

    Raises:
        InputError: the model has another family or shape, or its family is unknown or lacks a module. Or
            llama.cpp may order the rows of a matrix differently from PyTorch, the adapter is an aLoRA, or
            `folder` cannot be written.
        VerificationError: the content that was read back differs.
    """
    adapter.refuse_invoked()
    modules = _modules(adapter, model)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, (a, b) in adapter.factors.items():
        missing = adapter.rank - len(a)  # PEFT has one r, the largest rank; padding with zeros adds nothing
        module = modules[name]
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.pad(a, ((0, missing), (0, 0)))
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.pad(b, ((0, 0), (0, missing)))
    local = from_home(model).exists() or model in models.CATALOGUE
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if local or model.endswith(".gguf") else model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(modules.values()),
    }
    # Write a single metadata entry: safetensors writes several in an order that differs between runs.
    data = save(tensors, metadata={"rs_gguf": json.dumps(dict(adapter.provenance), ensure_ascii=False)})
    read_back = load(data)
    if read_back.keys() != tensors.keys() or any(
        not np.array_equal(row, read_back[name]) for name, row in tensors.items()
    ):
        raise VerificationError(
            f"{folder}: the content did not survive a round trip through safetensors; nothing was written."
        )
    with contextlib.suppress(OSError):  # the writing below reports such errors better
        # Remove an older configuration first: it does not belong to the new weights.
        (Path(folder) / "adapter_config.json").unlink()
    write_compared(Path(folder) / "adapter_model.safetensors", data)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_compared(Path(folder) / "adapter_config.json", text.encode())


def _modules(adapter: LoraAdapter, model: str) -> dict[str, str]:
    """Return the name of the PyTorch module for each matrix of the adapter."""
    network = configuration.network(configuration.read_config(models.resolve(model, config_only=True)))
    config = network.config.get_text_config()
    family = llama_cpp_name(config.model_type)
    known = llama_cpp_family(adapter.architecture)
    if known is None or llama_cpp_family(family) not in (None, known):
        raise InputError(
            f"the adapter is for {adapter.architecture!r}, but {model} is {family!r}. "
            "Give the adapter's model."
        )
    table = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    linear = {  # in models with several towers, names have one part more than in the table
        f"{table.get_name(path.replace('language_model.', ''))}.weight": (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
    paths = {}
    for name, (a, b) in adapter.factors.items():
        if split_name(name)[1] not in _EXPORTED:
            raise InputError(
                f"{name}: only {' and '.join(_EXPORTED)} can be exported. llama.cpp keeps the rows of "
                "some other matrices in another order."
            )
        if name not in linear:
            raise InputError(f"{name}: {model} has no linear layer for it, so PEFT cannot change it.")
        path, module = linear[name]
        if (module.out_features, module.in_features) != (len(b), a.shape[1]):
            raise InputError(
                f"{name} is {len(b)} × {a.shape[1]} in the adapter, but {path} of {model} is "
                f"{module.out_features} × {module.in_features}: the adapter belongs to another model."
            )
        paths[name] = path
    return paths
