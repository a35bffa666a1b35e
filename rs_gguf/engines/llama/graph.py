"""Copy tensors of llama.cpp's compute graph while llama.cpp evaluates it.

A context gets the callback of a `GraphReader` when it is created. Tensor names go in. For each batch, the
rows of these tensors at the output tokens come out.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.llama.calls import called_back

GraphTensor = tuple[str, int]  # (name, layer): ("l_out", 7) is the graph's `l_out-7`
GraphRows = dict[GraphTensor, NDArray[np.float32]]


class GraphReader:
    """Copies tensors of one context's graph. Reads nothing outside `reading` and `listing`."""

    def __init__(self) -> None:
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.on_tensor)
        self._wanted: dict[bytes, GraphTensor] = {}
        self._names: list[str] | None = None
        self._outputs: Sequence[int] = ()
        self._n_tokens = 0
        self._rows: deque[GraphRows] = deque()
        self._read: set[GraphTensor] = set()  # tensors read so far in the current batch

    @property
    def reads(self) -> bool:
        """Whether tensors are read now."""
        return bool(self._wanted)

    @contextlib.contextmanager
    def reading(self, tensors: Sequence[GraphTensor]) -> Iterator[None]:
        """Copy `tensors` inside the `with` block; llama.cpp then computes nothing after the last one.

        An empty list pauses the reading and computes everything.
        """
        previous = self._wanted
        self._wanted = {f"{name}-{layer}".encode(): (name, layer) for name, layer in tensors}
        try:
            yield
        finally:
            self._wanted = previous

    @contextlib.contextmanager
    def listing(self) -> Iterator[list[str]]:
        """Add the names of all tensors to the list inside the `with` block, in the order of evaluation."""
        names: list[str] = []
        self._names = names
        try:
            yield names
        finally:
            self._names = None

    def expect(self, n_tokens: int, outputs: Sequence[int]) -> None:
        """Prepare for a batch of `n_tokens` tokens; read those at the positions `outputs` of the batch."""
        self._n_tokens, self._outputs = n_tokens, outputs
        self._rows = deque({} for _ in outputs)
        self._read.clear()

    def take(self) -> GraphRows:
        """Return one row [width] of each tensor, at the next output token of the batch."""
        return self._rows.popleft()

    @called_back
    def on_tensor(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Copy a wanted tensor. llama.cpp calls this.

        With `ask`, return whether llama.cpp must stop at the tensor. Without `ask`, the tensor is computed:
        return False to end the evaluation.
        """
        name = _ggml.ggml_get_name(tensor)
        if self._names is not None and ask:
            self._names.append(name.decode())
        key = self._wanted.get(name)
        if key is None:
            return False
        if ask:
            return True
        n_rows = _ggml.ggml_nrows(tensor)
        if n_rows not in (self._n_tokens, len(self._outputs)):
            return True  # there is not one row per token: the residual of Gemma 3n has four streams
        # The last layer keeps only the rows of output tokens, and none if a batch has no outputs.
        indices = self._outputs if n_rows == self._n_tokens else range(n_rows)
        row_bytes = _ggml.ggml_nbytes(tensor) // max(1, n_rows)
        for k, row in enumerate(indices):
            value = np.empty(row_bytes // 4, dtype=np.float32)
            _ggml.ggml_backend_tensor_get(tensor, value.ctypes.data, row * row_bytes, row_bytes)
            self._rows[k][key] = value
        self._read.add(key)
        # False ends the evaluation once all tensors are read: deeper layers and logits are not needed.
        return len(self._read) < len(self._wanted)


def _bind_ggml() -> Any:
    """Return ggml with types for the tensor functions that the binding does not wrap."""
    lib = llama_cpp.llama_cpp._lib
    lib.ggml_get_name.argtypes, lib.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    lib.ggml_nrows.argtypes, lib.ggml_nrows.restype = [ctypes.c_void_p], ctypes.c_int64
    lib.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    lib.ggml_backend_tensor_get.restype = None
    return lib


_ggml = _bind_ggml()
