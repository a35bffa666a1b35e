"""Read the texts from which a recipe's values come: overrides of `--set`, environment variables, times.

Texts go in; plain values come out, which the schema of `rs_gguf.pipeline.recipe` validates. A wrong text
raises an `InputError` that names it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import SettingsError

from rs_gguf.errors import InputError

PREFIX = "RS_GGUF_"
"""Environment variables of a recipe begin with this."""
# Variables that the projection kernel reads, judges and models at an address, and downloads of models.
_OTHER_VARIABLES = {"RS_GGUF_KERNEL", "RS_GGUF_API_KEY", "RS_GGUF_SERVER_KEY", "RS_GGUF_MODEL_SOURCES"}

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def none_or_value(value: Any) -> Any:
    """Return None for the text "none" or an empty one, so that `--set` can unset a value; else `value`."""
    return None if isinstance(value, str) and value.strip() in ("", "none") else value


def seconds(value: Any) -> Any:
    """Return the seconds of a time such as "2h", None for "none" or an empty text, and a number unchanged."""
    value = none_or_value(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
    if match is None:
        raise PydanticCustomError(
            "time", "seconds are expected, a number with its unit as in 45s, 90m or 2h, or none"
        )
    return float(match[1]) * _UNITS[match[2]]


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of overrides such as `tune.logprob_trials=8`, as nested dictionaries.

    A value is read as TOML, and as plain text if it is not TOML.

    Raises:
        InputError: an override has no key or no `=`, or sets a part of a value that is not a table.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise InputError(f"--set {override!r}: expected KEY=VALUE, for example tune.logprob_trials=8.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        section = values
        *parents, name = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise InputError(f"--set {override!r}: {parent} was set to a value, so it has no {name}.")
        section[name] = value
    return values


def check_environment(keys: Iterable[str]) -> None:
    """Raise `InputError` for a variable with the prefix whose first part is not one of `keys`.

    pydantic-settings ignores such variables, so that a typo would have no effect.
    """
    keys = list(keys)
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and name.upper() not in _OTHER_VARIABLES
        and name.upper().removeprefix(PREFIX).split("__")[0].lower() not in keys
    )
    if unknown:
        raise InputError(
            f"environment: {', '.join(unknown)} set nothing in a recipe; {PREFIX}KEY or "
            f"{PREFIX}SECTION__KEY is expected, the first part one of {', '.join(keys).upper()}."
        )


def check_text(toml: str) -> None:
    """Raise `InputError` for a line that is not UTF-8.

    Python represents bytes of an argument that are not UTF-8 as halves of surrogate pairs, which no file can
    hold.
    """
    for line in toml.split("\n"):
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise InputError(
                f"recipe: {line.strip()} is not UTF-8, as recipe.toml must be. Rename the file or change "
                "the text."
            )


def explain(error: ValidationError | SettingsError, path: Path | None) -> str:
    """Return one message for all errors of a recipe that comes from the file `path`, if any."""
    recipe = f"recipe {path}" if path else "recipe"
    if isinstance(error, SettingsError):
        return f"{recipe}: {error}."
    messages = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()]
    return f"{recipe} is not valid: " + "; ".join(messages) + "."
