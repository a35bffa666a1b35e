"""Load a GGUF file in llama.cpp: its weights, its vocabulary, and LoRA adapters for it.

A path goes in. Metadata, tokens of a text, text of tokens, and handles for a `LlamaContext` come out.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import llama_cpp

from rs_gguf.engines.llama import log as llama_log
from rs_gguf.engines.llama.calls import calling
from rs_gguf.engines.settings import DEFAULTS, EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.machine import free_memory
from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy

_log = logging.getLogger("rs_gguf.engine")

# Share of the free memory that a file may fill. A larger file is mapped, and runs as far as there is room.
_MAX_READ_SHARE = 0.75
_KEPT_ADAPTERS = 8  # adapters that stay loaded, unless more are in use at once: a search tries hundreds


class LlamaFile:
    """The weights and the vocabulary of a GGUF file.

    settings: GPU layers and GPUs; a build of llama.cpp without GPU support ignores them, with one warning.
    as_stored: load the file itself and not its faster Q8_0 copy; also load all parts of a split model, whose
        first part is `path`.

    Raises:
        InputError: the file is missing, truncated, not a GGUF file, only one part of a model, or without a
            vocabulary. Also for an unknown architecture, or if the weights do not fit the memory. The message
            quotes llama.cpp's own errors, if there are any.
    """

    def __init__(self, path: Path, *, settings: EngineSettings = DEFAULTS, as_stored: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"model file not found: {path}. Give a GGUF file or a name from `rs-export models list`."
            )
        self.metadata = (
            gguf_header.read(self.path).values if as_stored else gguf_header.values_of_whole(self.path)
        )
        llama_log.listen()
        llama_cpp.llama_backend_init()
        self.handle: Any = None
        self._adapters: dict[str, Any] = {}  # in order of last use
        # The Q8_0 copy is faster but needs more memory than the file itself, which is the second choice.
        faster = [] if as_stored else [q8_copy.file_to_load(self.path)]
        for file in dict.fromkeys([*faster, self.path]):
            llama_log.forget_errors()
            params = _parameters(file, settings)
            try:
                with calling():
                    self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(file), params)
            except BaseException:  # for example a Ctrl-C: the model is loaded nevertheless
                LlamaFile.close(self)
                raise
            if self.handle:
                break
        if not self.handle:
            raise InputError(llama_log.failure(f"llama.cpp cannot load {self.path}"))
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)
        defect = self._defect()
        if defect:
            LlamaFile.close(self)
            raise InputError(f"{self.path} {defect}. Download the file again, or use another one.")
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama_cpp.llama_model_n_layer(self.handle)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self.handle)
        self.n_params: int = llama_cpp.llama_model_n_params(self.handle)
        # Such models keep a state of all earlier tokens, from which the last ones cannot be removed.
        self.has_state: bool = llama_cpp.llama_model_is_hybrid(
            self.handle
        ) or llama_cpp.llama_model_is_recurrent(self.handle)
        self.architecture: str = self.metadata["general.architecture"]

    def _defect(self) -> str:
        """Return a defect that llama.cpp accepts at loading but that breaks later use; "" for none."""
        if llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            # llama.cpp would end the process at the first text.
            return "holds no vocabulary: text cannot be tokenised"
        return "" if self.metadata else "holds metadata that llama.cpp reads but rs-gguf cannot read"

    def close(self) -> None:
        """Free the weights. The object cannot be used afterwards."""
        if self.handle:
            llama_cpp.llama_model_free(self.handle)  # and the adapters with it
            self.handle = None
            self._adapters.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- text and tokens -------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template in the file's metadata; None if there is none."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def bos_token(self) -> str:
        return self._special(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_token(self) -> str:
        return self._special(llama_cpp.llama_vocab_eos(self._vocab))

    def _special(self, token: int) -> str:
        return self.token_text(token) if token >= 0 else ""

    @property
    def bos_prefix(self) -> list[int]:
        """The tokens that the vocabulary wants before every text: the BOS token, or none."""
        return (
            [llama_cpp.llama_vocab_bos(self._vocab)] if llama_cpp.llama_vocab_get_add_bos(self._vocab) else []
        )

    def token_text(self, token: int) -> str:
        """Return the literal text of one token, also of a control token."""
        return self.detokenize([token], special=True)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of `text` without `bos_prefix`; `special` recognises control tokens in it."""
        data = text.encode("utf-8")
        size = len(data) + 8
        while True:
            buffer = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, special)
            if count >= 0:
                return list(buffer[:count])
            size = -count  # the vocabulary may spell one character in several tokens, one for each byte

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `tokens`, without control tokens unless `special`."""
        if not tokens:
            return ""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        size = 32 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_detokenize(self._vocab, array, len(tokens), buffer, size, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def _ends(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    # ---- adapters --------------------------------------------------------------------------------

    def _adapter(self, path: Path) -> Any:
        """Return the handle of a LoRA adapter. Load it at first use, and again if its file has changed."""
        if not path.is_file():
            raise InputError(f"adapter file not found: {path}. Give a LoRA adapter in a GGUF file.")
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_mtime_ns}:{stat.st_size}"
        handle = self._adapters.pop(key, None)
        if handle is None:
            llama_log.forget_errors()
            with calling():
                handle = llama_cpp.llama_adapter_lora_init(self.handle, os.fsencode(path))
            if not handle:
                raise InputError(llama_log.failure(f"llama.cpp cannot load the adapter {path}"))
        self._adapters[key] = handle
        return handle

    def _free_adapters(self, in_use: Sequence[Any]) -> None:
        """Free the least recently used adapters, except those `in_use` in a context."""
        unused = [key for key, handle in self._adapters.items() if not any(handle is used for used in in_use)]
        for key in unused[: max(0, len(self._adapters) - _KEPT_ADAPTERS)]:
            llama_cpp.llama_adapter_lora_free(self._adapters.pop(key))


def _parameters(file: Path, settings: EngineSettings) -> Any:
    """Return the parameters with which llama.cpp loads a file."""
    params = llama_cpp.llama_model_default_params()
    params.load_mode = _load_mode(file)
    if not llama_cpp.llama_supports_gpu_offload():
        if settings.for_gpus:
            _warn_about_gpus(settings.for_gpus)
        return params
    layers = settings.gpu_layers
    params.n_gpu_layers = int(layers) if layers.isdigit() else -1  # a negative number means all layers
    params.split_mode = getattr(llama_cpp, f"LLAMA_SPLIT_MODE_{settings.split_mode.upper()}")
    params.main_gpu = settings.main_gpu
    if settings.shares:
        most = llama_cpp.llama_max_devices()
        if len(settings.shares) > most:
            raise InputError(
                f"tensor_split has {len(settings.shares)} shares; llama.cpp accepts at most {most}, one for "
                "each GPU. Give fewer."
            )
        params.tensor_split = (ctypes.c_float * most)(*settings.shares)  # the object keeps the array alive
    return params


@functools.cache
def _warn_about_gpus(names: tuple[str, ...]) -> None:
    """Log once, although a run may load several models."""
    _log.warning(
        "This build of llama.cpp has no GPU support, so these settings have no effect: %s. "
        "docs/howto/big-quantised-model.md has the command for a build with it.",
        ", ".join(names),
    )


def _load_mode(file: Path) -> int:
    """Return the mode that reads the file into memory if it fits, else llama.cpp's own choice, which maps it.

    Without a GPU, llama.cpp repacks many matrices for the processor. Matrices of a mapped file then take
    memory twice: repacked, and as they lie in the file.
    """
    read: int = llama_cpp.LLAMA_LOAD_MODE_NONE
    choose: int = llama_cpp.LLAMA_LOAD_MODE_AUTO
    if llama_cpp.llama_supports_gpu_offload() or not file.is_file():
        return choose
    return read if file.stat().st_size <= _MAX_READ_SHARE * free_memory() else choose
