"""Read the inputs of the output matrices that an adapter can change, layer by layer.

Takes a model that runs in llama.cpp. Yields each matrix's input x at some tokens, times the factors that the
model applies to the product of the matrix. So a gate vector's activation aᵀx says what the adapter adds to
the residual stream (method §8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError
from rs_gguf.models import dimensions, header
from rs_gguf.models.architecture import product_gate, product_scale, tensor_name

Inputs = dict[str, NDArray[np.float32]]
Matrices = Mapping[str, Sequence[int]]  # the layers of each output matrix


class InputReader:
    """Reads the scaled inputs of a model's output matrices.

    `groups`: the names of the matrices in the model's file, by the keys of `architecture.matrix_places`.
    Empty if llama.cpp's graph multiplies one of them in another way. Control vectors remain possible.
    `matrices`: the layers of each matrix to read; by default, all.
    """

    def __init__(self, model: Engine, matrices: Matrices | None = None) -> None:
        self._model = model
        if matrices is None:
            matrices = dimensions.of_gguf(model.path).all_matrices
        self.groups = {key: [tensor_name(key, n) for n in layers] for key, layers in matrices.items()}
        try:
            for _ in model.read([[0]], [[0]], (), (), self.names) if self.groups else ():
                pass
        except InputError:
            self.groups = {}
        present = {tensor.name for tensor in header.read(model.path).tensors}
        gates = {name: product_gate(name) for name in self.names}
        self._gates = {name: gate for name, gate in gates.items() if gate and f"{gate}.weight" in present}
        self._scale = np.float32(product_scale(model.architecture, model.n_layer, model.metadata))

    @property
    def names(self) -> list[str]:
        """The names of all matrices."""
        return [name for group in self.groups.values() for name in group]

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        names: Sequence[str],
        layers: Sequence[int] = (),
    ) -> Iterator[tuple[int, int, Inputs]]:
        """Yield (index, position, {matrix: input [W]}) at `positions[index]` of each sequence.

        With `layers`, also the activations [L, D] of these layers, as `l_out`. Raises as `Engine.read` does.
        """
        products = [f"{gate}.product" for name, gate in self._gates.items() if name in names]
        tensors = ("l_out",) if layers else ()
        for i, position, rows in self._model.read(sequences, positions, layers, tensors, [*names, *products]):
            inputs = {name: rows[name] * self._factor(name, rows) for name in names}
            yield i, position, {name: rows[name] for name in tensors} | inputs

    def _factor(self, name: str, rows: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32] | np.float32:
        """Return what the model multiplies the product of a matrix by, before it adds it."""
        if name not in self._gates:
            return self._scale
        gate = 1 / (1 + np.exp(-rows[f"{self._gates[name]}.product"]))
        return self._scale * gate.astype(np.float32)
