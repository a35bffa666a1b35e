"""Contexts around a prompt: a system prompt, earlier turns, or wording around the request.

A gate vector that was fitted on plain prompts alone also activates on a harmful prompt that is wrapped in a
context (docs/adapters.md). The fit therefore reads the gate-only prompts in the contexts of
`data/contexts.toml`. `assign` takes the prompts and returns a `Context` for each.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from rs_gguf.prompts.template import ChatFormat, ChatModel, Message
from rs_gguf.records.conversation import Prompt


@dataclass(frozen=True)
class Context:
    """Text around a prompt. Every part may be absent."""

    name: str
    system: str | None = None  # None means the recipe's system prompt, or the chat template's default.
    turns: tuple[tuple[str, str], ...] = ()  # (user, assistant) of each earlier turn
    wording: str = "{prompt}"

    def tokens(self, chat: ChatFormat, model: ChatModel, prompt: str, system: str | None) -> list[int]:
        """Return the tokens of the conversation that ends with the prompt.

        `system`: the system prompt to use if the context has none.
        """
        text = self.wording.replace("{prompt}", prompt)
        system = system if self.system is None else None  # `messages` holds the context's own.
        return chat.tokenize(model, text, system=system, turns=self.messages)

    @property
    def messages(self) -> list[Message]:
        """Return the messages before the turn of the prompt."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


@functools.cache
def shipped() -> tuple[Context, ...]:
    """Return the contexts of `data/contexts.toml`."""
    text = (resources.files("rs_gguf") / "data" / "contexts.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["context"]
    return tuple(Context(**{**row, "turns": tuple(map(tuple, row.get("turns", ())))}) for row in rows)


def assign(prompts: Sequence[Prompt], chat: ChatFormat, *, seed: int) -> list[tuple[Prompt, Context]]:
    """Return each prompt with one context. All contexts are used equally often (±1).

    Contexts that the model's chat template refuses or drops are left out: some templates have no system
    prompt. Prompts of one context follow each other, so that the model reads their common prefix once.
    """
    usable = [
        context
        for context in shipped()
        if chat.accepts([*(message["role"] for message in context.messages), "user"])
    ]
    order = np.random.default_rng(seed).permutation(len(prompts))
    parts = np.array_split(order, len(usable))
    return [(prompts[i], context) for context, part in zip(usable, parts, strict=True) for i in sorted(part)]
