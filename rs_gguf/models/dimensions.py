"""Compute the dimensions of a model from its metadata: parameters per token, cache size, output matrices.

Takes a GGUF file (only its header is read), a Hugging Face folder or a configuration. Returns
`ModelDimensions`. No weight is read, so the model may be larger than the machine's memory.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_gguf.errors import InputError
from rs_gguf.models import architecture, q8_copy
from rs_gguf.models import header as gguf_header

if TYPE_CHECKING:
    import transformers

TensorInfo = tuple[str, Sequence[int]]  # (name in a GGUF file, dimensions with the inputs first)

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelDimensions:
    """The figures that determine the cost of a model. Parameters are counts of numbers, not bytes.

    `dense`: parameters of the layers that every token uses. `experts`: parameters of the experts; a token
    uses the share `used`. `head`: parameters of the last matrix, which gives the logits. `weights`: bytes of
    all that is loaded. `attention`: heads times head width, and `cache`: cached numbers per token, both
    summed over the layers. `output_matrices`: the input width of each matrix that a gated adapter may
    change, by the keys of `architecture.matrix_places`. `matrix_layers`: the layers that have it,
    if not all.
    """

    n_layer: int
    width: int
    n_vocab: int
    dense: int
    experts: int
    used: float
    head: int
    weights: int
    attention: int
    cache: int
    output_matrices: Mapping[str, int]
    matrix_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def active(self) -> float:
        """Return the number of layer parameters that one token uses."""
        return self.dense + self.used * self.experts

    def layers_with(self, matrix: str) -> Sequence[int]:
        """Return the layers that have one of the `output_matrices`."""
        return self.matrix_layers.get(matrix, range(self.n_layer))

    @property
    def all_matrices(self) -> dict[str, Sequence[int]]:
        """Return the layers that have one, by each of the `output_matrices`."""
        return {key: self.layers_with(key) for key in self.output_matrices}

    @property
    def searched_matrices(self) -> dict[str, list[int]]:
        """Return the layers of each of the `output_matrices` that the search may change."""
        searched = architecture.searched_layers(self.n_layer)
        found = {key: [n for n in layers if n in searched] for key, layers in self.all_matrices.items()}
        return {key: layers for key, layers in found.items() if layers}

    @property
    def matrix_inputs(self) -> int:
        """Return the inputs of all output matrices at one token, in numbers."""
        return self._inputs_of(self.all_matrices)

    @property
    def searched_inputs(self) -> int:
        """Return the inputs of the `searched_matrices` at one token, in numbers."""
        return self._inputs_of(self.searched_matrices)

    def _inputs_of(self, matrices: Mapping[str, Sequence[int]]) -> int:
        return sum(self.output_matrices[key] * len(layers) for key, layers in matrices.items())

    def flops(self, context: float) -> float:
        """Return the floating-point operations of all layers for a token that attends to `context` others."""
        return 2 * self.active + 4 * context * self.attention

    def bytes_read(self, tokens: float) -> float:
        """Return the bytes of weights that one step over `tokens` tokens reads.

        It reads an expert if any token uses it.
        """
        used = self.dense + self.head + self.experts * (1 - math.pow(1 - self.used, tokens))
        return used * self.weights / (self.dense + self.head + self.experts)


def of_gguf(path: Path) -> ModelDimensions:
    """Return the dimensions of the model in a GGUF file.

    Raises:
        InputError: the file is not a GGUF file, has a damaged header, or is not a language model.
    """
    header = gguf_header.read(path)
    values, tensors = header.values, [(info.name, info.shape) for info in header.tensors]
    family = values.get("general.architecture", "")
    try:
        n_layer, width = (int(values[f"{family}.{key}"]) for key in ("block_count", "embedding_length"))
        # The last layers may predict tokens further ahead: llama.cpp does not count them or run them here.
        n_layer -= int(values.get(f"{family}.nextn_predict_layers", 0))
        used = values.get(f"{family}.expert_used_count", 0) / max(1, values.get(f"{family}.expert_count", 1))
        if not 0 <= used <= 1:
            raise ValueError(f"{used:g} of its experts are used")
        weights = q8_copy.size_to_load(path, header)
        return _dimensions(tensors, family, n_layer, width, used, weights, str(path))
    # A number or a matrix is missing, or has the wrong type.
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not the header of a language model ({error!r}). Give the GGUF file of one."
        ) from error


def of_folder(path: Path, bits: float | None = None) -> ModelDimensions:
    """Return the dimensions of the model in a Hugging Face folder, or of a config.json alone.

    `bits`: bits per weight of a GGUF file of the model. None means the model as PyTorch runs it on the CPU,
    in F32 or bf16.

    Raises:
        InputError: there is no configuration, or transformers does not know its family.
    """
    from rs_gguf.models import configuration

    config = configuration.read_config(path)
    if bits is not None:
        return of_config(config, bits)
    dimensions = of_config(config, 16.0 if configuration.keeps_bf16(config) else 32.0)
    # The PyTorch engine reads no inputs of matrices.
    return replace(dimensions, output_matrices={}, matrix_layers={})


def of_config(config: transformers.PretrainedConfig, bits: float) -> ModelDimensions:
    """Return the dimensions of the model that transformers builds from a configuration.

    `bits`: bits per weight.

    Raises:
        InputError: transformers cannot build it.
    """
    import gguf

    from rs_gguf.models import configuration

    text = config.get_text_config()  # without encoders of images and sound
    network = configuration.network(text)
    family = architecture.llama_cpp_name(text.model_type)
    known = architecture.llama_cpp_family(family) or gguf.MODEL_ARCH.LLAMA
    table = gguf.get_tensor_name_map(known, text.num_hidden_layers)
    tensors = [
        (_gguf_name(name, table), tuple(reversed(parameter.shape)))
        for name, parameter in network.named_parameters()
    ]
    count = sum(math.prod(shape) for _, shape in tensors)
    used = configuration.share_of_experts(text)
    n_layer, width = text.num_hidden_layers, text.hidden_size
    return _dimensions(tensors, family, n_layer, width, used, int(count * bits / 8), text.model_type)


def _gguf_name(name: str, table: Any) -> str:
    """Return the name that llama.cpp's converter gives a parameter. Experts, which it stacks, share one."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer and ".experts." in name:
        return f"blk.{layer[1]}.{name.rpartition('.experts.')[2]}_exps"
    gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None and layer:
        return f"blk.{layer[1]}.{name.partition(layer[0])[2]}"
    return str(gguf_name or name)


def _dimensions(
    tensors: Iterable[TensorInfo],
    family: str,
    n_layer: int,
    width: int,
    used: float,
    weights: int,
    source: str,
) -> ModelDimensions:
    layers: dict[int, dict[str, Sequence[int]]] = defaultdict(dict)
    outside: dict[str, Sequence[int]] = {}
    dense = experts = 0
    for name, shape in tensors:
        parts = _LAYER_TENSOR.fullmatch(name)
        if parts is None:
            outside[name] = shape
        elif int(parts[1]) >= n_layer:
            continue
        elif "_exps" in parts[2]:
            experts += math.prod(shape)
        else:
            dense += math.prod(shape)
            layers[int(parts[1])][parts[2].removesuffix(".weight")] = shape
    embedding = outside.get("token_embd.weight", [0])
    output = outside.get("output.weight", embedding)
    if min(n_layer, width, *embedding, *output) < 1:
        raise InputError(f"{source}: the embedding or the output is missing or empty. Give a language model.")
    attention = [architecture.attention(layer) for layer in layers.values()]
    places = architecture.matrix_places(family, layers)
    return ModelDimensions(
        n_layer=n_layer,
        width=width,
        n_vocab=embedding[1],
        dense=dense,
        experts=experts,
        used=used,
        head=math.prod(output),
        weights=weights,
        attention=sum(queries for _, queries in attention),
        cache=sum(numbers for numbers, _ in attention),
        output_matrices={key: p.width for key, p in places.items()},
        matrix_layers={key: p.layers for key, p in places.items() if len(p.layers) < n_layer},
    )
