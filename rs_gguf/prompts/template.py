"""Conversations to token lists, with the model's own chat template.

The template comes with the model and is untrusted: it runs in jinja2's immutable sandbox. Loops within loops
can still keep it busy for as long as they like.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence, Sized
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rs_gguf.errors import InputError
from rs_gguf.prompts.markers import THINKING_MARKERS

_log = logging.getLogger("rs_gguf.chat")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# The day that every template is told, whatever day it is: else a run that is resumed after midnight would
# read other tokens than it did before. It is the one that Llama 3's template falls back on.
_TODAY = datetime(2024, 7, 26)

# Used, as llama.cpp does, when a file carries no template of its own.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_MARK = "\N{REPLACEMENT CHARACTER}{}\N{REPLACEMENT CHARACTER}"  # stands for a text in a rendering
_HELLO: list[Message] = [{"role": "user", "content": "Hi"}]  # to see what a template puts around it
_LARGEST_PRODUCT = 1_000_000  # characters or parts
_THINKS = re.compile(r"think|reasoning_content")
_warned: set[str] = set()  # chat templates


class ChatModel(Protocol):
    """What a chat format needs of a model, in llama.cpp or in PyTorch."""

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


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox without products that would take all memory: a template of one line can ask for them."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left * right`. No chat template needs a power."""
        too_large = any(
            isinstance(value, Sized) and isinstance(times, int) and len(value) * times > _LARGEST_PRODUCT
            for value, times in ((left, right), (right, left))
        )
        if operator == "**" or too_large:
            raise TemplateError(f"it asks for a product ({operator}) that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which a template tells trainers what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags, as if they were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatFormat:
    """A compiled chat template. `render` and `tokenize` end with the generation prompt.

    Raises:
        InputError: the template does not compile, or (when rendering) does not accept the messages.
    """

    def __init__(self, template: str | None, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=lambda form: _TODAY.strftime(form)
        )
        self._specials = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(template or _CHATML)
        except Exception as error:  # Python's own compiler has limits and rules of its own
            raise InputError(f"the model's chat template does not compile: {error}.") from error

    @classmethod
    def of(cls, model: ChatModel) -> ChatFormat:
        """The chat format of a model, ChatML where it has none of its own."""
        chat = cls(model.chat_template, bos_token=model.bos_token, eos_token=model.eos_token)
        chat._warn_of_unknown_traces(model.chat_template or "")
        return chat

    def _warn_of_unknown_traces(self, template: str) -> None:
        if template in _warned or not _THINKS.search(template):
            return
        _warned.add(template)
        # Some templates put their markers together from parts: those show in what is rendered alone.
        with contextlib.suppress(InputError):
            template += self.render(_HELLO)
        if not any(marker in template for pair in THINKING_MARKERS for marker in pair):
            _log.warning(
                "the model's chat template speaks of thinking, but holds no marker of a trace that is known: "
                "what the model thinks would count as its answer. See docs/howto/thinking-model.md."
            )

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the model reads, up to where its answer begins."""
        return self._render(messages, typed=self._typed)

    @cached_property
    def thinks_in_server(self) -> bool:
        """Whether `enable_thinking`, undefined here and true in llama-server, changes the prompt."""
        return self._render(_HELLO, typed=self._typed, enable_thinking=True) != self.render(_HELLO)

    def _render(self, messages: Sequence[Message], *, typed: bool, **switches: bool) -> str:
        """With contents as text or, `typed`, as lists of one part."""
        given = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if typed else message
            for message in messages
        ]
        try:
            return self._template.render(
                messages=given, add_generation_prompt=True, **self._specials, **switches
            )
        except Exception as error:  # whatever the code in a template may raise
            raise InputError(f"the model's chat template refuses these messages: {error}.") from error

    @cached_property
    def _typed(self) -> bool:
        """Whether the template shows contents only as lists of parts; found out as llama.cpp does."""
        return not self._shows(["user"], typed=False) and self._shows(["user"], typed=True)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system prompt."""
        return self.accepts(["system", "user"])

    def accepts(self, roles: Sequence[str]) -> bool:
        """Whether the template takes messages of these roles and drops none."""
        return self._shows(roles, typed=self._typed)

    def _shows(self, roles: Sequence[str], *, typed: bool) -> bool:
        # Not the messages themselves: two may be alike, and a switch in one, like /no_think, is not shown.
        messages = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        try:
            rendered = self._render(messages, typed=typed)
        except InputError:
            return False
        return all(message["content"] in rendered for message in messages)

    def tokenize(
        self, model: ChatModel, prompt: str, *, system: str | None = None, turns: Sequence[Message] = ()
    ) -> list[int]:
        """Tokens of a conversation that ends with the prompt, control tokens written in it neutralised.

        A prompt that spells a control token ("<|im_end|>") must not end its own turn. So the template is
        rendered around a placeholder and the prompt is tokenised as plain text. They begin with the model's
        `opening`, which a template may leave to the tokeniser, as llama.cpp's server lets it.

        Raises:
            InputError: the template refuses the conversation, or drops the system prompt or the prompt.
        """
        placeholder = _MARK.format("prompt")
        messages = [{"role": "system", "content": system}] if system is not None else []
        rendered = self.render([*messages, *turns, {"role": "user", "content": placeholder}])
        before, found, after = rendered.partition(placeholder)
        if not found:
            raise InputError("the model's chat template drops the user's message.")
        if system is not None and not self.takes_system:
            raise InputError(
                "the model's chat template drops the system prompt. Leave it out, or write it into the "
                "prompts."
            )
        plain = model.tokenize(prompt, special=False)
        if model.tokenize(prompt) == plain:
            # One pass, as llama.cpp's server does it: merges across the seam stay as the model saw them.
            tokens = model.tokenize(before + prompt + after)
        else:
            tokens = model.tokenize(before) + plain + model.tokenize(after)
        opening = model.bos_prefix
        return tokens if tokens[: len(opening)] == opening else opening + tokens


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
