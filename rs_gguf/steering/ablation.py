"""Directional ablation: what the output matrices of a model add along a direction.

Takes a GGUF file and a direction for each layer. Arditi et al. (arXiv 2406.11717) call the edit of the
weights, W' = W − α d dᵀW, weight orthogonalisation. It is a rank-1 LoRA with A = α dᵀW and B = −d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models.architecture import (
    is_experts_output,
    is_out_of_reach,
    is_output_matrix,
    split_name,
)
from rs_gguf.steering.lora import Factors


def output_matrices_out_of_reach(model: Path) -> list[str]:
    """Return the output matrices of a GGUF file that llama.cpp multiplies without regard to adapters."""
    header = gguf_header.read(model)
    family = header.values.get("general.architecture", "")
    return [tensor.name for tensor in header.tensors if is_out_of_reach(family, tensor.name)]


def outputs_along(
    model: Path, directions: Mapping[int, NDArray[np.float32]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the name and dᵀW [in] of each output matrix W in a layer with a direction d [D].

    Of E experts in one tensor, dᵀW is [E, in]. d dᵀW is what the matrix adds along a direction of length 1.
    One tensor is in memory at a time.

    Raises:
        InputError: a matrix has a type that the `gguf` package cannot read.
    """
    for tensor in GGUFReader(model).tensors:
        adds = is_output_matrix(tensor.name) or is_experts_output(tensor.name)
        layer = split_name(tensor.name)[0] if adds else -1
        if layer in directions:
            try:
                matrix = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise InputError(
                    f"{model}: {tensor.name} has the type {tensor.tensor_type.name}, which the gguf package "
                    "cannot read. Give a file of another type, such as Q8_0."
                ) from error
            yield tensor.name, directions[layer] @ matrix


def ablated(direction: NDArray[np.float32], along: NDArray[np.float32], alpha: float = 1.0) -> Factors:
    """Return A = α dᵀW [1, in] and B = −d [D, 1] of a matrix W; `along` is dᵀW.

    Of E experts, return A [E, 1, in] and B [E, D, 1].
    """
    a = np.float32(alpha) * along[..., np.newaxis, :]
    return a, np.broadcast_to(-direction[:, np.newaxis], (*a.shape[:-2], len(direction), 1))
