"""Numbers and foreign text as people read them: in a page, in Markdown, in a terminal.

The two template environments escape every value. Text cannot leave what the Markdown helpers return.
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

from rs_gguf.records.metrics import Share

_MOST_DIGITS = 3  # of a percentage: one prompt of a hundred thousand shows, the noise of a sum does not


def percent(value: float | None, digits: int | None = None) -> str:
    """Return a rate in percent, whole or with `digits`.

    Only 0 and 1 read as 0% and 100%: rates near them get more digits.
    """
    if value is None or math.isnan(value):
        return "not measured"
    if digits is None:
        digits = 1 if 0 < abs(value) < 0.0995 or 0.9005 < abs(value) < 1 else 0
    while abs(value) not in (0, 1) and abs(round(100 * value, digits)) in (0, 100) and digits < _MOST_DIGITS:
        digits += 1
    text = f"{100 * value:z.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}%".replace("-", "−")


def count(share: Share | None) -> str:
    """Return `n of m`, as a table shows it."""
    return "not measured" if share is None else f"{share.n} of {share.of}"


def interval(bounds: Sequence[float]) -> str:
    """Return a range of rates in percent, whole except where it is narrow."""
    low, high = bounds
    digits = 1 if 0 < high - low < 0.01 else 0
    return f"{100 * low:z.{digits}f} to {100 * high:z.{digits}f}%".replace("-", "−")


def number(value: float | None, form: str = ".3g") -> str:
    """Return a figure in a format of `format`, with a real minus sign."""
    return "not measured" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def ridge(value: float) -> str:
    """Return the λ of a direction in words; 0 stands for an estimator without one."""
    return f"relative λ {number(value)}" if value else "no λ"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def file_name(path: str) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[/\\]", path)[-1]


def script_hash(script: str) -> str:
    """Return the name of this script in a content security policy."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@functools.cache
def html_environment() -> jinja2.Environment:
    """Return the environment of templates that write HTML."""
    return _environment(autoescape=True)


@functools.cache
def markdown_environment() -> jinja2.Environment:
    """Return the environment of templates that write Markdown.

    As `autoescape` does for HTML, it escapes every value that no filter has made `Markup`.
    """

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
        "count": count,
        "interval": interval,
        "number": number,
        "ridge": ridge,
        "duration": duration,
        "script_hash": script_hash,
    }
    return environment


def markdown_text(text: str) -> str:
    """Return one line that Markdown shows as it is, without markup, HTML, table cells or bare links."""
    line = re.sub(r"[\\`*_\[\]<>|&~#@:$!]", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"(?i)\b(www)\.", r"\1\\.", line)
    return re.sub(r"^(\d+(?=[.)](\s|$))|(?=[-+=]))", r"\1\\", line)  # a list or a heading's rule


def markdown_code(text: str) -> Markup:
    """Return a code span that the text cannot leave."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markup(f"{ticks}{pad}{line}{pad}{ticks}")


def markdown_fence(text: str, language: str) -> Markup:
    """Return a fenced block that the text cannot leave."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup("{0}{1}\n{2}\n{0}".format(ticks, language, text.rstrip("\n")))


def card_notice(card: str, notices: Sequence[str]) -> str:
    """Return a Markdown card with a quoted line for each notice, which it shows below its front matter."""
    if not notices:
        return card
    quoted = "\n".join(f"> - **{markdown_text(notice)}**" for notice in notices)
    start, mark, rest = card.partition("\n---\n") if card.startswith("---\n") else ("", "", card)
    return f"{start}{mark}\n{quoted}\n\n{rest.lstrip()}"


def yaml_text(text: str) -> Markup:
    """Return a double-quoted YAML scalar, which every JSON string is."""
    return Markup(json.dumps(str(text), ensure_ascii=False))
