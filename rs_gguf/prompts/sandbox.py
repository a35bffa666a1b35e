"""Run the code of a chat template: jinja2's immutable sandbox with limits of memory, but not of time.

A template comes with a model and is untrusted.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_SIZE = 1_000_000  # characters or items of one value
_MAX_SPENT = 20_000_000  # characters or items of all values of a rendering; conversations have far fewer
_WIDTH = re.compile(r"\d{7}")  # in a format: a width of more than a million
# Methods and filters that may give a much larger text than they take. Its size is computed beforehand.
_GROWING = frozenset(
    ("batch", "center", "format", "indent", "join", "ljust", "replace", "rjust", "slice", "tojson", "zfill")
)
# Others that may, and that no chat template needs.
_UNBOUNDED = frozenset(
    ("encode", "expandtabs", "pprint", "sum", "to_bytes", "translate", "urlize", "wordwrap", "xmlattr")
)
_CONCAT = "concatenated"  # the filter in place of the operator `~`


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits of memory: a few lines of a template could fill it.

    Attributes:
        spent: characters and items in what a rendering has computed so far.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    spent = 0

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        for name in _UNBOUNDED & self.filters.keys():
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {
            name: self._bounded(name, self.filters[name]) for name in _GROWING & self.filters.keys()
        }
        self.filters[_CONCAT] = self._concatenated

    def concat(self, pieces: Iterable[str]) -> str:
        """Return the pieces of a rendering, a block or a macro as one text.

        Raises:
            TemplateError: it would be too long.
        """
        return "".join(self._spend(piece) for piece in pieces)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of a template. Refuse methods whose result would be, or may be, too large.

        Raises:
            TemplateError: a method in `_UNBOUNDED`, or a text of more than a million characters.
        """
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int):
            if name in _UNBOUNDED:
                raise TemplateError(f"it calls {name}, which may give large results")
            if name in _GROWING:
                _refuse_large(name, owner, *args, *kwargs.values())
        return self._spend(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator. Refuse large ones and all powers, which no chat template needs.

        Raises:
            TemplateError: a power, or a result of more than a million characters or items.
        """
        if operator == "**":
            raise TemplateError("it computes a power")
        if operator == "%" and isinstance(left, str):
            _refuse_large("format", left, right)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int) and _size(value) * times > _MAX_SIZE:
                    raise TemplateError("it computes a product that is too large")
        elif operator == "+" and isinstance(left, Sized) and _size([left, right]) > _MAX_SIZE:
            raise TemplateError("it computes a sum that is too large")
        return self._spend(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Concatenations().visit(super()._parse(source, name, filename))
        return tree

    def _concatenated(self, values: Sequence[Any]) -> Any:
        """Return the texts of `values` in a row: the operator `~`."""
        if _size(values) > _MAX_SIZE:
            raise TemplateError("it computes a text (~) that is too large")
        return self._spend("".join(map(str, values)))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that refuses what `_refuse_large` refuses."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            place = 1 if hasattr(function, "jinja_pass_arg") else 0  # its first argument is jinja2's own
            values = [list(a) if isinstance(a, Iterator) else a for a in args[place:]]
            _refuse_large(name, *values, *kwargs.values())
            return self._spend(function(*args[:place], *values, **kwargs))

        return checked

    def _spend(self, value: Any) -> Any:
        self.spent += len(value) if isinstance(value, Sized) else 0
        if self.spent > _MAX_SPENT:
            raise TemplateError("its text is too long")
        return value


def _size(value: Any) -> int:
    """Return about how many characters a value has as text, counting no further than the largest size."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict | set):
        return 1
    size = len(value)
    for item in value.items() if isinstance(value, dict) else value:
        if size > _MAX_SIZE:
            break
        size += _size(item)
    return size


def _refuse_large(name: str, *values: Any) -> None:
    """Raise `TemplateError` if a method or filter with these values may give over a million characters."""
    texts = [value for value in values if isinstance(value, str)]
    numbers = [abs(value) for value in values if isinstance(value, int)]
    size = _size(values)
    match name:
        case "replace":
            size += texts[0].count(texts[1]) * len(texts[2]) if len(texts) > 2 else 0
        case "join":
            size += math.prod(len(value) for value in values if isinstance(value, Sized))
        case "format":
            size *= texts[0].count("%") + texts[0].count("{") + 1
        case "indent":
            size += (texts[0].count("\n") + 1) * max([*numbers, *map(len, texts[1:])], default=0)
        case "tojson":
            size *= max(numbers, default=0) + 1
    too_wide = max(numbers, default=0) > _MAX_SIZE or (name == "format" and _WIDTH.search(texts[0]))
    if size > _MAX_SIZE or too_wide:
        raise TemplateError(f"it computes a text ({name}) that is too large")


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
