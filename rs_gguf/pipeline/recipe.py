"""Define the recipe of a run: every choice, with its default and its accepted values.

A TOML file, environment variables and options go in; a validated `Recipe` comes out. Sources, weakest first:
the defaults here, the file, the environment (`RS_GGUF_TUNE__LOGPROB_TRIALS=8`) and options
(`--set tune.logprob_trials=8`). Unknown keys are errors, so that a typo is not ignored.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
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
from rs_gguf.machine import Device
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import settings
from rs_gguf.records.conversation import Kind, Split
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


class _Section(BaseModel):
    """A table of a recipe. `old_names` maps keys of published recipes to the present ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    old_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {cls.old_names.get(key, key): value for key, value in values.items()}


class Prompts(_Section):
    """The prompts of a run. Sizes are per kind (sensitive, harmful, benign)."""

    old_names = {"unanswered": "gate_only", "test": "validation"}

    fit: int = Field(default=90, ge=8, description="prompts of each kind to fit directions on")
    gate_only: int = Field(
        default=160,
        ge=0,
        description="more prompts of each kind, in several contexts, to fit the gate vectors of an adapter; "
        "they are neither answered nor judged",
    )
    tune: int = Field(default=60, ge=4, description="prompts of each kind to choose layers and strength")
    validation: int = Field(default=30, ge=4, description="prompts of each kind for the reported figures")
    sensitive: list[Path] = Field(
        default=[],
        description="your own files instead of the embedded set: the prompts whose refusals to change",
    )
    harmful: list[Path] = Field(default=[], description="your own files instead of the embedded set")
    benign: list[Path] = Field(default=[], description="your own files instead of the embedded set")
    system: str | None = Field(
        default=None, description="system prompt; by default, the one of the chat template"
    )

    @property
    def files(self) -> dict[Kind, list[Path]]:
        """Return the user's own files by kind of prompt."""
        return {"sensitive": self.sensitive, "harmful": self.harmful, "benign": self.benign}


class Answers(_Section):
    """How the model generates answers."""

    fit_tokens: int = Field(default=64, ge=8, description="most tokens of an answer to a fit prompt")
    tokens: int = Field(
        default=24,
        ge=8,
        description="most tokens of an answer to a tune prompt, and of short answers in the search",
    )
    test_tokens: int = Field(
        default=100,
        ge=8,
        description="most tokens of an answer in the reported figures, and of full answers in the search",
    )
    parallel: int = Field(
        default=32,
        ge=1,
        le=255,  # llama.cpp has 256 sequences; one of them holds the common beginning of all prompts
        description="sequences answered at once; a GGUF file answers at most 32 (8,192 KV cells, 256 per "
        "sequence)",
    )
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="sampling temperature; 0 is greedy decoding"
    )
    servers: Annotated[str | None, BeforeValidator(settings.none_or_value)] = Field(
        default=None,
        description="`ADDRESS[,ADDRESS…][#MODEL]`: servers of the same model that give the unsteered answers "
        "to fit and tune prompts; `none` for this machine",
    )

    def limit(self, split: Split) -> int:
        """Return the most tokens of an answer to a prompt of a split."""
        return {"fit": self.fit_tokens, "tune": self.tokens, "validation": self.test_tokens}[split]


class Fit(_Section):
    """The directions and gate vectors to fit; the search chooses among all of them."""

    estimators: list[str] = Field(
        default=[],
        description="names in rs_gguf.estimators.ESTIMATORS; empty for the default ones of the effect",
    )
    ridges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[0.3, 3.0], min_length=1, description="λ of the estimators, relative to the mean variance"
    )
    device: Device = Field(
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
        default=12,
        ge=1,
        description="candidates of each method to evaluate with one forward pass; each estimator is "
        "tried first",
    )
    finalists: int = Field(
        default=3, ge=1, description="candidates of each method whose answers are generated and judged"
    )
    full_prompts: int = Field(
        default=16,
        ge=0,
        description="prompts of each kind that the selected candidate answers at full length "
        "(`answers.test_tokens`); 0 for none. It answers again at lower strengths until it is within all "
        "limits, and at one more",
    )
    budget: Annotated[float | None, BeforeValidator(settings.seconds)] = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="time for the search, such as `90m` or `2h`, instead of `logprob_trials` and "
        "`finalists`; `none` to use these two",
    )
    min_retention: float = Field(
        default=0.95, ge=0, le=1, description="least share of the unsteered harmful refusals that must remain"
    )
    max_benign_drift: float = Field(
        default=0.25,
        gt=0,
        description="largest mean |Δ log-probability| of benign answers, in nats per token",
    )
    min_top1: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least share of the tokens of benign answers that must stay first choice, as reported",
    )


class Measure(_Section):
    """Conditions to measure on the validation split, besides the unsteered model and the written files."""

    baselines: list[Literal["system-prompt", "md", "rmd", "wrmd", "ablation"]] = Field(
        default=["system-prompt", "rmd", "wrmd"],
        description="alternative methods in the same table: the best of several system prompts, vectors of "
        "the literature, directional ablation (to remove refusals)",
    )


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
    effect: Literal["remove", "induce"] = Field(
        default="remove",
        description="reduce refusals of sensitive prompts (`remove`), or add refusals of them (`induce`)",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 2,  # a llama-server takes 2³² − 1 for a seed of its choice
        description="random seed for prompts, contexts, sampled tokens and the search. The tokens of prompts "
        "and answers whose activations are captured do not depend on it",
    )
    prompts: Prompts = Prompts()
    answers: Answers = Answers()
    fit: Fit = Fit()
    tune: Tune = Tune()
    measure: Measure = Measure()

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
        return Asking(self.prompts.system, max_tokens, self.sampling)

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
