"""A Griffe extension: lines `name: …` of a docstring that name a parameter become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LINE = re.compile(r"^(\w+): ", re.MULTILINE)


class Parameters(griffe.Extension):
    """Rewrites the docstrings of functions and classes after they are read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._list(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        self._list(cls, set(cls.members))

    def _list(self, documented: griffe.Object, names: set[str]) -> None:
        if documented.docstring is None:
            return
        lines, inside = [], False
        for line in documented.docstring.value.split("\n"):
            named = _LINE.match(line)
            if named and named[1] in names:
                if not inside and lines and lines[-1]:
                    lines.append("")  # Markdown begins a list after an empty line only
                inside = True
                line = f"- `{named[1]}`: {line[named.end() :]}"
            elif not line:
                inside = False
            elif inside:
                line = f"    {line.strip()}"
            lines.append(line)
        documented.docstring.value = "\n".join(lines)
