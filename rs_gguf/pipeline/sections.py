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


class Answers(Section):
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
    trace_tokens: int = Field(
        default=TRACE_TOKENS,
        ge=0,
        description="most tokens of a thinking trace; other limits then count the final answer alone. 0 "
        "counts both together",
    )
    check: bool = Field(
        default=True,
        description="ask 8 simple questions first, and stop if the model answers fewer than 3 of them",
    )
    parallel: int = Field(
        default=32,
        ge=1,
        le=255,  # llama.cpp has 256 sequences; one of them holds the common beginning of all prompts
        description="sequences answered at once; a GGUF file answers at most 32 (`engine.ctx_size`, 256 KV "
        "cells per sequence)",
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


class Fit(Section):
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
    gate_intercept: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="experimental: share of the free intercept of the gates. Above 0 the run also makes the "
        "pair: an adapter and the control vector that holds the intercept",
    )
    gate_benign: Literal["fixed", "free"] = Field(
        default="fixed",
        description="experimental: gate activation of the mean benign prompt, at its target or free",
    )
    gate_null_space: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="experimental: share of the eigen-directions of benign and harmful prompts that a gate "
        "may use, lowest energy first, such as 0.5; 0 for constraints on means instead",
    )
    gate_harm_topics: int = Field(
        default=0,
        ge=0,
        description="experimental: constrain the mean of each harmful topic with at least this many prompts; "
        "0 for one mean",
    )
    gate_refits: int = Field(
        default=0,
        ge=0,
        description="experimental: how often the gates are fitted again, on inputs and answers under a file "
        "of the fit before",
    )


class Tune(Section):
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


class Measure(Section):
    """Conditions to measure on the validation split, besides the unsteered model and the written files."""

    baselines: list[Literal["system-prompt", "md", "rmd", "wrmd", "ablation"]] = Field(
        default=["system-prompt", "rmd", "wrmd"],
        description="alternative methods in the same table: the best of several system prompts, vectors of "
        "the literature, directional ablation (to remove refusals)",
    )
