"""A context of llama.cpp: the key/value cache of many sequences, and decoding into it.

A loaded file and a steering go in, then tokens, each with its position in a sequence. Logits come out, and
the tensors that the `GraphReader` reads during decoding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.generation import common_prefix
from rs_gguf.engines.llama import log as llama_log
from rs_gguf.engines.llama.calls import calling
from rs_gguf.engines.llama.file import LlamaFile
from rs_gguf.engines.llama.graph import GraphReader
from rs_gguf.engines.settings import EngineSettings, ggml_type
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import FIRST_STEERABLE

_FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class BatchToken:
    """A token, its position and its sequence. With `output`, logits are computed for it."""

    id: int
    pos: int
    seq: int
    output: bool


@dataclass(frozen=True)
class ActiveSteering:
    """A steering in llama.cpp's form.

    `directions` [L − 1, D] start at layer 1; None means none. Each adapter is a pair (handle, scale).
    """

    directions: NDArray[np.float32] | None = None
    adapters: tuple[tuple[Any, float], ...] = ()

    @classmethod
    def of(
        cls, file: LlamaFile, directions: Mapping[int, Any], adapters: tuple[tuple[Any, float], ...]
    ) -> ActiveSteering:
        """Copy {layer: direction [D]} into a buffer for llama.cpp. Other layers are 0."""
        if not directions:
            return cls(None, adapters) if adapters else UNSTEERED
        # The buffer covers all steerable layers: a shorter one would leave older values in llama.cpp.
        buffer = np.zeros((file.n_layer - FIRST_STEERABLE, file.n_embd), dtype=np.float32)
        for layer, direction in directions.items():
            buffer[layer - FIRST_STEERABLE] = direction
        return cls(buffer, adapters)


UNSTEERED = ActiveSteering()


class LlamaContext:
    """A key/value cache for `n_slots` sequences, besides sequence 0, which holds their common prefix.

    Args:
        file: the model. It must outlive the context.
        n_cells: KV cells for one sequence; with `unified`, for all sequences together.
        unified: let all sequences share their prefix's cells, and let `graph` read tensors.
        settings: threads, batch size, attention and types of the cache.

    Raises:
        InputError: the memory is not enough, the model does not support the types of the cache, or it does
            not continue a text token by token.
    """

    def __init__(
        self, file: LlamaFile, n_slots: int, n_cells: int, *, unified: bool, settings: EngineSettings
    ) -> None:
        if llama_cpp.llama_model_has_encoder(file.handle):  # T5: decoding would end the process
            raise _does_not_continue(file)
        self.n_slots, self.n_cells, self.n_batch = n_slots, n_cells, settings.batch_size
        self.settings = settings
        self.graph = GraphReader()
        self._file = file
        self._steering = UNSTEERED
        self._prefix: tuple[ActiveSteering, list[int]] = (UNSTEERED, [])  # of sequence 0: steering and tokens
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_cells if unified else n_cells * (n_slots + 1)
        # One physical batch per call keeps the callback's rows in the order of the tokens.
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = n_slots + 1
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = _FLASH_ATTENTION[settings.flash_attn]
        params.type_k, params.type_v = ggml_type(settings.cache_type_k), ggml_type(settings.cache_type_v)
        params.no_perf = True
        if unified:
            params.cb_eval = self.graph.callback
        llama_log.forget_errors()
        self._handle: Any = None
        try:
            with calling():
                self._handle = llama_cpp.llama_init_from_model(file.handle, params)
        except BaseException:  # for example a Ctrl-C: the context exists nevertheless
            llama_cpp.llama_free(self._handle)
            raise
        if not self._handle:
            advice = "" if unified else ", or answer fewer prompts at once (`answers.parallel`)"
            if settings.result_options:
                advice += f", or leave out {settings.result_options}"
            raise InputError(
                llama_log.failure(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {file.path}")
                + f" Use a smaller model or `ctx_size`{advice}."
            )
        if not self._memory:  # diffusion and embedding models keep nothing of earlier tokens
            llama_cpp.llama_free(self._handle)
            raise _does_not_continue(file)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self._handle)

    def free(self) -> None:
        """Free the memory. The object cannot be used afterwards."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._handle)

    def steer(self, steering: ActiveSteering) -> None:
        """Apply a steering. `share_prefix` then removes what was decoded under another one."""
        directions, adapters = steering.directions, steering.adapters
        pointer = None if directions is None else directions.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        width, last = self._file.n_embd, self._file.n_layer - 1
        llama_log.forget_errors()
        if llama_cpp.llama_set_adapter_cvec(self._handle, pointer, width * last, width, 1, last) != 0:
            raise InputError(llama_log.failure("llama.cpp refused the control vector"))
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(h for h, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        llama_log.forget_errors()
        if llama_cpp.llama_set_adapters_lora(self._handle, handles, len(adapters), scales) != 0:
            raise InputError(llama_log.failure("llama.cpp refused the adapter"))
        self._steering = steering

    def decode(self, tokens: Sequence[BatchToken]) -> Iterator[tuple[BatchToken, NDArray[np.float32]]]:
        """Decode `tokens`; yield each `output` token with its logits [V], a view valid until the next one."""
        batch = self._batch
        for start in range(0, len(tokens), self.n_batch):
            chunk = tokens[start : start + self.n_batch]
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i] = token.id
                batch.pos[i] = token.pos
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = token.seq
                batch.logits[i] = token.output
            outputs = [i for i, token in enumerate(chunk) if token.output]
            if self.graph.reads:
                self.graph.expect(len(chunk), outputs)
            llama_log.forget_errors()
            with calling():
                status = llama_cpp.llama_decode(self._handle, batch)
            if status != 0:
                raise InputError(
                    llama_log.failure(
                        f"llama.cpp could not decode a batch of {len(chunk)} tokens (status {status})"
                    )
                )
            for i in outputs:
                pointer = llama_cpp.llama_get_logits_ith(self._handle, i)
                yield chunk[i], np.ctypeslib.as_array(pointer, shape=(self._file.n_vocab,))

    def share_prefix(self, sequences: Sequence[Sequence[int]], at_most: int) -> int:
        """Empty all slots, decode the common prefix as sequence 0, return its length (at most `at_most`).

        What sequence 0 holds of it under the same steering is not decoded again. A judge, for one, reads the
        same instructions in every call.
        """
        prefix = list(sequences[0][: min(common_prefix(sequences), at_most)])
        steering, held = self._prefix
        kept = common_prefix([held, prefix]) if steering is self._steering else 0
        self._prefix = (self._steering, [])  # in case of an error
        if kept == 0 or (self._file.has_state and kept < len(held)):
            kept = 0
            # A steering that is far too strong leaves NaN, which would spoil sequences even behind a mask.
            llama_cpp.llama_memory_clear(self._memory, steering is not self._steering)
        else:
            for slot in range(1, self.n_slots + 1):
                self.end(slot)
            self.cut(0, kept)
        missing = [BatchToken(t, i, 0, i == len(prefix) - 1) for i, t in enumerate(prefix)][kept:]
        with self.graph.reading(()):
            for _ in self.decode(missing):
                pass
        self._prefix = (self._steering, prefix)
        return len(prefix)

    def begin(self, slot: int) -> None:
        """Start a slot's sequence with the common prefix."""
        llama_cpp.llama_memory_seq_cp(self._memory, 0, slot, -1, -1)

    def cut(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of a slot; a model with a state must hold no more."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)

    def end(self, slot: int) -> None:
        """Empty a slot."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def close_gaps(self, running: dict[int, _Item]) -> None:
        """Move the last slots of `running` into the free ones before them.

        llama.cpp computes sequences together only if their numbers are consecutive.
        """
        for slot in range(1, len(running) + 1):
            if slot not in running:
                last = max(running)
                llama_cpp.llama_memory_seq_cp(self._memory, last, slot, -1, -1)
                self.end(last)
                running[slot] = running.pop(last)


def _does_not_continue(file: LlamaFile) -> InputError:
    return InputError(
        f"{file.path}: {file.architecture} does not continue a text token by token. Use a decoder-only "
        "language model."
    )
