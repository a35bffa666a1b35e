"""Conversations to token lists, with the model's own chat template, and thinking traces off answers.

The template comes with the model and is untrusted: it runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rs_gguf.errors import InputError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Used, as llama.cpp does, when a file carries no template of its own.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_THINKING_MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("[THINK]", "[/THINK]"),
)


class ChatModel(Protocol):
    """What a chat format needs of a model, in llama.cpp or in PyTorch."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...
    def tokenize(self, text: str, *, special: bool = True) -> list[int]: ...


class ChatFormat:
    """A compiled chat template. `render` and `tokenize` end with the generation prompt.

    Raises:
        InputError: the template does not compile, or (when rendering) does not accept the messages.
    """

    def __init__(self, template: str | None, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form)
        )
        self._specials = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(template or _CHATML)
        except TemplateError as error:
            raise InputError(f"the model's chat template does not compile: {error}.") from error

    @classmethod
    def of(cls, model: ChatModel) -> ChatFormat:
        """The chat format in a GGUF model's metadata."""
        return cls(model.chat_template, bos_token=model.bos_token, eos_token=model.eos_token)

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the model reads, up to where its answer begins."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._specials
            )
        except Exception as error:  # whatever the code in a template may raise
            raise InputError(f"the model's chat template refuses these messages: {error}.") from error

    def accepts(self, messages: Sequence[Message]) -> bool:
        """Whether the template takes these messages: some know no system prompt."""
        try:
            self.render(messages)
        except InputError:
            return False
        return True

    def tokenize(
        self, model: ChatModel, prompt: str, *, system: str | None = None, turns: Sequence[Message] = ()
    ) -> list[int]:
        """Tokens of a conversation that ends with the prompt, control tokens written in it neutralised.

        A prompt that spells a control token ("<|im_end|>") must not end its own turn. So the template is
        rendered around a placeholder and the prompt is tokenised as plain text.
        """
        placeholder = "\N{REPLACEMENT CHARACTER}prompt\N{REPLACEMENT CHARACTER}"
        messages = [{"role": "system", "content": system}] if system is not None else []
        rendered = self.render([*messages, *turns, {"role": "user", "content": placeholder}])
        before, found, after = rendered.partition(placeholder)
        if not found:
            raise InputError("the model's chat template drops the user's message.")
        plain = model.tokenize(prompt, special=False)
        if model.tokenize(prompt) == plain:
            # One pass, as llama.cpp's server does it: merges across the seam stay as the model saw them.
            return model.tokenize(before + prompt + after)
        return model.tokenize(before) + plain + model.tokenize(after)


def split_thinking(text: str, *, starts_inside: bool = False) -> tuple[str, str]:
    """Split an answer into (thinking trace, final answer) at the markers that models use.

    With `starts_inside` the generation prompt already opened the trace, so the answer starts within it.
    An unclosed trace leaves an empty final answer.
    """
    for opening, closing in _THINKING_MARKERS:
        if not (starts_inside or text.lstrip().startswith(opening)):
            continue
        trace, closed, answer = text.partition(closing)
        if closed:
            return _strip_marker(trace, opening), answer.strip()
    for opening, _ in _THINKING_MARKERS:
        if text.lstrip().startswith(opening):
            return _strip_marker(text, opening), ""
    return (text.strip(), "") if starts_inside else ("", text.strip())


def opens_thinking(rendered: str) -> bool:
    """Whether a rendered prompt ends inside a thinking trace (its template opens one)."""
    tail = rendered.rstrip()
    return any(tail.endswith(opening) for opening, _ in _THINKING_MARKERS)


def begins_in_trace(answer: str) -> bool:
    """Whether an answer holds the end of a thinking trace, and not where it was opened."""
    text = answer.lstrip()
    return any(closing in text for _, closing in _THINKING_MARKERS) and not any(
        text.startswith(opening) for opening, _ in _THINKING_MARKERS
    )


def _strip_marker(trace: str, opening: str) -> str:
    return re.sub(r"^\s*" + re.escape(opening), "", trace).strip()


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
