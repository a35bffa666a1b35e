"""The figures of the documents are what their script draws, and say nothing that needs another file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DRAWINGS = Path(__file__).parents[1] / "docs" / "drawings"
PICTURES = DRAWINGS.parent / "pictures"


@pytest.mark.slow
def test_figures_are_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DRAWINGS / "draw.py", tmp_path], check=True, timeout=120)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in DRAWINGS.glob("*.svg")}
    assert made.keys() == kept.keys()
    for name, text in made.items():
        assert kept[name] == text, f"run `python docs/drawings/draw.py`: {name} differs"


def test_figures_have_a_title_both_colour_schemes_and_no_links() -> None:
    for path in [*DRAWINGS.glob("*.svg"), *PICTURES.glob("*.svg")]:
        text = path.read_text(encoding="utf-8")
        title = ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert title.text
        # A terminal is dark on either page.
        assert "prefers-color-scheme: dark" in text or path.name == "demo.svg"
        assert "href" not in text
