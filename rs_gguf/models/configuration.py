"""Read a model's configuration with transformers, and build its network. Remote code never runs.

Takes a folder with a config.json, or a GGUF file. Returns a configuration, or a network without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from rs_gguf.errors import InputError

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_config(path: Path) -> transformers.PretrainedConfig:
    """Return the configuration of a folder (only config.json is read) or of a GGUF file.

    Raises:
        InputError: there is no configuration, or transformers does not know its family.
    """
    try:
        return transformers.AutoConfig.from_pretrained(**source(path))
    except Exception as error:  # The type depends on the version of transformers and on the file.
        raise InputError(
            f"{path}: transformers cannot read the configuration ({first_line(error)}). Give the Hugging "
            "Face folder or hub id of a model whose family transformers knows without remote code."
        ) from error


def network(config: transformers.PretrainedConfig) -> Any:
    """Return the PyTorch model of a configuration, on the meta device: its parameters have shapes only.

    Raises:
        InputError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as in `read_config`
        raise InputError(
            f"transformers cannot build a {config.model_type} model ({first_line(error)}). Use a model of "
            "another family."
        ) from error


def share_of_experts(text: transformers.PretrainedConfig) -> float:
    """Return the share of its experts that a model uses per token; 0 without experts."""
    counts = (getattr(text, key, None) for key in _EXPERT_COUNTS)
    used: int = getattr(text, "num_experts_per_tok", None) or 0
    return used / next((n for n in counts if n), 1)


def keeps_bf16(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model runs on this CPU in bf16, as published, instead of F32.

    If the processor multiplies bf16 (AVX512-BF16, which AMX includes), bf16 is at least twice as fast and
    takes half of the memory. On other processors PyTorch emulates it.
    """
    published = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    # Older versions of PyTorch cannot report the processor's capabilities.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return published == torch.bfloat16 and bool(capabilities.get("avx512_bf16"))


def is_gguf(path: Path) -> bool:
    """Return whether transformers treats `path` as a GGUF file."""
    return path.is_file() and path.suffix == ".gguf"


def source(path: Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a folder or a GGUF file. They forbid downloads."""
    folder, file = (path.parent, path.name) if is_gguf(path) else (path, None)
    return {
        "pretrained_model_name_or_path": folder,
        "gguf_file": file,
        "trust_remote_code": False,
        "local_files_only": True,
    }


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
