"""The recipe: every choice of a run and every default, in one validated place.

Sources, weakest first: the defaults here, a TOML file, environment variables (`RS_GGUF_TUNE__TRIALS=8`),
options (`--set tune.trials=8`). Unknown keys are errors, so that a typo cannot be ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from rs_gguf import models
from rs_gguf.errors import InputError
from rs_gguf.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(_Section):
    """Which prompts are used. Sizes are per kind (sensitive, harmful, benign)."""

    fit: int = Field(190, ge=8, description="prompts of each kind that the direction is fitted on")
    tune: int = Field(40, ge=4, description="prompts of each kind that choose layers and strength")
    test: int = Field(40, ge=4, description="prompts of each kind that the reported figures come from")
    sensitive: list[Path] = Field([], description="your own files in place of the embedded set")
    harmful: list[Path] = Field([], description="your own files in place of the embedded set")
    benign: list[Path] = Field([], description="your own files in place of the embedded set")
    system: str | None = Field(None, description="system prompt; by default the chat template's own")


class Answers(_Section):
    """How the model's answers are generated."""

    tokens: int = Field(24, ge=8, description="tokens of an answer that fits or tunes")
    test_tokens: int = Field(64, ge=8, description="tokens of an answer in the reported figures")
    parallel: int = Field(32, ge=1, le=256, description="sequences answered at once")
    temperature: float = Field(0.0, ge=0.0, description="0 is greedy")


class Fit(_Section):
    """Which directions are fitted; the search chooses among all of them."""

    estimators: list[str] = Field(
        ["contrast", "harm-safe", "wrmd"], min_length=1, description="names in rs_gguf.estimators.ESTIMATORS"
    )
    ridges: list[float] = Field([0.3, 3.0], min_length=1, description="λ, relative to the mean variance")


class Tune(_Section):
    """The search for layers and strength, on the tune split."""

    trials: int = Field(12, ge=1, description="configurations probed by one forward pass each")
    finalists: int = Field(3, ge=1, description="configurations whose answers are generated and judged")
    min_retention: float = Field(0.95, ge=0, le=1, description="harmful refusals kept, as a share of baseline")
    max_benign_drift: float = Field(
        0.25, gt=0, description="bound on the mean |Δ log-probability| per token of benign answers, in nats"
    )


class Recipe(BaseSettings):
    """One run: a model, prompts, and what to do with them."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="RS_GGUF_", env_nested_delimiter="__"
    )

    model: str = Field(models.DEFAULT, description="catalogue name, GGUF file, Hugging Face folder or hub id")
    judge: str | None = Field(None, description="GGUF of the judge; by default the model judges itself")
    effect: Literal["remove", "induce"] = Field("remove", description="remove refusals, or induce them")
    seed: int = Field(0, ge=0, description="the one seed of every choice at random")
    prompts: Prompts = Prompts()
    answers: Answers = Answers()
    fit: Fit = Fit()
    tune: Tune = Tune()


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then `KEY=VALUE` overrides such as `tune.trials=8` (VALUE as in TOML, or plain text).

    Raises:
        InputError: file missing or not TOML, unknown key or bad value; all of them in one message.
    """

    class Sourced(Recipe):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # Options over environment over file; nothing is read from the working directory unasked.
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    if path is not None and not path.is_file():
        raise InputError(f"recipe not found: {path}.")
    try:
        return Sourced(**_nested(overrides))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML ({error}).") from error
    except (ValidationError, SettingsError) as error:
        raise InputError(_explain(error, path)) from error


def dump(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as TOML, every default spelled out."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    write_text(path, tomli_w.dumps(values))


def _nested(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override!r}: expected KEY=VALUE, for example tune.trials=8.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        section = values
        *parents, name = key.strip().split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return values


def _explain(error: ValidationError | SettingsError, path: Path | None) -> str:
    where = f"recipe {path}" if path else "recipe"
    if isinstance(error, SettingsError):
        return f"{where}: {error}."
    faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()]
    return f"{where} is not valid: " + "; ".join(faults) + "."
