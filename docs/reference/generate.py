"""Writes the lower part of three pages out of the code: `python docs/reference/generate.py`.

`cli.md` gets the text of every `--help`, `recipe.md` a table of every key of the recipe, and
`howto/front-ends.md` the recipes of the package's data. What stands above the marker is kept.
`tests/test_reference.py` fails when a page is not what this makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
from pydantic import BaseModel

from rs_gguf.cli.main import main
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.report.front_ends import FrontEnd, front_ends

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


def _front_ends() -> Iterator[str]:
    names = {"adapter": "remove-adapter.gguf", "control vector": "remove.gguf"}
    options = {
        "adapter": f"--lora {names['adapter']}",
        "control vector": f"--control-vector {names['control vector']}",
    }
    recipes: dict[str, dict[str, FrontEnd]] = {}
    for kind, name in names.items():
        for one in front_ends(name, options[kind], is_vector=kind == "control vector", model="model.gguf"):
            recipes.setdefault(one.name, {})[kind] = one
    yield from ("", "| recipe | adapter | control vector |", "| --- | --- | --- |")
    for name, kinds in recipes.items():
        marks = [("tested" if kinds[kind].tested else "untested") if kind in kinds else "" for kind in names]
        yield f"| {name} | {' | '.join(marks)} |"
    for name, kinds in recipes.items():
        yield from ("", f"## {name}")
        texts: set[str] = set()
        for kind, one in kinds.items():
            if one.text not in texts:
                texts.add(one.text)
                yield from ("", f"{one.mark.capitalize()}. {one.text}")
            if one.blocks and len(kinds) > 1:
                yield from ("", f"With {'an' if kind == 'adapter' else 'a'} {kind}:")
            for block in one.blocks:
                yield from ("", f"```{block.language}", block.text, "```")


_REFERENCE = Path(__file__).parent
PAGES: dict[Path, Callable[[], Iterator[str]]] = {
    _REFERENCE / "cli.md": _commands,
    _REFERENCE / "recipe.md": _recipe,
    _REFERENCE.parent / "howto" / "front-ends.md": _front_ends,
}


def page(path: Path) -> str:
    """What the page should hold: its own text up to the marker, and what the code says below."""
    above, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{path} has lost its marker"
    return f"{above}{marker}" + "\n".join([*PAGES[path](), ""])


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
