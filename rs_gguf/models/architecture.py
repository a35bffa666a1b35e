"""Every fact about a family of networks: llama.cpp's name for it, its output matrices and their scales.

The functions take names: of a family, or of tensors in a GGUF file.
To support a new family, add its facts here and a row in `tests/fixtures/families.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf

# ---- layers --------------------------------------------------------------------------------------

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): all layer numbers of the models it loads are lower."""

FIRST_STEERABLE = 1
"""Number of the first layer that llama.cpp can steer. It reads no tensor `direction.0`."""


def searched_layers(n_layer: int) -> range:
    """Return the layers that the search may change: not the first fifth, nor the last layer."""
    return range(max(FIRST_STEERABLE, n_layer // 5), max(FIRST_STEERABLE, n_layer - 2) + 1)


# Families whose recurrent state in transformers ignores the attention mask, so padding would change it.
PADS_THE_STATE = ("rwkv", "xlstm")

# Families of transformers that keep all earlier tokens in a state, so their mask is of the new tokens only.
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba")

# ---- output matrices -----------------------------------------------------------------------------

ATTENTION_MATRICES = ("attn_output", "ssm_out", "shortconv.out_proj")
"""The output matrices of attention, of linear attention and recurrent states, and of convolutions."""

FEED_FORWARD_MATRICES = ("ffn_down", "ffn_down_shexp")
"""The output matrices of a layer's feed-forward network, and of the expert that every token uses."""

OUTPUT_MATRICES = ATTENTION_MATRICES + FEED_FORWARD_MATRICES
"""The matrices whose products a layer adds to the residual stream, by their names in a GGUF file."""

# llama.cpp multiplies these without build_lora_mm, in some layers or in all, so no adapter reaches them.
_WITHOUT_LORA: Mapping[str, Sequence[str]] = {
    "bailingmoe3": ("attn_output",),
    "glm5-next": ("attn_output",),
    "kimi-k3": ("attn_output", "ffn_down", "ffn_down_shexp"),
    "kimi-linear": ("attn_output",),
}
_OUTPUT_MATRIX = re.compile(rf"blk\.\d+\.(?:{'|'.join(map(re.escape, OUTPUT_MATRICES))})\.weight")
_EXPERTS = re.compile(r"blk\.\d+\.\w+_\w*exps\.weight")


@dataclass(frozen=True)
class MatrixPlaces:
    """The layers that have an output matrix with the same number of inputs, `width`."""

    width: int
    layers: tuple[int, ...]


def is_output_matrix(tensor: str) -> bool:
    """Return whether a tensor of a GGUF file, by its name, is one of the `OUTPUT_MATRICES`."""
    return _OUTPUT_MATRIX.fullmatch(tensor) is not None


def holds_experts(tensor: str) -> bool:
    """Return whether a tensor of a GGUF file, by its name, holds a matrix for each expert."""
    return _EXPERTS.fullmatch(tensor) is not None


def is_experts_output(tensor: str) -> bool:
    """Return whether a tensor of a GGUF file holds an output matrix for each expert."""
    return holds_experts(tensor) and ".ffn_down_" in tensor


def is_out_of_reach(family: str, tensor: str) -> bool:
    """Return whether a tensor is an output matrix that llama.cpp multiplies without regard to adapters."""
    return is_output_matrix(tensor) and split_name(tensor)[1] in _WITHOUT_LORA.get(family, ())


def matrix_places(family: str, layers: Mapping[int, Mapping[str, Sequence[int]]]) -> dict[str, MatrixPlaces]:
    """Return where an adapter can change each output matrix.

    The keys are names such as `ffn_down`. If its widths differ between layers, a matrix has a key for each
    width, such as `attn_output/512`.

    layers: dimensions of each layer's tensors, inputs first, by their names without `blk.N.` and `.weight`.
    """
    places: dict[str, MatrixPlaces] = {}
    for matrix in OUTPUT_MATRICES:
        widths = {
            layer: tensors[matrix][0]
            for layer, tensors in sorted(layers.items())
            if matrix in tensors and matrix not in _WITHOUT_LORA.get(family, ())
        }
        for width in sorted(set(widths.values())):
            key = f"{matrix}/{width}" if len(set(widths.values())) > 1 else matrix
            places[key] = MatrixPlaces(width, tuple(n for n, other in widths.items() if other == width))
    return dict(sorted(places.items()))


def tensor_name(key: str, layer: int) -> str:
    """Return the name in a GGUF file of a layer's output matrix, by a key of `matrix_places`."""
    return f"blk.{layer}.{key.partition('/')[0]}.weight"


def product_gate(tensor: str) -> str | None:
    """Return the matrix of one row that weights the expert of every token in some families.

    The sigmoid of its product multiplies the expert's product. `tensor`: the expert's output matrix. The
    name is without `.weight`; None for other matrices.
    """
    layer, matrix = split_name(tensor)
    return f"blk.{layer}.ffn_gate_inp_shexp" if matrix == "ffn_down_shexp" else None


def split_name(tensor: str) -> tuple[int, str]:
    """Return the layer and the matrix of a tensor's name, `blk.N.<matrix>.weight`."""
    _, layer, matrix = tensor.removesuffix(".weight").split(".", 2)
    return int(layer), matrix


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
