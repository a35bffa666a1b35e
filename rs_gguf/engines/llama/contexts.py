"""A loaded GGUF file with its llama.cpp contexts, all under one steering.

Directions and adapters go in. Contexts that apply them come out; each is created when it is first needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.context import UNSTEERED, ActiveSteering, LlamaContext
from rs_gguf.engines.llama.file import LlamaFile
from rs_gguf.engines.settings import DEFAULTS, EngineSettings
from rs_gguf.errors import InputError


class LlamaContexts(LlamaFile):
    """A loaded GGUF file and its llama.cpp contexts.

    Forward passes over whole sequences share one unified cache, in which a common prefix costs nothing.
    Answers use a cache with one stream per sequence. There a token attends only to the cells of its own
    sequence, without a mask over the cells of all others.

    A sequence has at most `max_length` tokens: `n_ctx`, or the model's training length if that is shorter.
    Beyond its training length a model has no positions (GPT-2) or gives untrained answers.

    Args:
        path: a GGUF file.
        n_parallel: the most sequences that are answered at once.
        settings: how llama.cpp loads the model and decodes.
        n_ctx, n_threads: `settings.ctx_size` and `settings.threads`, if these two alone are changed.
        as_stored: see `LlamaFile`.

    Raises:
        InputError: the file cannot be loaded (see `LlamaFile`), or the context does not fit the memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_parallel: int = 32,
        settings: EngineSettings = DEFAULTS,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        as_stored: bool = False,
    ) -> None:
        super().__init__(path, settings=settings, as_stored=as_stored)
        self.n_parallel = n_parallel
        self.n_ctx = n_ctx or settings.ctx_size
        self.max_length: int = min(self.n_ctx, llama_cpp.llama_model_n_ctx_train(self.handle))
        n_batch = min(settings.batch_size, self.n_ctx)
        n_threads = n_threads or settings.n_threads
        self._settings = settings.model_copy(update={"batch_size": n_batch, "threads": n_threads})
        self._steering = UNSTEERED
        self._forward_context: LlamaContext | None = None
        self._answer_context: LlamaContext | None = None
        try:
            self._forward_context = self._new_context(n_parallel, self.n_ctx, unified=True)
        except BaseException:
            self.close()
            raise

    def _new_context(
        self, n_slots: int, n_cells: int, *, unified: bool, settings: EngineSettings | None = None
    ) -> LlamaContext:
        settings = settings or self._settings
        context = LlamaContext(self, n_slots, n_cells, unified=unified, settings=settings)
        try:
            context.steer(self._steering)
        except BaseException:
            context.free()
            raise
        return context

    def _context_for_answers(self, longest: int, *, reordered: bool = False) -> LlamaContext:
        """Return a context for sequences of `longest` tokens, with as many slots as `n_ctx` cells allow.

        reordered: see `EngineSettings.reordered`. There is one context at a time, since its cache is large.
        """
        settings = self._settings.reordered if reordered else self._settings
        n_cells = kv_cells(longest)
        n_slots = max(1, min(self.n_parallel, self.n_ctx // n_cells))
        context = self._answer_context
        fits = context is not None and context.n_cells >= n_cells and context.n_slots >= n_slots
        if context is None or not fits or context.settings != settings:
            if context is not None:
                self._answer_context = None
                context.free()
            self._answer_context = context = self._new_context(
                n_slots, n_cells, unified=False, settings=settings
            )
        return context

    def close(self) -> None:
        """Free the contexts and the weights. The object cannot be used afterwards."""
        for context in self._contexts():
            context.free()
        self._forward_context = self._answer_context = None
        super().close()

    def _contexts(self) -> list[LlamaContext]:
        return [c for c in (self._forward_context, self._answer_context) if c is not None]

    @contextlib.contextmanager
    def steered(self, steering: Steering) -> Iterator[None]:
        """Add directions after layers, and apply LoRA adapters, inside the `with` block.

        This makes the C calls of llama.cpp's `--control-vector` and `--lora`. The scales of one file add up.

        Raises:
            InputError: the model lacks a layer or width of a direction, or an adapter cannot be used.
        """
        active = self._active(steering)
        try:
            self._apply(active)
            yield
        finally:
            self._apply(UNSTEERED)

    def _active(self, steering: Steering) -> ActiveSteering:
        """Return a steering in llama.cpp's form, with its adapters loaded. Raises as `steered` does."""
        steering.check(self.n_layer, self.n_embd, self.path.name)
        scales: dict[Path, float] = {}
        for path, scale in steering.adapters:
            # llama.cpp's programs load a repeated file twice. Here it has one handle, which takes one scale.
            scales[path.resolve()] = scales.get(path.resolve(), 0.0) + scale
        adapters = tuple((self._adapter(path), scale) for path, scale in scales.items())
        return ActiveSteering.of(self, steering.directions, adapters)

    def _apply(self, steering: ActiveSteering) -> None:
        self._steering = steering
        for context in self._contexts():
            context.steer(steering)
        self._free_adapters([handle for handle, _ in steering.adapters])

    def _open_context(self) -> LlamaContext:
        """Return the context for forward passes. Raise `InputError` after `close`."""
        if self._forward_context is None:
            raise InputError(f"{self.path.name} is closed. Open the model again.")
        return self._forward_context


def kv_cells(length: int) -> int:
    """Return the KV cells for a sequence of `length` tokens: llama.cpp pads a stream to a multiple of 256."""
    return -(-length // 256) * 256
