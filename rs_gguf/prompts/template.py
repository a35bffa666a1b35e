"""Turn conversations into tokens with the model's own chat template.

The template comes with the model and is untrusted, so it runs in jinja2's immutable sandbox. The sandbox does
not limit time: nested loops in a template can run for as long as they like.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable, Sequence, Sized
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from rs_gguf.errors import InputError
from rs_gguf.prompts.markers import THINKING_MARKERS

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
_MAX_PRODUCT = 1_000_000  # characters or items
_MAX_RENDERED = 4_000_000  # characters; conversations are shorter
_WIDTH = re.compile(r"\d{7}")  # in a format: a width of more than a million
# Text methods and filters that may give a much larger text than they take.
_GROWING = (
    "batch", "center", "expandtabs", "format", "indent", "join", "ljust", "replace", "rjust", "slice",
    "tojson", "zfill",
)  # fmt: skip
_CONCAT = "concatenated"  # the filter in place of the operator `~`
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


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox without large values: a few lines of a template could fill the memory with them."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Concatenations().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of a template. Refuse text methods whose result would be too large.

        Raises:
            TemplateError: a width, or a replacement or joining, of more than a million characters.
        """
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps `format`
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str) and name in _GROWING:
            _refuse_large(name, text, *args, *kwargs.values())
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return `left * right`. Refuse large results and all powers, which no chat template needs.

        Raises:
            TemplateError: a power, or a product or sum of more than a million characters or items.
        """
        if operator == "+":
            if isinstance(left, Sized) and isinstance(right, Sized) and len(left) + len(right) > _MAX_PRODUCT:
                raise TemplateError("it computes a sum (+) that is too large")
            return super().call_binop(context, operator, left, right)
        if operator == "%":
            if isinstance(left, str):
                _refuse_large(operator, left, *(right if isinstance(right, tuple) else (right,)))
            return super().call_binop(context, operator, left, right)
        too_large = any(
            isinstance(value, Sized) and isinstance(times, int) and len(value) * times > _MAX_PRODUCT
            for value, times in ((left, right), (right, left))
        )
        if operator == "**" or too_large:
            raise TemplateError(f"it computes a product ({operator}) that is too large")
        return super().call_binop(context, operator, left, right)


def _refuse_large(name: str, *values: Any) -> None:
    """Raise `TemplateError` if a text operation with these values may give over a million characters."""
    texts = [value for value in values if isinstance(value, str)]
    size = 0
    if name == "replace" and len(texts) >= 3:
        size = len(texts[0]) + texts[0].count(texts[1]) * len(texts[2])
    elif name == "join":
        size = math.prod(len(value) for value in values if isinstance(value, Sized))
    too_wide = any(isinstance(value, int) and abs(value) > _MAX_PRODUCT for value in values)
    if too_wide or size > _MAX_PRODUCT or (name in ("%", "format") and _WIDTH.search(texts[0])):
        raise TemplateError(f"it computes a text ({name}) that is too large")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses what `_refuse_large` refuses."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _refuse_large(name, *args, *kwargs.values())
        return function(*args, **kwargs)

    return checked


def _concatenated(values: Sequence[Any]) -> str:
    """Return the texts of `values` in a row: the operator `~`."""
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > _MAX_PRODUCT:
        raise TemplateError("it computes a text (~) that is too large")
    return "".join(texts)


class _Concatenations(NodeTransformer):
    """Replaces the operator `~`, which the sandbox cannot intercept, by a filter."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, _CONCAT, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The tag `{% generation %}…{% endgeneration %}`, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes between the tags; the tags have no effect here."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatFormat:
    """A compiled chat template. The results of `render` and `tokenize` end with the generation prompt.

    Raises:
        InputError: the template does not compile; or, when it renders, does not accept the messages.
    """

    def __init__(self, template: str | None, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters |= {
            name: _bounded(name, function)
            for name, function in environment.filters.items()
            if name in _GROWING
        }
        environment.filters[_CONCAT] = _concatenated
        del environment.globals["lipsum"]
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
        rendered: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=contents, add_generation_prompt=True, **self._specials, **switches
            ):
                size += len(piece)
                if size > _MAX_RENDERED:
                    raise TemplateError("its text is too long")
                rendered.append(piece)
        except Exception as error:  # The code in a template may raise anything.
            raise InputError(f"the model's chat template refuses these messages: {error}.") from error
        return "".join(rendered)

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
