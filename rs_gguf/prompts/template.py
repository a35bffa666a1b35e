"""Turn conversations into tokens with the model's own chat template.

The template comes with the model and is untrusted, so it runs in a sandbox (`prompts.sandbox`). Its time is
not limited: nested loops in a template can run for as long as they like.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Protocol

from jinja2 import TemplateError

from rs_gguf.errors import InputError
from rs_gguf.prompts.markers import THINKING_MARKERS
from rs_gguf.prompts.sandbox import Sandbox

_log = logging.getLogger("rs_gguf.chat")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Templates always get this date. Otherwise a run that is resumed after midnight would read other tokens than
# before. It is the default date of Llama 3's template.
_TODAY = datetime(2024, 7, 26)

# The template for models without one, as in llama.cpp.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PLACEHOLDER = "\N{REPLACEMENT CHARACTER}{}\N{REPLACEMENT CHARACTER}"  # for a text in a rendering
HELLO: list[Message] = [{"role": "user", "content": "Hi"}]  # to see the text that a template adds
_THINKING_WORDS = re.compile(r"think|reasoning_content")
_warned: set[str] = set()  # the templates that a warning was logged for


class ChatModel(Protocol):
    """The parts of a model that a chat format needs, in llama.cpp or in PyTorch."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...
    @property
    def bos_prefix(self) -> list[int]: ...
    def tokenize(self, text: str, *, special: bool = True) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str: ...


class ChatFormat:
    """A compiled chat template. The results of `render` and `tokenize` end with the generation prompt.

    Raises:
        InputError: the template does not compile; or, when it renders, does not accept the messages.
    """

    def __init__(self, template: str | None, *, bos_token: str = "", eos_token: str = "") -> None:
        self._sandbox = environment = Sandbox()
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=lambda form: _TODAY.strftime(form)
        )
        self._specials = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(template or _CHATML)
        except Exception as error:  # jinja2 compiles to Python, whose compiler raises errors of its own.
            raise InputError(f"the model's chat template does not compile: {error}.") from error

    @classmethod
    def of(cls, model: ChatModel) -> ChatFormat:
        """Return the chat format of a model; ChatML if the model has no template."""
        chat = cls(model.chat_template, bos_token=model.bos_token, eos_token=model.eos_token)
        chat._warn_of_unknown_traces(model.chat_template or "")
        return chat

    def _warn_of_unknown_traces(self, template: str) -> None:
        if template in _warned or not _THINKING_WORDS.search(template):
            return
        _warned.add(template)
        # Some templates assemble their markers from parts, so the markers appear only in the rendered text.
        with contextlib.suppress(InputError):
            template += self.render(HELLO)
        if not any(marker in template for pair in THINKING_MARKERS for marker in pair):
            _log.warning(
                "the model's chat template mentions thinking, but has no known marker of a thinking trace: "
                "the trace would count as part of the answer. See docs/howto/thinking-model.md."
            )

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that the model reads, up to the beginning of its answer."""
        return self._render(messages, typed=self._typed)

    @cached_property
    def thinks_in_server(self) -> bool:
        """Return whether `enable_thinking` changes the prompt. It is true in llama-server, undefined here."""
        return self._render(HELLO, typed=self._typed, enable_thinking=True) != self.render(HELLO)

    def _render(self, messages: Sequence[Message], *, typed: bool, **switches: bool) -> str:
        """Return the rendered text. `typed`: pass each content as a list of one part instead of as text."""
        contents = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if typed else message
            for message in messages
        ]
        self._sandbox.spent = 0
        try:
            return self._template.render(
                messages=contents, add_generation_prompt=True, **self._specials, **switches
            )
        except Exception as error:  # The code in a template may raise anything.
            raise InputError(f"the model's chat template refuses these messages: {error}.") from error

    @cached_property
    def _typed(self) -> bool:
        """Return whether the template shows contents only as lists of parts. llama.cpp tests the same way."""
        return not self._shows(["user"], typed=False) and self._shows(["user"], typed=True)

    @cached_property
    def takes_system(self) -> bool:
        """Return whether the template shows a system prompt."""
        return self.accepts(["system", "user"])

    def accepts(self, roles: Sequence[str]) -> bool:
        """Return whether the template accepts messages of these roles and drops none."""
        return self._shows(roles, typed=self._typed)

    def _shows(self, roles: Sequence[str], *, typed: bool) -> bool:
        # Placeholders, not real messages: two messages may be equal, and templates hide switches (/no_think).
        messages = [{"role": role, "content": _PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
        try:
            rendered = self._render(messages, typed=typed)
        except InputError:
            return False
        return all(message["content"] in rendered for message in messages)

    def tokenize(
        self, model: ChatModel, prompt: str, *, system: str | None = None, turns: Sequence[Message] = ()
    ) -> list[int]:
        """Return the tokens of a conversation that ends with the prompt, up to the answer.

        Control tokens that the prompt spells ("<|im_end|>") stay plain text: they must not end its turn. The
        template is therefore rendered around a placeholder. The tokens begin with the model's `bos_prefix`,
        which a template may leave to the tokeniser, as in llama.cpp's server.

        Raises:
            InputError: the template refuses the conversation, or drops the system prompt or the prompt.
        """
        placeholder = _PLACEHOLDER.format("prompt")
        messages = [{"role": "system", "content": system}] if system is not None else []
        rendered = self.render([*messages, *turns, {"role": "user", "content": placeholder}])
        before, separator, after = rendered.partition(placeholder)
        if not separator:
            raise InputError("the model's chat template drops the user's message. Use another model.")
        if system is not None and not self.takes_system:
            raise InputError(
                "the model's chat template drops the system prompt. Leave it out, or write it into the "
                "prompts."
            )
        plain = model.tokenize(prompt, special=False)
        if model.tokenize(prompt) == plain:
            # One pass, as in llama.cpp's server: tokens may merge across the edges of the prompt.
            tokens = model.tokenize(before + prompt + after)
        else:
            tokens = model.tokenize(before) + plain + model.tokenize(after)
        prefix = model.bos_prefix
        return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
