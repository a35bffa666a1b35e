"""A MkDocs hook: the page that lies outside of `docs/`, equations without scripts, nothing from elsewhere.

`vectors/README.md` becomes a page of the site. Links to it, and its own, are written so that they lead
somewhere in the repository, and changed here. Equations, which arithmatex marks, become MathML, which
browsers show without scripts.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_OUTSIDE = "vectors/README.md"
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the page from outside."""
    path = Path(config.docs_dir).parent / _OUTSIDE
    files.append(File.generated(config, _OUTSIDE, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the two folders, which are one in the site."""
    if page.file.src_uri == _OUTSIDE:
        return markdown.replace("](../docs/", "](../")
    return re.sub(rf"\]\(\.\./((?:\.\./)*{_OUTSIDE})", r"](\1", markdown)


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
