"""The shape of a model from its metadata alone: what a token is multiplied with, and what is kept of it.

A GGUF file, of which the header is read, or a configuration of transformers goes in; a `ModelDimensions` comes out. No
weight is read, so the model may be larger than the machine.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_gguf.errors import InputError
from rs_gguf.models import architecture
from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy as widening

if TYPE_CHECKING:
    import transformers

TensorInfo = tuple[str, Sequence[int]]  # its name in a GGUF file, and its dimensions, inputs first

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelDimensions:
    """What the cost of a model follows from. Parameters are counted as numbers, not bytes.

    `dense`: of the blocks, for every token; `experts`: of the blocks, of which a token uses the share `used`;
    `head`: the output matrix. `weights`: bytes of all that is loaded. `attention`: heads times their width,
    and `cache`: numbers of keys and values kept of a token, both summed over the blocks. `writers`: how many
    numbers each matrix multiplies that a gated adapter may change: those that every block has alike.
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
    writers: Mapping[str, int]

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with in the blocks."""
        return self.dense + self.used * self.experts

    def flops(self, context: float) -> float:
        """Floating-point operations of all blocks for a token that attends to `context` others."""
        return 2 * self.active + 4 * context * self.attention

    def bytes_read(self, tokens: float) -> float:
        """Bytes of weights that a step over so many tokens reads; of the experts, those that any uses."""
        touched = self.dense + self.head + self.experts * (1 - math.pow(1 - self.used, tokens))
        return touched * self.weights / (self.dense + self.head + self.experts)


def of_gguf(path: Path) -> ModelDimensions:
    """The shape of the model in a GGUF file.

    Raises:
        InputError: not a GGUF file, a damaged header, or no language model.
    """
    header = gguf_header.read(path)
    values, tensors = header.values, [(info.name, info.shape) for info in header.tensors]
    family = values.get("general.architecture", "")
    try:
        n_layer, width = (int(values[f"{family}.{key}"]) for key in ("block_count", "embedding_length"))
        # The last ones may be for tokens further ahead: llama.cpp neither counts them nor runs them here.
        n_layer -= int(values.get(f"{family}.nextn_predict_layers", 0))
        used = values.get(f"{family}.expert_used_count", 0) / max(1, values.get(f"{family}.expert_count", 1))
        if not 0 <= used <= 1:
            raise ValueError(f"{used:g} of its experts are used")
        return _shape(tensors, n_layer, width, used, widening.size_to_load(path, header), str(path))
    # No number, or no matrix, where one belongs.
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the header of a language model ({error!r}).") from error


def of_folder(path: Path, bits: float | None = None) -> ModelDimensions:
    """The shape of the model in a Hugging Face folder, of which config.json (or that alone) is read.

    With `bits` it is that of a GGUF file of so many bits a weight; else as PyTorch runs it on the CPU, in F32
    or bf16.

    Raises:
        InputError: no configuration, or none that transformers knows.
    """
    from rs_gguf.models import configuration

    config = configuration.read_config(path)
    if bits is not None:
        return of_config(config, bits)
    shape = of_config(config, 16.0 if configuration.keeps_bf16(config) else 32.0)
    return replace(shape, writers={})  # PyTorch reads block outputs alone


def of_config(config: transformers.PretrainedConfig, bits: float) -> ModelDimensions:
    """The shape of the model that transformers makes of a configuration, at so many `bits` a weight.

    Raises:
        InputError: transformers cannot make it.
    """
    import gguf

    from rs_gguf.models import configuration

    text = config.get_text_config()  # without eyes and ears
    network = configuration.network(text)
    family = architecture.llama_cpp_family(architecture.llama_cpp_name(text.model_type))
    table = gguf.get_tensor_name_map(family or gguf.MODEL_ARCH.LLAMA, text.num_hidden_layers)
    tensors = [
        (_gguf_name(name, table), tuple(reversed(parameter.shape)))
        for name, parameter in network.named_parameters()
    ]
    count = sum(math.prod(shape) for _, shape in tensors)
    used = configuration.share_of_experts(text)
    return _shape(
        tensors, text.num_hidden_layers, text.hidden_size, used, int(count * bits / 8), text.model_type
    )


def _gguf_name(name: str, table: Any) -> str:
    """What llama.cpp's converter calls a parameter; experts, which it stacks, by one name for all."""
    block = re.search(r"\.(\d+)\.", name)
    if block and ".experts." in name:
        return f"blk.{block[1]}.{name.rpartition('.experts.')[2]}_exps"
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None and block:
        return f"blk.{block[1]}.{name.partition(block[0])[2]}"
    return str(found or name)


def _shape(
    tensors: Iterable[TensorInfo], n_layer: int, width: int, used: float, weights: int, source: str
) -> ModelDimensions:
    blocks: dict[int, dict[str, Sequence[int]]] = defaultdict(dict)
    outside: dict[str, Sequence[int]] = {}
    dense = experts = 0
    for name, shape in tensors:
        found = _BLOCK.fullmatch(name)
        if found is None:
            outside[name] = shape
        elif int(found[1]) >= n_layer:
            continue
        elif "_exps" in found[2]:
            experts += math.prod(shape)
        else:
            dense += math.prod(shape)
            blocks[int(found[1])][found[2].removesuffix(".weight")] = shape
    embedding = outside.get("token_embd.weight", [0])
    output = outside.get("output.weight", embedding)
    if min(n_layer, width, *embedding, *output) < 1:
        raise InputError(f"{source}: its embedding or its output is missing or empty. Give a language model.")
    kept = [architecture.attention(block) for block in blocks.values()]
    every = [
        {(w, block[w][0]) for w in architecture.OUTPUT_MATRICES if w in block} for block in blocks.values()
    ]
    return ModelDimensions(
        n_layer=n_layer,
        width=width,
        n_vocab=embedding[1],
        dense=dense,
        experts=experts,
        used=used,
        head=math.prod(output),
        weights=weights,
        attention=sum(queries for _, queries in kept),
        cache=sum(numbers for numbers, _ in kept),
        writers=dict(sorted(set.intersection(*every))) if every else {},
    )
