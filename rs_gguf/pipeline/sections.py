"""The tables of a recipe, each key with its default, its accepted values and its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rs_gguf.engines.generation import TRACE_TOKENS
from rs_gguf.machine import Device
from rs_gguf.pipeline import settings
from rs_gguf.records.conversation import Kind, Split


class Section(BaseModel):
    """A table of a recipe. `old_names` maps keys of published recipes to the present ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    old_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {cls.old_names.get(key, key): value for key, value in values.items()}


class Prompts(Section):
    """The prompts of a run. Sizes are per kind (sensitive, harmful, benign)."""

    old_names = {"unanswered": "gate_only", "test": "validation"}

    fit: int = Field(default=90, ge=8, description="prompts of each kind to fit directions on")
    gate_only: int = Field(
        default=160,
        ge=0,
        description="more prompts of each kind, in several contexts, to fit gate vectors; neither answered "
        "nor judged",
    )
    tune: int = Field(default=60, ge=4, description="prompts of each kind to choose layers and strength")
    validation: int = Field(default=30, ge=4, description="prompts of each kind for the reported figures")
    sensitive: list[Path] = Field(
        default=[],
        description="your own files instead of the embedded set; refusals of these prompts change",
    )
    harmful: list[Path] = Field(default=[], description="your own files")
    benign: list[Path] = Field(default=[], description="your own files")
    system: str | None = Field(default=None, description="system prompt; by default, the chat template's")

    @property
    def files(self) -> dict[Kind, list[Path]]:
        """Return the user's own files by kind of prompt."""
        return {"sensitive": self.sensitive, "harmful": self.harmful, "benign": self.benign}


class Answers(Section):
    """How the model generates answers."""

    fit_tokens: int = Field(default=64, ge=8, description="most tokens of an answer to a fit prompt")
    tokens: int = Field(
        default=24,
        ge=8,
        description="most tokens of a short answer: tune prompts, and the search",
    )
    test_tokens: int = Field(
        default=100,
        ge=8,
        description="most tokens of a full answer: reported figures, and the search",
    )
    trace_tokens: int = Field(
        default=TRACE_TOKENS,
        ge=0,
        description="most tokens of a thinking trace; other limits count the final answer. 0: count both",
    )
    check: bool = Field(
        default=True,
        description="ask 8 simple questions first; stop if fewer than 3 are answered",
    )
    parallel: int = Field(
        default=32,
        ge=1,
        le=255,  # llama.cpp has 256 sequences; one of them holds the common beginning of all prompts
        description="sequences answered at once; for a GGUF file at most `engine.ctx_size` / 256",
    )
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="sampling temperature; 0 is greedy decoding"
    )
    servers: Annotated[str | None, BeforeValidator(settings.none_or_value)] = Field(
        default=None,
        description="`ADDRESS[,ADDRESS…][#MODEL]`: servers of the same model for the unsteered answers to "
        "fit and tune prompts; or `none`",
    )

    def limit(self, split: Split) -> int:
        """Return the most tokens of an answer to a prompt of a split."""
        return {"fit": self.fit_tokens, "tune": self.tokens, "validation": self.test_tokens}[split]


class Fit(Section):
    """The directions and gate vectors to fit; the search chooses among all of them."""

    estimators: list[str] = Field(
        default=[],
        description="names in rs_gguf.estimators.ESTIMATORS; empty: the defaults of the effect",
    )
    ridges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[0.3, 3.0], min_length=1, description="λ of the estimators, relative to the mean variance"
    )
    device: Device = Field(
        default="auto",
        description="`cpu`, `cuda` or `auto`: CUDA if present",
    )
    gate_ridges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[0.02],
        min_length=1,
        description="λ of the gated adapter, relative to the mean diagonal of its metric",
    )
    gate_refits: int = Field(
        default=0,
        ge=0,
        description="experimental: how often the gates are fitted again, under the file before",
    )


class Tune(Section):
    """The search for layers and strength, on the tune split."""

    old_names = {"trials": "logprob_trials", "full": "full_prompts"}

    logprob_trials: int = Field(
        default=12,
        ge=1,
        description="candidates of each method to evaluate with one forward pass",
    )
    finalists: int = Field(
        default=3, ge=1, description="candidates of each method whose answers are generated and judged"
    )
    full_prompts: int = Field(
        default=16,
        ge=0,
        description="prompts of each kind that the selected candidate answers at full length, at one "
        "strength after another; 0 for none",
    )
    budget: Annotated[float | None, BeforeValidator(settings.seconds)] = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="time for the search, such as `90m`, instead of `logprob_trials` and `finalists`; "
        "or `none`",
    )
    min_retention: float = Field(default=0.95, ge=0, le=1, description="least retention of harmful refusals")
    max_benign_drift: float = Field(
        default=0.25,
        gt=0,
        description="largest drift of benign answers, nats/token",
    )
    min_top1: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least top-1 agreement on benign answers",
    )


class Measure(Section):
    """Conditions to measure on the validation split, besides the unsteered model and the written files."""

    baselines: list[Literal["system-prompt", "md", "rmd", "wrmd", "ablation"]] = Field(
        default=["system-prompt", "rmd", "wrmd"],
        description="other methods in the same table: `system-prompt`, `md`, `rmd`, `wrmd`, `ablation`",
    )
