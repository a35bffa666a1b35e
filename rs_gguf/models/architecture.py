"""Every fact about a family of networks: llama.cpp's name for it, its output matrices and their scales.

The functions take names: of a family, of tensors in a GGUF file, or of tensors in llama.cpp's graph.
To support a new family, add its facts here and a row in `tests/fixtures/families.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rs_gguf.errors import InputError

if TYPE_CHECKING:
    import gguf

# ---- layers --------------------------------------------------------------------------------------

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): all layer numbers of the models it loads are lower."""

FIRST_STEERABLE = 1
"""Number of the first layer that llama.cpp can steer. It reads no tensor `direction.0`."""

# Families whose recurrent state in transformers ignores the attention mask, so padding would change it.
PADS_THE_STATE = ("rwkv", "xlstm")

# ---- output matrices -----------------------------------------------------------------------------

# The output matrices, each with the graph's names for its input. llama.cpp's build_ffn names one step after
# another, so the last step comes first here. BitNet has norms before both matrices.
OUTPUT_MATRICES: Mapping[str, Sequence[str]] = {
    "attn_output": ("attn_sub_norm", "kqv_out"),
    "ffn_down": (
        "ffn_sub_norm",
        "ffn_gate_par",
        "ffn_swiglu_limited",
        "ffn_swiglu",
        "ffn_geglu",
        "ffn_reglu",
        "ffn_act",
        "ffn_gelu",
        "ffn_silu",
        "ffn_sqr(relu)",
        "ffn_relu",
    ),
}
# The graph's tensors that hold the product of an output matrix: alone, or within a sum.
PRODUCT_TENSORS: Mapping[str, frozenset[str]] = {
    "attn_output": frozenset({"attn_out", "ffn_inp"}),
    "ffn_down": frozenset({"ffn_down", "ffn_out", "l_out"}),
}
_OUTPUT_MATRIX = re.compile(rf"blk\.\d+\.(?:{'|'.join(OUTPUT_MATRICES)})\.weight")
_OTHER_OUTPUT_MATRIX = re.compile(r"blk\.\d+\.(?:ffn_down_\w*exps|ffn_down_shexp|ssm_out)\.weight")


def is_output_matrix(tensor: str) -> bool:
    """Return whether a tensor of a GGUF file, by its name, is one of the `OUTPUT_MATRICES`."""
    return _OUTPUT_MATRIX.fullmatch(tensor) is not None


def is_other_output_matrix(tensor: str) -> bool:
    """Return whether a tensor of a GGUF file adds to the residual stream in another way: experts, a state."""
    return _OTHER_OUTPUT_MATRIX.fullmatch(tensor) is not None


def matrix_input_tensors(names: Sequence[str], layer: int) -> dict[str, str]:
    """Return the graph's tensor that each output matrix of a layer multiplies, by matrix.

    `names`: all tensor names of the graph. Matrices that the layer does not have, or has once per expert, are
    left out.

    Raises:
        InputError: no matrix is left.
    """
    present = {name.removesuffix(f"-{layer}") for name in names if name.endswith(f"-{layer}")}
    if any(name.startswith("ffn_moe_") for name in present):
        present &= set(OUTPUT_MATRICES["attn_output"])  # The other names belong to a shared expert.
    inputs = {
        matrix: next(tensor for tensor in tensors if tensor in present)
        for matrix, tensors in OUTPUT_MATRICES.items()
        if present & set(tensors)
    }
    if not inputs:
        raise InputError(
            "no matrix of this architecture can hold a gated adapter: its graph has none of the tensors "
            + ", ".join(tensor for tensors in OUTPUT_MATRICES.values() for tensor in tensors)
            + ". Use a control vector."
        )
    return inputs


def product_scale(family: str, n_layer: int, metadata: Mapping[str, Any]) -> float:
    """Return the factor that a model applies to the product of an output matrix before adding it."""
    scale = 0.0
    # llama.cpp's src/models/granite*.cpp and minicpm*.cpp; MiniMax scales the residual by a key of this name.
    if family.startswith("minicpm"):
        scale = 1.4 / math.sqrt(n_layer)
    if family.startswith(("granite", "minicpm")) and family != "minicpm3":
        scale = float(metadata.get(f"{family}.residual_scale", scale))
    return scale or 1.0  # 0 means that the family has no such factor.


# ---- attention -----------------------------------------------------------------------------------


def attention(layer: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Return the size of one layer's attention: (numbers cached per token, heads times head width).

    Return (0, 0) for a layer without attention. `layer`: dimensions of its tensors, inputs first, by their
    names without `blk.N.` and `.weight`.
    """
    if "attn_output" not in layer or any(name.startswith("ssm") for name in layer):
        return 0, 0
    queries = layer["attn_output"][0]
    if "attn_kv_a_mqa" in layer:  # One latent vector holds keys and values.
        return layer["attn_kv_a_mqa"][1], queries
    if "attn_qkv" in layer:
        return layer["attn_qkv"][1] - queries, queries
    return sum(layer[name][1] for name in ("attn_k", "attn_v") if name in layer), queries


# ---- names of families ---------------------------------------------------------------------------

# Families that llama.cpp stores under another family's name. Most other names differ in hyphens at most.
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


def llama_cpp_name(model_type: str) -> str:
    """Return llama.cpp's name of a transformers `model_type` (`qwen2_moe` → `qwen2moe`), or the same name."""
    base = model_type.removesuffix("_text")
    if base in _LLAMA_CPP_NAMES:
        return _LLAMA_CPP_NAMES[base]
    known = {_squashed(name): name for name in _families()}
    return known.get(_squashed(base), model_type)


def llama_cpp_family(name: str) -> gguf.MODEL_ARCH | None:
    """Return the family with this llama.cpp name, for the converter's tables; None if unknown."""
    return _families().get(name)


def _families() -> dict[str, gguf.MODEL_ARCH]:
    import gguf  # Importing it takes 0.25 s.

    return {name: family for family, name in gguf.MODEL_ARCH_NAMES.items()}


def _squashed(name: str) -> str:
    return name.replace("_", "").replace("-", "")
