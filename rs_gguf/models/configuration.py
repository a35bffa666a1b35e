"""A model's configuration as transformers has it, and the network that it describes. Never with remote code.

A folder with a config.json or a GGUF file goes in; a configuration comes out, or a network without numbers.
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
    """The configuration in a folder, of which config.json alone is read, or of a GGUF file.

    Raises:
        InputError: there is none, or none that transformers knows.
    """
    try:
        return transformers.AutoConfig.from_pretrained(**source(path))
    except Exception as error:  # its error family depends on its version and on the file
        raise InputError(
            f"{path}: transformers cannot read its configuration ({first_line(error)}). Give the "
            "Hugging Face folder or hub id of a family that transformers knows without remote code."
        ) from error


def network(config: transformers.PretrainedConfig) -> Any:
    """The PyTorch model of a configuration, its modules without numbers.

    Raises:
        InputError: transformers cannot make it.
    """
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as above
        raise InputError(
            f"transformers cannot make a {config.model_type} model ({first_line(error)})."
        ) from error


def share_of_experts(text: transformers.PretrainedConfig) -> float:
    """The share of its experts that a model of this configuration uses for a token; 0 without experts."""
    counts = (getattr(text, key, None) for key in _EXPERT_COUNTS)
    used: int = getattr(text, "num_experts_per_tok", None) or 0
    return used / next((n for n in counts if n), 1)


def keeps_bf16(config: transformers.PretrainedConfig) -> bool:
    """Whether a model of this configuration runs on the CPU in bf16, as it is published, and not in F32.

    Where the processor multiplies bf16 (AVX512-BF16, and with it AMX) that is twice as fast or more and takes
    half of the memory; elsewhere PyTorch emulates it.
    """
    published = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    # Older versions of PyTorch do not tell what the processor can do.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return published == torch.bfloat16 and bool(capabilities.get("avx512_bf16"))


def is_gguf(path: Path) -> bool:
    """Whether transformers takes `path` for a GGUF file."""
    return path.is_file() and path.suffix == ".gguf"


def source(path: Path) -> dict[str, Any]:
    """Return the arguments that name a folder, or a file in one, to `from_pretrained`. Nothing is fetched."""
    folder, file = (path.parent, path.name) if is_gguf(path) else (path, None)
    return {
        "pretrained_model_name_or_path": folder,
        "gguf_file": file,
        "trust_remote_code": False,
        "local_files_only": True,
    }


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
