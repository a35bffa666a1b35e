"""The reference pages say what the program says of itself; the list of Python names is the site's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = DOCS / "reference"
_MAKE = "import sys, pathlib, generate; sys.stdout.write(generate.page(pathlib.Path(sys.argv[1])))"


@pytest.mark.parametrize("name", ["reference/cli.md", "reference/recipe.md", "howto/front-ends.md"])
def test_pages_are_what_the_code_makes_of_them(name: str) -> None:
    # By itself: a click command keeps the help options of the first context that it was run in.
    made = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", _MAKE, str(DOCS / name)],
        cwd=REFERENCE, check=True, capture_output=True, encoding="utf-8", timeout=120,
    ).stdout  # fmt: skip
    # Other versions of click break lines elsewhere.
    assert (DOCS / name).read_text(encoding="utf-8").split() == made.split(), (
        "run `python docs/reference/generate.py`"
    )


def test_every_python_name_of_the_site_is_listed() -> None:
    text = (REFERENCE / "python.md").read_text(encoding="utf-8")
    listed = {
        f"{module}.{name}"
        for module, names in re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names) or ["all"]
    }
    shown = set()
    for name, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, re.MULTILINE):
        if "show_root_heading: false" not in options:
            shown.add(name)
            continue
        members = re.search(r"members: \[(.*)\]", options)  # of a module, which has no entry itself
        shown |= {f"{name}.{member}" for member in (members[1].split(", ") if members else ["all"])}
    assert listed == shown
