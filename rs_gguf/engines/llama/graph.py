"""Copy tensors of llama.cpp's compute graph while llama.cpp evaluates it.

A context gets the callback of a `GraphReader` when it is created. Names go in. For each batch, the rows at
the output tokens come out. `l_out-7` is a tensor of the graph. `blk.7.ffn_down.weight` is a matrix of the
GGUF file, and its input comes out. `blk.7.ffn_down.product` is the product, with what adapters add.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.llama.calls import called_back
from rs_gguf.errors import InputError

WEIGHT, PRODUCT = ".weight", ".product"  # ends of names
GraphRows = dict[str, NDArray[np.float32]]


class GraphReader:
    """Copies tensors of one context's graph. Reads nothing outside `reading`."""

    def __init__(self) -> None:
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.on_tensor)
        self._wanted: frozenset[str] = frozenset()
        self._products: dict[int, str] = {}  # {address of a product of this batch: its name}
        self._outputs: Sequence[int] = ()
        self._n_tokens = 0
        self._rows: deque[GraphRows] = deque()
        self._read: set[str] = set()  # names read so far in the current batch

    @property
    def reads(self) -> bool:
        """Whether tensors are read now."""
        return bool(self._wanted)

    @contextlib.contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[None]:
        """Copy what has these names inside the `with` block; llama.cpp computes nothing after the last one.

        An empty list pauses the reading and computes everything. So do products.
        """
        previous = self._wanted
        self._wanted = frozenset(names)
        try:
            yield
        finally:
            self._wanted = previous

    def expect(self, n_tokens: int, outputs: Sequence[int]) -> None:
        """Prepare for a batch of `n_tokens` tokens; read those at the positions `outputs` of the batch."""
        self._n_tokens, self._outputs = n_tokens, outputs
        self._rows = deque({} for _ in outputs)
        self._read.clear()
        self._products.clear()

    def take(self) -> GraphRows:
        """Return one row [width] for each name, at the next output token of the batch."""
        return self._rows.popleft()

    @called_back
    def on_tensor(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Copy a wanted tensor. llama.cpp calls this.

        With `ask`, return whether llama.cpp must stop at the tensor. Without `ask`, the tensor is computed:
        return False to end the evaluation.
        """
        found = self._found(tensor) if self._wanted else {}
        if ask or not found:
            return bool(found)
        for name, source in found.items():
            self._copy(name, source)
            if name.endswith(PRODUCT):
                self._products[tensor] = name
        # False ends the evaluation once all is read: deeper layers and logits are not needed. Whether an
        # adapter adds to a product is known only later.
        return bool(self._products) or len(self._read) < len(self._wanted)

    def _found(self, tensor: int) -> dict[str, int]:
        """Return the address of the tensor to copy for each wanted name that a tensor of the graph gives."""
        node = _Tensor.at(tensor)
        found = {node.label: tensor} if node.label in self._wanted else {}
        first, second = node.sources[:2]
        if not (first and second):
            return found
        matrix = _Tensor.at(first).label
        if matrix.endswith(WEIGHT):  # Other wanted tensors, such as `l_out-7`, have consumers too.
            product = matrix.removesuffix(WEIGHT) + PRODUCT
            wanted = {matrix: second, product: tensor}
            found |= {name: source for name, source in wanted.items() if name in self._wanted}
        if first in self._products and _is_added_to(self._products[first], second):
            found[self._products[first]] = tensor
        return found

    def _copy(self, name: str, tensor: int) -> None:
        """Copy the rows of the output tokens; nothing if the tensor does not have one F32 row per token."""
        node = _Tensor.at(tensor)
        width, *counts = node.sizes
        n_rows = math.prod(counts)
        if node.type != llama_cpp.GGML_TYPE_F32 or n_rows not in (self._n_tokens, len(self._outputs)):
            return  # the residual of Gemma 3n has four streams
        # The last layer keeps only the rows of output tokens, and none if a batch has no outputs.
        indices = self._outputs if n_rows == self._n_tokens else range(n_rows)
        offsets = np.unravel_index(np.fromiter(indices, dtype=np.intp), counts, order="F")
        for k, offset in enumerate((np.transpose(offsets) @ node.strides[1:]).tolist()):
            value = np.empty(width, dtype=np.float32)
            _ggml.ggml_backend_tensor_get(tensor, value.ctypes.data, int(offset), value.nbytes)
            self._rows[k][name] = value
        self._read.add(name)


class _Tensor(ctypes.Structure):
    """The head of ggml's `struct ggml_tensor`."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),  # numbers of each dimension, rows first
        ("strides", ctypes.c_size_t * 4),  # bytes
        ("operation", ctypes.c_int),
        ("parameters", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * 10),
        ("view_source", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]

    @classmethod
    def at(cls, address: int) -> _Tensor:
        """Return the tensor at an address. Raise `InputError` if llama.cpp stores tensors in another form."""
        tensor = cls.from_address(address)
        if tensor.name != _ggml.ggml_get_name(address):
            raise InputError(
                "this version of llama.cpp stores its tensors in another form, so they cannot be read. "
                "Install llama-cpp-python 0.3.36, or give the model as a Hugging Face folder."
            )
        return tensor

    @property
    def label(self) -> str:
        """The name, without the `device#…#number` around the names of copies on another device."""
        name: str = self.name.decode()
        return name.split("#")[1] if name.count("#") > 1 else name


def _is_added_to(product: str, other: int) -> bool:
    """Return whether a tensor is what an adapter adds to a product."""
    tensor = _Tensor.at(other)
    for _ in range(2):  # s · (B (A x)): a scale, then the product with B
        if not tensor.sources[0]:
            return False
        tensor = _Tensor.at(tensor.sources[0])
    return tensor.label == f"{product.removesuffix(PRODUCT)}{WEIGHT}.lora_b"


def _bind_ggml() -> Any:
    """Return ggml with types for the tensor functions that the binding does not wrap."""
    lib = llama_cpp.llama_cpp._lib
    lib.ggml_get_name.argtypes, lib.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    lib.ggml_backend_tensor_get.restype = None
    return lib


_ggml = _bind_ggml()
