"""The reference pages say what the program says of itself; the list of Python names is the site's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
_spec = importlib.util.spec_from_file_location("generate", REFERENCE / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_pages_are_what_the_code_makes_of_them(name: str) -> None:
    path = REFERENCE / name
    # Other versions of click break lines elsewhere.
    assert path.read_text(encoding="utf-8").split() == generate.page(path).split(), (
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
