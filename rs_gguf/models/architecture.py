"""Every fact about a family of networks: what llama.cpp calls it, its matrices, what it adds and where.

Names of a family, of the tensors of a GGUF file or of llama.cpp's graph go in. What holds for them comes out.
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

# ---- blocks --------------------------------------------------------------------------------------

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): no model it loads has a block number this high."""

FIRST_STEERABLE = 1
"""llama.cpp keeps no slot for block 0: `direction.0` is no tensor that it reads."""

# Families whose state in transformers takes no account of a mask.
PADS_THE_STATE = ("rwkv", "xlstm")

# ---- matrices that write to the residual stream --------------------------------------------------

# Matrices whose product is added to the residual stream, and the graph's names for what they multiply: the
# last step first, since llama.cpp's build_ffn names them one after another. BitNet has norms before both.
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
# Where the graph shows the product of such a matrix: alone, or in the sum that it goes into.
SEEN_AT: Mapping[str, frozenset[str]] = {
    "attn_output": frozenset({"attn_out", "ffn_inp"}),
    "ffn_down": frozenset({"ffn_down", "ffn_out", "l_out"}),
}
_WRITER = re.compile(rf"blk\.\d+\.(?:{'|'.join(OUTPUT_MATRICES)})\.weight")
_OTHER_WRITER = re.compile(r"blk\.\d+\.(?:ffn_down_\w*exps|ffn_down_shexp|ssm_out)\.weight")


def is_output_matrix(tensor: str) -> bool:
    """Whether a tensor of a GGUF file is one of the matrices `OUTPUT_MATRICES`."""
    return _WRITER.fullmatch(tensor) is not None


def is_other_output_matrix(tensor: str) -> bool:
    """Whether a tensor of a GGUF file writes to the residual stream in another way: experts, a state."""
    return _OTHER_WRITER.fullmatch(tensor) is not None


def matrix_input_tensors(names: Sequence[str], layer: int) -> dict[str, str]:
    """Which tensor of the graph each writing matrix multiplies, from the names of the graph's tensors.

    Matrices that this architecture does not have, or has one for each expert, are left out. `InputError` when
    none is left.
    """
    present = {name.removesuffix(f"-{layer}") for name in names if name.endswith(f"-{layer}")}
    if any(name.startswith("ffn_moe_") for name in present):
        present &= set(OUTPUT_MATRICES["attn_output"])  # the other names are those of a shared expert
    found = {
        writer: next(tensor for tensor in tensors if tensor in present)
        for writer, tensors in OUTPUT_MATRICES.items()
        if present & set(tensors)
    }
    if not found:
        raise InputError(
            "no matrix of this architecture can hold a gate: its graph names none of "
            + ", ".join(tensor for tensors in OUTPUT_MATRICES.values() for tensor in tensors)
            + ". Use a control vector."
        )
    return found


def product_scale(family: str, n_layer: int, metadata: Mapping[str, Any]) -> float:
    """What a model multiplies the product of a writing matrix with before it adds it to the residual."""
    scale = 0.0
    # llama.cpp's src/models/granite*.cpp and minicpm*.cpp; MiniMax scales the residual by a key of this name.
    if family.startswith("minicpm"):
        scale = 1.4 / math.sqrt(n_layer)
    if family.startswith(("granite", "minicpm")) and family != "minicpm3":
        scale = float(metadata.get(f"{family}.residual_scale", scale))
    return scale or 1.0  # 0 stands for none


# ---- attention -----------------------------------------------------------------------------------


def attention(block: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Return (numbers kept of a token, heads times their width) of one block; (0, 0) without attention.

    `block`: dimensions of its tensors by their names without `blk.N.` and `.weight`, inputs first.
    """
    if "attn_output" not in block or any(name.startswith("ssm") for name in block):
        return 0, 0
    queries = block["attn_output"][0]
    if "attn_kv_a_mqa" in block:  # one latent stands for keys and values
        return block["attn_kv_a_mqa"][1], queries
    if "attn_qkv" in block:
        return block["attn_qkv"][1] - queries, queries
    return sum(block[name][1] for name in ("attn_k", "attn_v") if name in block), queries


# ---- names of families ---------------------------------------------------------------------------

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


def llama_cpp_name(model_type: str) -> str:
    """llama.cpp's name of a transformers `model_type` (`qwen2_moe` → `qwen2moe`); itself when unknown."""
    base = model_type.removesuffix("_text")
    if base in _LLAMA_CPP_NAMES:
        return _LLAMA_CPP_NAMES[base]
    known = {_squashed(name): name for name in _families()}
    return known.get(_squashed(base), model_type)


def llama_cpp_family(name: str) -> gguf.MODEL_ARCH | None:
    """The family of which llama.cpp's converter has tables, by llama.cpp's name; None when unknown."""
    return _families().get(name)


def _families() -> dict[str, gguf.MODEL_ARCH]:
    import gguf  # which takes a quarter of a second

    return {name: family for family, name in gguf.MODEL_ARCH_NAMES.items()}


def _squashed(name: str) -> str:
    return name.replace("_", "").replace("-", "")
