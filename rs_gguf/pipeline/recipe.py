"""Define the recipe of a run: every choice, with its default and its accepted values.

A TOML file, environment variables and options go in; a validated `Recipe` comes out. Sources, weakest first:
the defaults here, the file, the environment (`RS_GGUF_TUNE__LOGPROB_TRIALS=8`) and options
(`--set tune.logprob_trials=8`). Unknown keys are errors, so that a typo is not ignored.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.engines.settings import EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import settings
from rs_gguf.pipeline.sections import Answers, Fit, Measure, Prompts, Tune
from rs_gguf.records.files import write_text
from rs_gguf.search.budget import Budget

if TYPE_CHECKING:
    from rs_gguf.methods.options import FitOptions

# Estimators for each effect, if the recipe names none.
_PLAIN = ("md", "wmd", "rmd", "wrmd", "wrmd-uncentred")
_ESTIMATORS = {
    "remove": (*_PLAIN, "sensitive-wrmd", "contrast-wrmd", "safe-wrmd", "residual-wrmd"),
    "induce": _PLAIN,
}


class Recipe(BaseSettings):
    """One run: a model, prompts, and what to do with them."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=settings.PREFIX, env_nested_delimiter="__"
    )

    model: str = Field(
        default=models.DEFAULT, description="catalogue name, GGUF file, Hugging Face folder or hub id"
    )
    judge: str | None = Field(
        default=None,
        description="judge of the answers, as for `rs-export judge --judge`; by default the embedded one",
    )
    judge_second: Annotated[str | None, BeforeValidator(settings.none_or_value)] = Field(
        default=None,
        description="second judge of the validation answers, a local model; by default none",
    )
    effect: Literal["remove", "induce"] = Field(
        default="remove",
        description="`remove` or `induce` refusals of sensitive prompts",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 2,  # a llama-server takes 2³² − 1 for a seed of its choice
        description="random seed for prompts, contexts, sampled tokens and the search",
    )
    prompts: Prompts = Prompts()
    answers: Answers = Answers()
    fit: Fit = Fit()
    tune: Tune = Tune()
    measure: Measure = Measure()
    engine: EngineSettings = EngineSettings()

    @field_validator("judge_second")
    @classmethod
    def _is_another_judge(cls, second: str | None, info: ValidationInfo) -> str | None:
        if second and second == (info.data.get("judge") or models.DEFAULT):
            raise ValueError(f"{second} is the first judge already; name another model")
        return second

    @property
    def estimators(self) -> Sequence[str]:
        """Return the names of the estimators to fit, which depend on the effect by default."""
        return self.fit.estimators or _ESTIMATORS[self.effect]

    @property
    def safety(self) -> SafetyRule:
        """Return the limits for every file."""
        tune = self.tune
        return SafetyRule(self.effect, tune.min_retention, tune.max_benign_drift, tune.min_top1)

    @property
    def budget(self) -> Budget:
        """Return the limits of the search."""
        tune = self.tune
        return Budget(tune.logprob_trials, tune.finalists, tune.full_prompts, tune.budget)

    @property
    def fit_options(self) -> FitOptions:
        """Return the options of the fit."""
        # Imported here: the package imports PyTorch for seconds, which reading a recipe does not need.
        from rs_gguf.methods.options import FitOptions

        fit = self.fit
        return FitOptions(self.effect, self.estimators, fit.ridges, fit.gate_ridges, fit.device)

    def asking(self, max_tokens: int) -> Asking:
        """Return how prompts are asked for answers of at most `max_tokens` tokens."""
        trace_tokens = self.answers.trace_tokens
        return Asking(self.prompts.system, max_tokens, self.sampling, trace_tokens=trace_tokens)

    @property
    def sampling(self) -> Sampling:
        """Return how answers are sampled, steered or not."""
        return Sampling(temperature=self.answers.temperature, seed=self.seed)


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then overrides such as `tune.logprob_trials=8`; return the recipe.

    The value of an override is TOML, or plain text if it is not TOML. An override of `tune.logprob_trials` or
    `tune.finalists` ends a budget of the file or the environment.

    Raises:
        InputError: the file is missing or is not TOML, keys are unknown, values are wrong (all in one
            message), or a text is not UTF-8.
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
            # Strongest first. pydantic-settings would also read a `.env` file of the working directory.
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    if path is not None and not path.is_file():
        raise InputError(f"recipe not found: {path}.")
    settings.check_environment(Recipe.model_fields)
    values = settings.nested(overrides)
    tune = values.get("tune")
    if isinstance(tune, dict) and tune.keys() & {"logprob_trials", "trials", "finalists"}:
        tune.setdefault("budget", None)  # with a budget, these overrides would have no effect
    try:
        # As a plain Recipe, so that equal recipes compare equal and no source is read again.
        recipe = Recipe.model_construct(**dict(Sourced(**values)))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}).") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValidationError, SettingsError) as error:
        raise InputError(settings.explain(error, path)) from error
    settings.check_text(_toml(recipe))
    return recipe


def dump(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as TOML, with every default that has a value.

    Raises:
        InputError: `path` is a file with comments, which this would delete.
    """
    if path.is_file() and "\n#" in f"\n{path.read_text(encoding='utf-8', errors='replace')}":
        raise InputError(
            f"{path} has comments, which the recipe that a run writes there would replace. Choose another "
            "folder (--out), or keep your file elsewhere and give it as RECIPE."
        )
    write_text(path, _toml(recipe))


def _toml(recipe: Recipe) -> str:
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
