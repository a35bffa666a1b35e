"""A GGUF file that llama.cpp has loaded: its weights, its vocabulary, and the adapters made for it.

A path goes in. Metadata, tokens of a text, text of tokens, and handles for a context to work with come out.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import llama_cpp

from rs_gguf.engines.llama import log as llama_log
from rs_gguf.engines.llama.calls import calling
from rs_gguf.errors import InputError
from rs_gguf.machine import free_memory
from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy as widening

_MOST_READ = 0.75  # of the memory that is free: a larger model is mapped, and runs as far as there is room
_KEPT_ADAPTERS = 8  # loaded ones, unless more are in force: a search tries hundreds


class LlamaFile:
    """The weights and the vocabulary of a GGUF file.

    Raises:
        InputError: the file is missing, no GGUF, truncated, of an unknown architecture, without a vocabulary,
            one of several that hold a model, or there is not enough memory for the weights. The message
            carries llama.cpp's own words where it has any.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"model file not found: {path}. Give a GGUF file, or see `rs-export models list`."
            )
        self.metadata = gguf_header.values_of_whole(self.path)
        llama_log.listen()
        llama_cpp.llama_backend_init()
        self.handle: Any = None
        self._adapters: dict[str, Any] = {}  # the one used last comes last
        # A copy that is faster takes more memory than the model itself.
        for file in dict.fromkeys([widening.file_to_load(self.path), self.path]):
            llama_log.forget_errors()
            params = llama_cpp.llama_model_default_params()
            params.load_mode = _load_mode(file)
            try:
                with calling():
                    self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(file), params)
            except BaseException:  # a Ctrl-C: it is loaded all the same
                LlamaFile.close(self)
                raise
            if self.handle:
                break
        if not self.handle:
            raise InputError(llama_log.failure(f"llama.cpp cannot load {self.path}"))
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)
        fault = self._fault()
        if fault:
            LlamaFile.close(self)
            raise InputError(f"{self.path} {fault}. Get the file again, or another one.")
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama_cpp.llama_model_n_layer(self.handle)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self.handle)
        self.n_params: int = llama_cpp.llama_model_n_params(self.handle)
        self.architecture: str = self.metadata["general.architecture"]

    def _fault(self) -> str:
        """What llama.cpp does not mind when it loads a file, and cannot do without later."""
        if llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            return "holds no vocabulary: no text can be made tokens"  # the first would end the process
        return "" if self.metadata else "holds metadata that are not read here, though llama.cpp reads them"

    def close(self) -> None:
        """Free the weights. The object is of no use afterwards."""
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
        """The Jinja chat template in the file's metadata, if any."""
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
        """What the vocabulary asks for before every text: the token that begins it, or nothing."""
        return (
            [llama_cpp.llama_vocab_bos(self._vocab)] if llama_cpp.llama_vocab_get_add_bos(self._vocab) else []
        )

    def token_text(self, token: int) -> str:
        """The literal text of one token, special ones included."""
        return self.detokenize([token], special=True)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of `text`, without the `opening`. With `special`, control tokens in it are recognised."""
        data = text.encode("utf-8")
        size = len(data) + 8
        while True:
            buffer = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, special)
            if count >= 0:
                return list(buffer[:count])
            size = -count  # a character that the vocabulary spells in bytes may be several tokens

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are left out unless `special`."""
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
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    # ---- adapters --------------------------------------------------------------------------------

    def _adapter(self, path: Path) -> Any:
        """The handle of a LoRA adapter, loaded at first use and when its file has changed."""
        if not path.is_file():
            raise InputError(f"adapter file not found: {path}.")
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

    def _free_adapters(self, in_force: Sequence[Any]) -> None:
        """Let go of those that were used longest ago, but for those `in_force` in some context."""
        spare = [
            key for key, handle in self._adapters.items() if not any(handle is kept for kept in in_force)
        ]
        for key in spare[: max(0, len(self._adapters) - _KEPT_ADAPTERS)]:
            llama_cpp.llama_adapter_lora_free(self._adapters.pop(key))


def _load_mode(file: Path) -> int:
    """Read the file into memory where there is room, or let llama.cpp choose, which maps it.

    Without a GPU llama.cpp packs many matrices anew for the processor. Those of a mapped file then take
    memory twice: as they were packed, and as they lie in the file.
    """
    read: int = llama_cpp.LLAMA_LOAD_MODE_NONE
    choose: int = llama_cpp.LLAMA_LOAD_MODE_AUTO
    if llama_cpp.llama_supports_gpu_offload() or not file.is_file():
        return choose
    return read if file.stat().st_size <= _MOST_READ * free_memory() else choose
