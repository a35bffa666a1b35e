"""Writes the lower part of three pages out of the code: `python docs/reference/generate.py`.

`cli.md` gets the help of every command, `recipe.md` a table of every key of the recipe, and
`howto/front-ends.md` the recipes of the package's data. What stands above the marker is kept.
`tests/test_reference.py` fails when a page is not what this makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from pydantic import BaseModel

from rs_gguf.cli.engine_options import EngineOption
from rs_gguf.cli.main import main
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.records.artefacts import STAGES
from rs_gguf.report.front_ends import CodeBlock, FrontEnd, front_ends

MARKER = "<!-- Written by docs/reference/generate.py from here on. -->\n"


def _commands(group: click.Group = main, parent: click.Context | None = None) -> Iterator[str]:
    name = group.name if parent else "rs-export"
    context = click.Context(group, parent, name, **group.context_settings)
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, context)
        elif part not in STAGES:
            yield from _command(command, click.Context(command, context, part))
            if part == "run":
                yield from _stages(command, context)
    if parent is None:
        yield from _engine_options(context)


def _engine_options(context: click.Context) -> Iterator[str]:
    having = {
        name: [o for o in command.params if isinstance(o, EngineOption)]
        for name, command in main.commands.items()
    }
    names = [name for name, options in having.items() if options and name not in STAGES]
    formatter = click.HelpFormatter(width=80)
    formatter.write_dl([row for option in having["run"] if (row := option.get_help_record(context))])
    yield from ("", "## Engine options", "")
    yield "Named as in llama.cpp. Defaults too, except: `auto` puts all layers on the GPU, not what fits;"
    yield "8,192 cells, not the training length; batches of 512, not 2,048; threads on usable cores only."
    yield "The options hold for every model that the command loads. The stages of `run` take"
    yield f"them, and {', '.join(f'`{name}`' for name in names)}."
    yield from ("", "```text", formatter.getvalue().rstrip(), "```")


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    arguments = (part.make_metavar(context) for part in command.params if isinstance(part, click.Argument))
    formatter = click.HelpFormatter(width=80)
    if rows := _options(command, context):
        formatter.write_dl(rows)
    text = click.wrap_text(inspect.cleandoc(command.help or ""), 80, preserve_paragraphs=True)
    yield from ("", f"## `{' '.join([context.command_path, *arguments])}`", "", "```text", text)
    yield from (*(["", formatter.getvalue().rstrip()] if rows else []), "```")


def _options(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    """Every option with its help, except --help and the engine options, which have a section."""
    own = (part for part in command.params if not isinstance(part, EngineOption))
    options = (part for part in own if isinstance(part, click.Option))
    return [row for option in options if (row := option.get_help_record(context))]


def _stages(run: click.Command, parent: click.Context) -> Iterator[str]:
    of_run = _options(run, parent)
    options = {name: _options(main.commands[name], parent) for name in STAGES}
    shared = [row for row in of_run if all(row in rows for rows in options.values())]
    names = ", ".join(f"`{name}`" for name, _ in shared)
    yield from ("", "## The stages of `rs-export run`", "")
    yield (
        f"Each runs earlier stages first if needed (`report` repeats none), and takes `[RECIPE]`, {names} as "
        "`run` does."
    )
    yield from ("", "| stage | what it does | other options |", "| --- | --- | --- |")
    for name, info in STAGES.items():
        others = (row for row in options[name] if row not in shared)
        texts = (f"`{row[0]}`{' as in `run`' if row in of_run else f': {row[1]}'}" for row in others)
        yield f"| `{name}` | {info.summary} | {', '.join(texts)} |"


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


_NAMES = {"lora": "remove-adapter.gguf", "control-vector": "remove.gguf"}


def _front_ends() -> Iterator[str]:
    recipes: dict[str, dict[str, FrontEnd]] = {}
    for option, file in _NAMES.items():
        is_vector = option == "control-vector"
        for one in front_ends(file, f"--{option} {file}", is_vector=is_vector, model="model.gguf"):
            recipes.setdefault(one.name, {})[option] = one
    settings = [(f"--{option} {file}", f"{option} = {file}") for option, file in _NAMES.items()]
    for name, kinds in recipes.items():
        yield from ("", f"## {name}")
        shown: set[str] = set()
        for one in kinds.values():
            mark = f"{one.mark.capitalize()}{', with a control vector' if shown else ''}."
            for text in (one.text, *map(_fenced, one.blocks)):
                as_adapter = text
                for adapter, vector in zip(*settings, strict=True):
                    as_adapter = as_adapter.replace(vector, adapter)
                if as_adapter not in shown:
                    shown.add(as_adapter)
                    yield from ("", f"{mark} {text}" if text is one.text else text)


def _fenced(block: CodeBlock) -> str:
    return f"```{block.language}\n{block.text}\n```"


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
