"""Contexts around a prompt: a system prompt, earlier turns, or wording around the request.

A gate vector that was fitted on plain prompts alone also activates on a harmful prompt that is wrapped in a
context (docs/adapters.md). The fit therefore reads the gate-only prompts in the contexts of
`data/contexts.toml`: `assign` takes the prompts and returns a `Context` for each. Files are measured in other
contexts of that file, which `evaluation` returns.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.prompts.template import ChatFormat, ChatModel, Message
from rs_gguf.records.conversation import Prompt


@dataclass(frozen=True)
class Context:
    """Text around a prompt. Every part may be absent."""

    name: str
    system: str | None = None  # None means the recipe's system prompt, or the chat template's default.
    turns: tuple[tuple[str, str], ...] = ()  # (user, assistant) of each earlier turn
    wording: str = "{prompt}"
    temperature: float | None = None  # None means the temperature at which the prompts are asked anyway.
    refusals_asked: bool = False  # The system prompt asks for refusals, which should stay.

    def text(self, prompt: str) -> str:
        """Return the user's message: the prompt within the wording."""
        return self.wording.replace("{prompt}", prompt)

    def tokens(self, chat: ChatFormat, model: ChatModel, prompt: str, system: str | None) -> list[int]:
        """Return the tokens of the conversation that ends with the prompt.

        `system`: the system prompt to use if the context has none.
        """
        system = system if self.system is None else None  # `messages` holds the context's own.
        return chat.tokenize(model, self.text(prompt), system=system, turns=self.messages)

    def conversation(self, prompt: str, system: str | None) -> list[Message]:
        """Return the messages of the conversation that ends with the prompt; `system` as in `tokens`."""
        before: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        if self.system is not None:
            before = []
        return [*before, *self.messages, {"role": "user", "content": self.text(prompt)}]

    def suits(self, chat: ChatFormat) -> bool:
        """Return whether a chat template shows all messages: some have no system prompt."""
        return chat.accepts([*(message["role"] for message in self.messages), "user"])

    @property
    def messages(self) -> list[Message]:
        """Return the messages before the turn of the prompt."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


PLAIN = Context("plain")
"""The prompt alone."""


def shipped() -> tuple[Context, ...]:
    """Return the contexts of `data/contexts.toml` that a fit reads prompts in."""
    return _read()["context"]


def evaluation() -> tuple[Context, ...]:
    """Return the contexts of `data/contexts.toml` that files are measured in; no fit has read them."""
    return _read()["evaluation"]


@functools.cache
def _read() -> dict[str, tuple[Context, ...]]:
    text = (resources.files("rs_gguf") / "data" / "contexts.toml").read_text(encoding="utf-8")
    return {
        table: tuple(Context(**{**row, "turns": tuple(map(tuple, row.get("turns", ())))}) for row in rows)
        for table, rows in tomllib.loads(text).items()
    }


def named(names: Sequence[str]) -> list[Context]:
    """Return the evaluation contexts of these names, each once; `all` stands for every one.

    Raises:
        InputError: there is no such context.
    """
    known = {context.name: context for context in evaluation()}
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise InputError(
            f"unknown context {escape_control_chars(unknown[0])!r}; known are {', '.join(known)} and all."
        )
    return [context for name, context in known.items() if name in names or "all" in names]


def assign(prompts: Sequence[Prompt], chat: ChatFormat, *, seed: int) -> list[tuple[Prompt, Context]]:
    """Return each prompt with one context. All contexts are used equally often (±1).

    Contexts that the model's chat template refuses or drops are left out: some templates have no system
    prompt. Prompts of one context follow each other, so that the model reads their common prefix once.
    """
    usable = [context for context in shipped() if context.suits(chat)]
    order = np.random.default_rng(seed).permutation(len(prompts))
    parts = np.array_split(order, len(usable))
    return [(prompts[i], context) for context, part in zip(usable, parts, strict=True) for i in sorted(part)]
