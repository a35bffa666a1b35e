"""The tokenizer of a transformers model, with the interface of the llama.cpp engine.

Text goes in and tokens come out, or the other way round, beside the chat template and the ends of turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rs_gguf.prompts.markers import turn_ends


class Vocabulary:
    """Text and tokens of one model. `ends`: the tokens that end an answer."""

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        self.tokenizer = tokenizer
        configured = getattr(generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self.ends: set[int] = (ends | turn_ends(tokenizer.get_vocab())) - {None}

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja chat template, if any; the one named `default` when there are several."""
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
        """What the tokenizer puts before every text: the token that begins it, or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos] else []

    def token_text(self, token: int) -> str:
        """The literal text of one token, special ones included."""
        return self.detokenize([token], special=True)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of `text`, without the `opening`. With `special`, control tokens in it are recognised."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )
        return list(encoding["input_ids"])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are left out unless `special`."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text
