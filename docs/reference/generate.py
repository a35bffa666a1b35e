"""Writes the lower part of `cli.md` and `recipe.md` out of the code: `python docs/reference/generate.py`.

`cli.md` gets the text of every `--help`, `recipe.md` a table of every key of the recipe; what stands above
the marker is kept. `tests/test_reference.py` fails when a page is not what this makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
from pydantic import BaseModel

from rs_gguf.cli.main import main
from rs_gguf.pipeline.recipe import Recipe

MARKER = "<!-- Written by docs/reference/generate.py from here on. -->\n"


def _commands(
    command: click.Command = main, name: str = "rs-export", parent: click.Context | None = None
) -> Iterator[str]:
    context = click.Context(
        command, parent, name, max_content_width=80, terminal_width=80, **command.context_settings
    )
    yield from ("", f"## `{context.command_path}`", "", "```text", command.get_help(context), "```")
    if isinstance(command, click.Group):
        for part, found in command.commands.items():  # in the order of the pipeline
            yield from _commands(found, part, context)


def _recipe(model: type[BaseModel] = Recipe, section: str = "") -> Iterator[str]:
    sections = {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    yield from ("", f"## `[{section}]`" if section else "## Top level", "")
    yield from ("| key | default | meaning |", "| --- | --- | --- |")
    for name, field in model.model_fields.items():
        if name not in sections:
            default = "" if field.default is None else f"`{field.default!r}`"
            told = str(field.description).replace("|", "\\|")
            yield f"| `{name}` | {default} | {told} |"
    for name, part in sections.items():
        yield from _recipe(part, name)


PAGES: dict[str, Callable[[], Iterator[str]]] = {"cli.md": _commands, "recipe.md": _recipe}


def page(path: Path) -> str:
    """What the page should hold: its own text up to the marker, and what the code says below."""
    above, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{path} has lost its marker"
    return f"{above}{marker}" + "\n".join([*PAGES[path.name](), ""])


if __name__ == "__main__":
    for name in PAGES:
        path = Path(__file__).with_name(name)
        path.write_text(page(path), encoding="utf-8")
