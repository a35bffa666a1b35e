"""The recipe: every choice of a run and every default, in one validated place.

Sources, weakest first: the defaults here, a TOML file, environment variables (`RS_GGUF_TUNE__LOGPROB_TRIALS=8`),
options (`--set tune.logprob_trials=8`). Unknown keys are errors, so that a typo cannot be ignored.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.errors import InputError
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.models import resolve as models
from rs_gguf.records.conversation import Kind
from rs_gguf.records.files import write_text
from rs_gguf.search.budget import Budget

if TYPE_CHECKING:
    from rs_gguf.methods.options import FitOptions

# Estimators that suit an effect.
_SUITED = {"remove": ("contrast-wrmd", "safe-wrmd", "wrmd"), "induce": ("wrmd", "rmd")}

_PREFIX = "RS_GGUF_"
# Read by the projection kernel, and by judges and models behind an address.
_OTHER_VARIABLES = {"RS_GGUF_KERNEL", "RS_GGUF_API_KEY", "RS_GGUF_SERVER_KEY"}


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def _none(given: Any) -> Any:
    """None for "none" or nothing, so that `--set` can take a value back."""
    return None if isinstance(given, str) and given.strip() in ("", "none") else given


def _seconds(given: Any) -> Any:
    """A time such as "2h" in seconds; a number as it is; None for "none" or nothing."""
    given = _none(given)
    if not isinstance(given, str):
        return given
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", given.strip())
    if found is None:
        raise PydanticCustomError(
            "time", "seconds are expected, a number with its unit as in 45s, 90m or 2h, or none"
        )
    return float(found[1]) * _UNITS[found[2]]


class _Section(BaseModel):
    """A table of a recipe. `old_names`: keys of published recipes, and what they are called now."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    old_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {cls.old_names.get(key, key): value for key, value in given.items()}


class Prompts(_Section):
    """Which prompts are used. Sizes are per kind (sensitive, harmful, benign)."""

    fit: int = Field(default=90, ge=8, description="prompts of each kind that the direction is fitted on")
    old_names = {"unanswered": "gate_only"}

    gate_only: int = Field(
        default=160,
        ge=0,
        description="more prompts of each kind, from which an adapter's gate vectors learn to tell the kinds "
        "apart, in several contexts; they are neither answered nor judged",
    )
    tune: int = Field(default=60, ge=4, description="prompts of each kind that choose layers and strength")
    test: int = Field(
        default=30, ge=4, description="prompts of each kind that the reported figures come from"
    )
    sensitive: list[Path] = Field(
        default=[],
        description="your own files in place of the embedded set: what the effect is wanted on",
    )
    harmful: list[Path] = Field(default=[], description="your own files in place of the embedded set")
    benign: list[Path] = Field(default=[], description="your own files in place of the embedded set")
    system: str | None = Field(default=None, description="system prompt; by default the chat template's own")

    @property
    def files(self) -> dict[Kind, list[Path]]:
        """Your own files by kind of prompt."""
        return {"sensitive": self.sensitive, "harmful": self.harmful, "benign": self.benign}


class Answers(_Section):
    """How the model's answers are generated."""

    tokens: int = Field(default=24, ge=8, description="tokens of an answer that fits or tunes")
    test_tokens: int = Field(default=64, ge=8, description="tokens of an answer in the reported figures")
    parallel: int = Field(
        default=32,
        ge=1,
        le=255,  # llama.cpp has 256 sequences, and one holds what all prompts begin with
        description="sequences answered at once; of a GGUF file at most 32 are (8,192 cells of context, "
        "256 a sequence)",
    )
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="0 is greedy")
    servers: Annotated[str | None, BeforeValidator(_none)] = Field(
        default=None,
        description="`ADDRESS[,ADDRESS…][#MODEL]`: servers of the same model that give the unsteered answers "
        "to fit and tune by, in place of this machine; `none` for this machine",
    )


class Fit(_Section):
    """Which directions are fitted; the search chooses among all of them."""

    estimators: list[str] = Field(
        default=[], description="names in rs_gguf.estimators.ESTIMATORS; empty: those that suit the effect"
    )
    ridges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[0.3, 3.0], min_length=1, description="λ, relative to the mean variance"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="where the fit computes: CUDA if present, else the CPU (`auto`), `cpu` or `cuda`",
    )
    gate_ridges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[0.2],
        min_length=1,
        description="λ of the gated adapter, relative to the mean diagonal of its metric",
    )


class Tune(_Section):
    """The search for layers and strength, on the tune split."""

    old_names = {"trials": "logprob_trials", "full": "full_prompts"}

    logprob_trials: int = Field(
        default=6, ge=1, description="candidates of each method that are measured by one forward pass"
    )
    finalists: int = Field(
        default=3, ge=1, description="candidates of each kind of file whose answers are generated and judged"
    )
    full_prompts: int = Field(
        default=16,
        ge=0,
        description="prompts of each kind answered at full length (`answers.test_tokens`) by the chosen "
        "candidate, then at lower strengths until all limits hold, and at one more; 0: none",
    )
    budget: Annotated[float | None, BeforeValidator(_seconds)] = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="time for the search, such as `90m` or `2h`, in place of `logprob_trials` and `finalists`; "
        "`none` to go by these",
    )
    min_retention: float = Field(
        default=0.95, ge=0, le=1, description="harmful refusals kept, as a share of baseline"
    )
    max_benign_drift: float = Field(
        default=0.25,
        gt=0,
        description="bound on the mean |Δ log-probability| per token of benign answers, in nats",
    )


class Measure(_Section):
    """What the test split is answered with, besides the model as it is and the written files."""

    baselines: list[Literal["system-prompt", "md", "rmd", "wrmd", "ablation"]] = Field(
        default=["system-prompt"],
        description="alternatives in the same table: a system prompt that asks for the effect, vectors "
        "as the literature makes them, directional ablation (to remove refusals)",
    )


class Recipe(BaseSettings):
    """One run: a model, prompts, and what to do with them."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=_PREFIX, env_nested_delimiter="__"
    )

    model: str = Field(
        default=models.DEFAULT, description="catalogue name, GGUF file, Hugging Face folder or hub id"
    )
    judge: str | None = Field(
        default=None,
        description="who grades answers, as `rs-export judge --judge` names it; else the embedded judge",
    )
    effect: Literal["remove", "induce"] = Field(
        default="remove",
        description="take refusals of the sensitive prompts away, or make the model refuse them",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 2,  # the next one is any number to a llama-server
        description="the one seed of all that is drawn: prompts, contexts, sampled tokens, the search. Which "
        "tokens of prompts and answers are read is always the same",
    )
    prompts: Prompts = Prompts()
    answers: Answers = Answers()
    fit: Fit = Fit()
    tune: Tune = Tune()
    measure: Measure = Measure()

    @property
    def estimators(self) -> Sequence[str]:
        """Names of the estimators that are fitted: the recipe's, or those that suit its effect."""
        return self.fit.estimators or _SUITED[self.effect]

    @property
    def safety(self) -> SafetyRule:
        """What every file must keep."""
        return SafetyRule(self.effect, self.tune.min_retention, self.tune.max_benign_drift)

    @property
    def budget(self) -> Budget:
        """How far the search may go."""
        tune = self.tune
        return Budget(tune.logprob_trials, tune.finalists, tune.full_prompts, tune.budget)

    @property
    def fit_options(self) -> FitOptions:
        """What is fitted, and where."""
        from rs_gguf.methods.options import FitOptions  # and with it PyTorch, without which a recipe is read

        fit = self.fit
        return FitOptions(self.effect, self.estimators, fit.ridges, fit.gate_ridges, fit.device)

    def asking(self, max_tokens: int) -> Asking:
        """How prompts are asked, for answers of at most so many tokens."""
        return Asking(self.prompts.system, max_tokens, self.sampling)

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn, of whichever side."""
        return Sampling(temperature=self.answers.temperature, seed=self.seed)


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then overrides such as `tune.logprob_trials=8`, the value as in TOML or plain text.

    An override of `tune.logprob_trials` or `tune.finalists` ends a budget of the file or the environment.

    Raises:
        InputError: file missing or not TOML, unknown key or bad value; all of them in one message. A text
            that is no UTF-8.
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
    _check_environment()
    given = _nested(overrides)
    tune = given.get("tune")
    if isinstance(tune, dict) and tune.keys() & {"logprob_trials", "trials", "finalists"}:
        tune.setdefault("budget", None)  # beside which they would count for nothing
    try:
        # As a plain Recipe, so that equal recipes are equal and no source is read again.
        recipe = Recipe.model_construct(**dict(Sourced(**given)))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}).") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValidationError, SettingsError) as error:
        raise InputError(_explain(error, path)) from error
    _check_text(_toml(recipe))
    return recipe


def dump(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as TOML, every default that has a value spelled out.

    Raises:
        InputError: a file with comments, which are somebody's own, is there already.
    """
    if path.is_file() and "\n#" in f"\n{path.read_text(encoding='utf-8', errors='replace')}":
        raise InputError(
            f"{path} has comments. A run writes its recipe there, complete and without any: choose another "
            "folder (--out), or keep yours elsewhere and give it as RECIPE."
        )
    write_text(path, _toml(recipe))


def _toml(recipe: Recipe) -> str:
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _check_text(toml: str) -> None:
    # Python keeps bytes of an argument that are no UTF-8 as halves of surrogate pairs, which no file takes.
    for line in toml.split("\n"):
        if any("\ud800" <= c <= "\udfff" for c in line):
            raise InputError(
                f"recipe: {line.strip()} is not UTF-8, as recipe.toml must be. Rename the file or change "
                "the text."
            )


def _check_environment() -> None:
    # pydantic-settings passes over variables of the prefix that name no field.
    keys = Recipe.model_fields
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(_PREFIX)
        and name.upper() not in _OTHER_VARIABLES
        and name.upper().removeprefix(_PREFIX).split("__")[0].lower() not in keys
    )
    if unknown:
        raise InputError(
            f"environment: {', '.join(unknown)} set nothing in a recipe; {_PREFIX}KEY or "
            f"{_PREFIX}SECTION__KEY is expected, the first part one of {', '.join(keys).upper()}."
        )


def _nested(overrides: Sequence[str]) -> dict[str, Any]:
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


def _explain(error: ValidationError | SettingsError, path: Path | None) -> str:
    where = f"recipe {path}" if path else "recipe"
    if isinstance(error, SettingsError):
        return f"{where}: {error}."
    faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()]
    return f"{where} is not valid: " + "; ".join(faults) + "."
