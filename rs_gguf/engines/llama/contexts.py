"""A loaded GGUF file with the contexts that it is run in, all under one steering.

Directions and adapters go in; contexts come out that have them in force, made when they are first needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.context import ActiveSteering, LlamaContext
from rs_gguf.engines.llama.file import LlamaFile
from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores

CONTEXT = 8192
"""Cells of a model's key/value cache."""
BATCH = 512
"""Tokens that are run together."""


class LlamaContexts(LlamaFile):
    """A loaded GGUF file and the contexts that it is run in.

    Forward passes over whole sequences share one unified cache, where a common prefix costs nothing.
    Answers use a cache with a stream for each sequence: there a token attends to the cells of its own
    sequence. It need not pass over the cells of all others under a mask.

    A sequence has at most `max_length` tokens: `n_ctx`, or those that the model was trained on if they are
    fewer. Beyond them it has no positions (GPT-2), or answers what it never learned.

    Args:
        path: a GGUF file.
        n_parallel: sequences that are answered at once.
        n_ctx: cells of the key/value cache, shared by all sequences. Bounds the memory.
        n_threads: CPU threads; all that this process may use by default.

    Raises:
        InputError: the file cannot be loaded (see `LlamaFile`), or there is no memory for the context.
    """

    def __init__(
        self, path: Path, *, n_parallel: int = 32, n_ctx: int = CONTEXT, n_threads: int | None = None
    ) -> None:
        super().__init__(path)
        self.n_parallel = n_parallel
        self.n_ctx = n_ctx
        self.max_length: int = min(n_ctx, llama_cpp.llama_model_n_ctx_train(self.handle))
        self._n_threads = n_threads or usable_cores()
        self._steering = ActiveSteering()
        self._forward_context: LlamaContext | None = None
        self._answer_context: LlamaContext | None = None
        try:
            self._forward_context = self._new_context(n_parallel, n_ctx, unified=True)
        except BaseException:
            self.close()
            raise

    def _new_context(self, n_slots: int, n_cells: int, *, unified: bool) -> LlamaContext:
        n_batch = min(BATCH, self.n_ctx)
        context = LlamaContext(
            self, n_slots, n_cells, unified=unified, n_batch=n_batch, n_threads=self._n_threads
        )
        try:
            context.steer(self._steering)
        except BaseException:
            context.free()
            raise
        return context

    def _context_for_answers(self, longest: int) -> LlamaContext:
        """A context whose sequences hold `longest` tokens, as many at once as `n_ctx` cells allow."""
        n_cells = kv_cells(longest)
        n_slots = max(1, min(self.n_parallel, self.n_ctx // n_cells))
        context = self._answer_context
        if context is None or context.n_cells < n_cells or context.n_slots < n_slots:
            if context is not None:
                self._answer_context = None
                context.free()
            self._answer_context = context = self._new_context(n_slots, n_cells, unified=False)
        return context

    def close(self) -> None:
        """Free the contexts and the weights. The object is of no use afterwards."""
        for context in self._contexts():
            context.free()
        self._forward_context = self._answer_context = None
        super().close()

    def _contexts(self) -> list[LlamaContext]:
        return [c for c in (self._forward_context, self._answer_context) if c is not None]

    @contextlib.contextmanager
    def steered(self, steering: Steering) -> Iterator[None]:
        """Within the block, add directions to the outputs of blocks, and apply LoRA adapters.

        The same C calls that `--control-vector` and `--lora` end in. The cache is cleared on the way in
        and out: its cells were computed under the other steering. The scales of one file add up.

        Raises:
            InputError: a width or a layer that the model does not have, or a file it cannot use.
        """
        steering.check(self.n_layer, self.n_embd, self.path.name)
        scales: dict[Path, float] = {}
        for path, scale in steering.adapters:
            # llama.cpp's programs load a file that is given twice twice; of one handle only one scale counts.
            scales[path.resolve()] = scales.get(path.resolve(), 0.0) + scale
        adapters = tuple((self._adapter(path), scale) for path, scale in scales.items())
        try:
            self._apply(ActiveSteering.of(self, steering.directions, adapters))
            yield
        finally:
            self._apply(ActiveSteering())

    def _apply(self, steering: ActiveSteering) -> None:
        self._steering = steering
        for context in self._contexts():
            context.steer(steering)
        self._free_adapters([handle for handle, _ in steering.adapters])

    def _open_context(self) -> LlamaContext:
        """Return the context of forward passes; `InputError` after `close`."""
        if self._forward_context is None:
            raise InputError(f"{self.path.name} was closed.")
        return self._forward_context


def kv_cells(length: int) -> int:
    """Return the cache cells of a sequence of `length` tokens: llama.cpp pads a stream to a multiple."""
    return -(-length // 256) * 256
