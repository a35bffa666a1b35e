"""What llama.cpp computes on the way: tensors of the graph, copied while it is evaluated.

A context gets the callback of a `GraphReader` when it is made. Names of tensors go in; of each batch, their
rows at the output tokens come out.
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

GraphTensor = tuple[str, int]  # name and block: ("l_out", 7) is the graph's `l_out-7`
GraphRows = dict[GraphTensor, NDArray[np.float32]]


class GraphReader:
    """Copies tensors of one context's graph. It reads nothing until it is told to."""

    def __init__(self) -> None:
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.on_tensor)
        self._wanted: dict[bytes, GraphTensor] = {}
        self._names: list[str] | None = None
        self._outputs: Sequence[int] = ()
        self._n_tokens = 0
        self._rows: deque[GraphRows] = deque()
        self._seen: set[GraphTensor] = set()  # in the batch at hand

    @property
    def reads(self) -> bool:
        """Whether tensors are being read."""
        return bool(self._wanted)

    @contextlib.contextmanager
    def reading(self, tensors: Sequence[GraphTensor]) -> Iterator[None]:
        """Within the block, copy these, none to pause. Nothing after the last of them is computed."""
        before = self._wanted
        self._wanted = {f"{name}-{block}".encode(): (name, block) for name, block in tensors}
        try:
            yield
        finally:
            self._wanted = before

    @contextlib.contextmanager
    def listing(self) -> Iterator[list[str]]:
        """Within the block, names of all tensors are added to the list, in the order of evaluation."""
        names: list[str] = []
        self._names = names
        try:
            yield names
        finally:
            self._names = None

    def expect(self, n_tokens: int, outputs: Sequence[int]) -> None:
        """A batch of so many tokens comes next, of which those at the places `outputs` are read."""
        self._n_tokens, self._outputs = n_tokens, outputs
        self._rows = deque({} for _ in outputs)
        self._seen.clear()

    def take(self) -> GraphRows:
        """What was read at the next output token of the batch, of each tensor its row [width]."""
        return self._rows.popleft()

    @called_back
    def on_tensor(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Called by llama.cpp to `ask` whether it is to stop at a tensor, and there: False then ends all."""
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
            return True  # no row a token: the residual of Gemma 3n is four streams
        # The last block keeps only the rows that become outputs: none of a batch in which nothing is read.
        picks = self._outputs if n_rows == self._n_tokens else range(n_rows)
        row_bytes = _ggml.ggml_nbytes(tensor) // max(1, n_rows)
        for k, row in enumerate(picks):
            value = np.empty(row_bytes // 4, dtype=np.float32)
            _ggml.ggml_backend_tensor_get(tensor, value.ctypes.data, row * row_bytes, row_bytes)
            self._rows[k][key] = value
        self._seen.add(key)
        # Ends the evaluation once all is read: the deeper blocks and the logits serve nobody.
        return len(self._seen) < len(self._wanted)


def _bind_ggml() -> Any:
    """The few accessors of ggml tensors that the binding does not wrap."""
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
