"""Numbers and foreign text as people read them: in a page, in Markdown, in a terminal.

The two template environments escape every value; what the Markdown helpers return cannot be left by the text
in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

_MOST_DIGITS = 3  # of a percentage: one prompt of a hundred thousand shows, the noise of a sum does not


def percent(value: float | None, digits: int | None = None) -> str:
    """A rate: whole or with `digits`, but with more near 0 and 1, which it reads as only where it is."""
    if value is None or math.isnan(value):
        return "not measured"
    if digits is None:
        digits = 1 if 0 < abs(value) < 0.0995 or 0.9005 < abs(value) < 1 else 0
    while abs(value) not in (0, 1) and abs(round(100 * value, digits)) in (0, 100) and digits < _MOST_DIGITS:
        digits += 1
    text = f"{100 * value:z.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}\u202f%".replace("-", "−")


def interval(bounds: Sequence[float]) -> str:
    """A range of rates, whole but where it is narrow."""
    low, high = bounds
    digits = 1 if 0 < high - low < 0.01 else 0
    return f"{100 * low:z.{digits}f} to {100 * high:z.{digits}f}\u202f%".replace("-", "−")


def number(value: float | None, form: str = ".3g") -> str:
    """A figure in a format of `format`, with a real minus sign."""
    return "not measured" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def ridge(value: float) -> str:
    """The λ of a direction; 0 where its estimator has none."""
    return f"relative λ {number(value)}" if value else "no λ"


def duration(seconds: float) -> str:
    """A time in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path)[-1]


def script_hash(script: str) -> str:
    """What a content security policy calls this script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@functools.cache
def html_environment() -> jinja2.Environment:
    """Templates that write HTML."""
    return _environment(autoescape=True)


@functools.cache
def markdown_environment() -> jinja2.Environment:
    """As `autoescape` does for HTML: a value is escaped unless a filter has made it `Markup`."""

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else markdown_text(str(value))

    environment = _environment(autoescape=False, finalize=finalize)
    environment.filters |= {"code": markdown_code, "fenced": markdown_fence, "yaml": yaml_text}
    return environment


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rs_gguf", "data"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "number": number,
        "ridge": ridge,
        "duration": duration,
        "script_hash": script_hash,
    }
    return environment


def markdown_text(text: str) -> str:
    """Text of one line that Markdown shows as it is: no markup, HTML, table cell or bare link comes of it."""
    line = re.sub(r"[\\`*_\[\]<>|&~#@:$!]", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"(?i)\b(www)\.", r"\1\\.", line)
    return re.sub(r"^(\d+(?=[.)](\s|$))|(?=[-+=]))", r"\1\\", line)  # a list or a heading's rule


def markdown_code(text: str) -> Markup:
    """A code span that the text cannot leave."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markup(f"{ticks}{pad}{line}{pad}{ticks}")


def markdown_fence(text: str, language: str) -> Markup:
    """A fenced block that the text cannot leave."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup("{0}{1}\n{2}\n{0}".format(ticks, language, text.rstrip("\n")))


def yaml_text(text: str) -> Markup:
    """A double-quoted YAML scalar; JSON's strings are such."""
    return Markup(json.dumps(str(text), ensure_ascii=False))
