"""Configurations of transformers models, and what llama.cpp calls their families. Never with remote code.

A folder or a GGUF file goes in; a configuration or a network without numbers comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from rs_gguf.errors import InputError

# Families that llama.cpp files under another's name. Most others differ in hyphens and underscores at most.
_LLAMA_CPP_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
}
_FAMILIES = {name: family for family, name in gguf.MODEL_ARCH_NAMES.items()}


def read_config(path: Path) -> transformers.PretrainedConfig:
    """The configuration in a folder, of which config.json alone is read, or of a GGUF file.

    Raises:
        InputError: there is none, or none that transformers knows.
    """
    try:
        return transformers.AutoConfig.from_pretrained(**source_of(path))
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


def keeps_bf16(config: transformers.PretrainedConfig) -> bool:
    """Whether a model of this configuration runs on the CPU in bf16, as it is published, and not in F32.

    Where the processor multiplies bf16 (AVX512-BF16, and with it AMX) that is twice as fast or more and takes
    half of the memory; elsewhere PyTorch emulates it.
    """
    published = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    # Older versions of PyTorch do not tell what the processor can do.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return published == torch.bfloat16 and bool(capabilities.get("avx512_bf16"))


def llama_cpp_name(model_type: str) -> str:
    """llama.cpp's name of a transformers `model_type` (`qwen2_moe` → `qwen2moe`); itself when unknown."""
    base = model_type.removesuffix("_text")
    if base in _LLAMA_CPP_NAMES:
        return _LLAMA_CPP_NAMES[base]
    known: dict[str, str] = {_squashed(name): name for name in _FAMILIES}
    return known.get(_squashed(base), model_type)


def llama_cpp_family(name: str) -> gguf.MODEL_ARCH | None:
    """The family of which llama.cpp's converter has tables, by llama.cpp's name; None when unknown."""
    return _FAMILIES.get(name)


def is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def source_of(path: Path) -> dict[str, Any]:
    """How `from_pretrained` is told of a folder, or of a file in one. Nothing is fetched or run."""
    folder, file = (path.parent, path.name) if is_gguf(path) else (path, None)
    return {
        "pretrained_model_name_or_path": folder,
        "gguf_file": file,
        "trust_remote_code": False,
        "local_files_only": True,
    }


def _squashed(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
