"""Other contexts to read prompts in: system prompts, earlier turns, wordings around a request.

A gate that has seen plain requests alone takes a wrapped one of harm for something else, and opens
(docs/adapters.md). So the prompts of a fit that are only read are read in the contexts of
`data/contexts.toml`, and a `Context` for each prompt comes out.
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
    """What stands around a prompt; all of it may be missing."""

    name: str
    system: str | None = None  # None: the recipe's, or the chat template's own
    turns: tuple[tuple[str, str], ...] = ()  # what a user said, and what was answered
    wording: str = "{prompt}"

    def tokens(self, chat: ChatFormat, model: ChatModel, prompt: str, system: str | None) -> list[int]:
        """The conversation that ends with the prompt; `system` where the context has none of its own."""
        worded = self.wording.replace("{prompt}", prompt)
        others = system if self.system is None else None
        return chat.tokenize(model, worded, system=others, turns=self.messages)

    @property
    def messages(self) -> list[Message]:
        """What comes before the turn of the prompt."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


@functools.cache
def shipped() -> tuple[Context, ...]:
    """The contexts of `data/contexts.toml`."""
    text = (resources.files("rs_gguf") / "data" / "contexts.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["context"]
    return tuple(Context(**{**row, "turns": tuple(map(tuple, row.get("turns", ())))}) for row in rows)


def spread(prompts: Sequence[Prompt], chat: ChatFormat, *, seed: int) -> list[tuple[Prompt, Context]]:
    """Each of the prompts in one context, all contexts as often as each other (±1).

    Contexts that the model's chat template refuses or drops (some know no system prompt) are left out.
    Prompts of one context follow each other: what they have in common is then read once.
    """
    usable = [
        context
        for context in shipped()
        if chat.accepts([*(message["role"] for message in context.messages), "user"])
    ]
    order = np.random.default_rng(seed).permutation(len(prompts))
    parts = np.array_split(order, len(usable))
    return [(prompts[i], context) for context, part in zip(usable, parts, strict=True) for i in sorted(part)]
