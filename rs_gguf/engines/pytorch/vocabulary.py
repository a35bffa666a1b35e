"""The tokenizer of a transformers model, with the interface of the llama.cpp engine.

Text goes in and tokens come out, or the other way round. The chat template and end tokens come out too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rs_gguf.prompts.markers import turn_ends


class Vocabulary:
    """The vocabulary of one model. `ends`: the tokens that end an answer."""

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        self.tokenizer = tokenizer
        configured = getattr(generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self.ends: set[int] = (ends | turn_ends(tokenizer.get_vocab())) - {None}

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja chat template, or its `default` one of several; None if there is none."""
        template = self.tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def bos_token(self) -> str:
        return self.tokenizer.bos_token or ""

    @property
    def eos_token(self) -> str:
        return self.tokenizer.eos_token or ""

    @property
    def bos_prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before every text: the BOS token, or none."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos] else []

    def token_text(self, token: int) -> str:
        """Return the literal text of one token, also of a control token."""
        return self.detokenize([token], special=True)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of `text` without `bos_prefix`; `special` recognises control tokens in it."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )
        return list(encoding["input_ids"])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `tokens`, without control tokens unless `special`."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text
