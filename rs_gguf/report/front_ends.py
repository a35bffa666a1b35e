"""How to use a file in the programs that load models: the one source of card, page and documents.

Takes a file's name and options. Returns the recipes of `data/front_ends.toml` for its kind, filled in.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from markupsafe import Markup

from rs_gguf.report.text import markdown_fence


@dataclass(frozen=True)
class CodeBlock:
    """A text to copy, and its language as a Markdown fence names it."""

    language: str
    text: str


@dataclass(frozen=True)
class FrontEnd:
    """A recipe for one program.

    `text`: Markdown with code spans as its only markup. `tested`: with what tests of this project run it; ""
    if none does.
    """

    name: str
    text: str
    tested: str
    blocks: Sequence[CodeBlock]

    @property
    def mark(self) -> str:
        """Whether the recipe was tested, in words."""
        return f"tested with {self.tested}" if self.tested else "untested"

    @property
    def words(self) -> list[str]:
        """The text cut at its code spans: every second part is code."""
        return re.split("`", self.text)

    @property
    def markdown(self) -> Markup:
        """The recipe below a bold name, as a card shows it."""
        parts = [f"**{self.name}** ({self.mark})", self.text]
        parts += [markdown_fence(block.text, block.language) for block in self.blocks]
        return Markup("\n\n".join(parts))


def front_ends(
    file: str,
    options: str,
    *,
    is_vector: bool,
    model: str = "MODEL.gguf",
    reasoning_off: bool = False,
) -> list[FrontEnd]:
    """Return the recipes for a file, by its name.

    options: llama.cpp's options for it, quoted for the shell.
    reasoning_off: the options switch thinking off.
    """
    kind = "vector" if is_vector else "adapter"
    values = {
        "model": model,
        "file": shlex.quote(file),
        "string": json.dumps(file, ensure_ascii=False),
        "options": options,
        # A preset cannot hold options with two values, such as a range of layers. A file needs no range.
        "setting": f"{'control-vector' if is_vector else 'lora'} = {file}",
        "no_thinking": "\nreasoning = off" if reasoning_off else "",
        "thinking": " --reasoning off" if reasoning_off else "",
    }
    text = (resources.files("rs_gguf") / "data" / "front_ends.toml").read_text(encoding="utf-8")
    return [
        FrontEnd(
            row["name"],
            Template(row["text"]).safe_substitute(values),  # what belongs to a program, as ${PORT}, stays
            row.get("tested", ""),
            [
                CodeBlock(block["language"], Template(block["text"]).safe_substitute(values).strip())
                for block in row["blocks"]
            ],
        )
        for row in tomllib.loads(text)["front_end"]
        if kind in row["for"]
    ]
