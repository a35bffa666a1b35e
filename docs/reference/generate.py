"""A MkDocs hook: pages out of the code, so that they cannot go stale, and equations without scripts.

`cli.md` gets the text of every `--help`, `recipe.md` a table of every key of the recipe. Equations, which
arithmatex marks, become MathML, which browsers show by themselves.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from pydantic import BaseModel

from rs_gguf.cli import main
from rs_gguf.recipe import Recipe

_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

_FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add what is generated to the two pages that hold it."""
    generated = {"reference/cli.md": _commands, "reference/recipe.md": _recipe}.get(page.file.src_uri)
    if generated is None:
        return markdown
    return "\n".join([markdown.partition("\n(In a checkout")[0], *generated()])


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML."""
    return _EQUATION.sub(
        lambda found: convert(
            html.unescape(found["tex"]).strip(), display="inline" if found["open"] == "(" else "block"
        ),
        content,
    )


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere."""
    if found := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output


def _commands(command: click.Command = main, name: str = "rs-export") -> Iterator[str]:
    context = click.Context(command, info_name=name, max_content_width=80, terminal_width=80)
    yield from (f"## `{name}`", "", "```text", command.get_help(context), "```", "")
    if isinstance(command, click.Group):
        for part, found in command.commands.items():  # in the order of the pipeline
            yield from _commands(found, f"{name} {part}")


def _recipe(model: type[BaseModel] = Recipe, section: str = "") -> Iterator[str]:
    head = [
        "",
        f"## `[{section}]`" if section else "## Top level",
        "",
        "| key | default | meaning |",
        "| --- | --- | --- |",
    ]
    sections = {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    yield from head
    for name, field in model.model_fields.items():
        if name not in sections:
            default = "" if field.default is None else f"`{field.default!r}`"
            yield f"| `{name}` | {default} | {field.description} |"
    for name, part in sections.items():
        yield from _recipe(part, name)
