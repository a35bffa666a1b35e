"""A run folder's results, read for people: every string in them can be shown as it is.

`metrics.json`, `evaluation.jsonl`, `tune.json`, `recipe.toml` and, where there is one, `fit.json` go in.
Prompts and answers are untrusted, so what could hide, reorder or break text is made visible here, once.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = dict[str, Any]

_NEEDED = ("metrics.json", "evaluation.jsonl", "tune.json", "recipe.toml")

# Controls but tab and line feed, line and paragraph separators, bidirectional embeddings, overrides and
# isolates (left-to-right and right-to-left marks stay: ordinary text needs them), surrogates, noncharacters.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)


@dataclass(frozen=True)
class Results:
    """What the stages left. `fit` is empty where the fit stage left no summary."""

    metrics: Row
    rows: list[Row]
    tune: Row
    fit: Row
    recipe: Row
    recipe_text: str


def load(folder: Path) -> Results:
    """Read a measured run folder.

    Raises:
        InputError: one of the files is missing or not what the stages write.
    """
    texts = {name: _text(folder / name) for name in _NEEDED}
    fitted = _text(folder / "fit.json") if (folder / "fit.json").is_file() else "{}"
    try:
        # Not splitlines(): answers may hold U+2028 and its kin, which JSON leaves as they are.
        rows = [json.loads(line) for line in texts["evaluation.jsonl"].split("\n") if line.strip()]
        metrics, tune, fit = (json.loads(t) for t in (texts["metrics.json"], texts["tune.json"], fitted))
        recipe = tomllib.loads(texts["recipe.toml"])
    except ValueError as error:  # of which JSONDecodeError and TOMLDecodeError are kinds
        raise InputError(f"{folder}: a result file is damaged ({error}). Run with --fresh.") from error
    return Results(*map(printable, (metrics, rows, tune, fit, recipe, texts["recipe.toml"])))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot read {path}: {reason}. A report needs a measured run: `rs-export run`."
        ) from error


def printable(value: Any) -> Any:
    """The JSON value with every character that could hide, reorder or break text made visible."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub(_visible, value.replace("\r\n", "\n"))
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return value


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    if code in (0x2028, 0x2029):
        return "\n"
    return "\ufffd" if 0xD800 <= code < 0xE000 or code >= 0xFDD0 else f"⟨U+{code:04X}⟩"
