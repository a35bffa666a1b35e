"""`metrics.json`: what a run measured on its test split, and which of its files pass the safety rule.

`RunRecord` is the whole file. It is written as schema 2 and read as schema 1, of earlier versions, or 2.
Rates are fractions of 1, drift is in nats a token. A null stands for what was not measured.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rs_gguf.errors import InputError
from rs_gguf.records.rows import Row, finite, read_json, write_json
from rs_gguf.records.trials import GATED_ADAPTER

_log = logging.getLogger("rs_gguf.metrics")

Interval = tuple[float, float]
Finite = Annotated[float | None, BeforeValidator(finite)]  # JSON knows no NaN


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Outcomes(_Record):
    """How many answers have which outcome; `explicit` counts a part of `refuses`."""

    complies: int
    refuses: int
    explicit: int
    fails: int
    unjudged: int


class Share(_Record):
    """A number of prompts, with the interval of its rate."""

    n: int
    ci95: Interval


class SetRecord(_Record):
    """The same prompts unsteered and steered. Counts and rates are of those that are judged on both sides.

    A refusal is a confidence above 0, so failures are among them; `categories_…` tell them apart.
    `unjudged` counts prompts that are unjudged on either side, `degenerate_…` are shares of all prompts.
    """

    kind: str | None = None  # None where the prompts are of several kinds
    n: int
    # Outcomes and transitions (unsteered × steered) are not measured yet.
    outcomes_unsteered: Outcomes | None = None
    outcomes_steered: Outcomes | None = None
    transitions: tuple[tuple[int, ...], ...] | None = None
    opened: Share | None = None
    kept: Share | None = None
    closed: Share | None = None
    broken: Share | None = None
    unjudged: int
    unjudged_unsteered: int | None = None  # the first runs did not tell the sides apart
    unjudged_steered: int | None = None
    refusal_unsteered: float
    refusal_steered: float
    ci95_unsteered: Interval
    ci95_steered: Interval
    refused_unsteered: int
    refused_steered: int
    refused_both: int
    mcnemar_p: float
    categories_unsteered: dict[str, int] | None = None  # nor did they tell categories
    categories_steered: dict[str, int] | None = None
    degenerate_unsteered: float
    degenerate_steered: float

    def figures(self) -> Row:
        """Return the figures as `rs-export eval` writes them."""
        return self.model_dump(mode="json", exclude_none=True)


class EffectCheck(_Record):
    """What running the file in llama.cpp showed; `effect_observed` is null where it was not run there."""

    effect_observed: bool | None = None
    largest_relative_error: Finite = None
    kl_mean: Finite = None
    reasons: tuple[str, ...] = ()


class Acceptance(_Record):
    """Whether a file passes the safety rule on the test split, and every reason why not."""

    verdict: Literal["passed", "failed", "undecided"]
    reasons: tuple[str, ...] = ()


class Speed(_Record):
    """Tokens a second of the same prompts."""

    unsteered: float
    steered: float


class LlamaCpp(_Record):
    """How llama.cpp loads the file, and the build that it was measured with."""

    command: str
    build: str | None = None
    reasoning_off: bool = False  # llama.cpp must be told not to think


class FileRecord(_Record):
    """One written file: what it is, what was measured of it, and how it is used."""

    file: str
    sha256: str
    estimator: str
    ridge: float
    layers: tuple[int, int]  # both included
    strength: float
    benign_target: float
    scale: float
    sets: dict[str, SetRecord]
    benign_drift: Finite
    top1_agreement: Finite
    kl_mean: Finite = None  # on benign answers: not measured yet
    harmful_refusal_ratio: float | None  # refusals steered / unsteered, not of the same prompts
    bootstrap_ci95: dict[str, Interval | None] = {}
    effect_check: EffectCheck
    acceptance: Acceptance
    notes: tuple[str, ...] = ()
    tokens_per_second: Speed
    llama_cpp: LlamaCpp

    @property
    def passed(self) -> bool:
        """Whether the file passes the safety rule."""
        return self.acceptance.verdict == "passed"


class BaselineSet(_Record):
    """The same prompts under another means."""

    kind: str | None = None
    n: int
    refusal: float
    ci95: Interval
    degenerate: float


class BaselineRecord(_Record):
    """Another means to the same end."""

    name: str
    sets: dict[str, BaselineSet]
    benign_drift: Finite = None


class ModelRecord(_Record):
    """The model that the files are for."""

    name: str
    sha256: str
    architecture: str
    n_layer: int
    n_embd: int


class JudgeRecord(_Record):
    """Who graded the answers; `second` is a judge that is asked besides, which no run does yet."""

    name: str
    second: str | None = None


class Correlation(_Record):
    """Rank correlation of probes and answers over `n` candidates."""

    n: int
    sensitive: float | None
    harmful: float | None


class RunRecord(_Record):
    """The content of metrics.json. `files` has the keys `vector`, `adapter` and `pair`, as far as written."""

    schema_version: Literal[2] = 2
    date: str
    tool: str | None = None
    effect: Literal["remove", "induce"]
    model: ModelRecord
    judge: JudgeRecord
    test_tokens: int
    subset: bool
    seed: int
    files: dict[str, FileRecord]
    baselines: tuple[BaselineRecord, ...] = ()
    rank_correlation: dict[str, Correlation] | None = None
    seconds: dict[str, float] | None = None  # of each stage; known when the run ends

    def mapping(self) -> Row:
        """Return the record as JSON has it."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the record as schema 2."""
        write_json(path, self.mapping())

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a metrics.json of schema 1 or 2.

        Raises:
            InputError: the file is missing or damaged, or of another schema.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, value: Any, path: Path) -> RunRecord:
        """Return the record from the JSON value of the metrics.json at `path`; see `read`."""
        version = value.get("schema_version", 1) if isinstance(value, dict) else None
        if version not in (1, 2):
            raise InputError(
                f"{path} has schema_version {version}; this version of rs-gguf reads 1 and 2. Update "
                "rs-gguf, or run again with --fresh."
            )
        try:
            if version == 1:
                _notice(path)
                value = _of_schema_1(value)
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not as schema {version} has it ({reason}). Run again with --fresh.")


@functools.cache
def _notice(path: Path) -> None:
    """Tell once of each file."""
    _log.warning("%s has schema 1 of an earlier version; what that did not measure is left empty.", path)


_FIGURES_1 = (
    "sets", "benign_drift", "top1_agreement_benign", "retention_harmful", "spread95", "gate", "notes",
    "proof", "tokens_per_second", "llama_cpp",
)  # fmt: skip
_RENAMED_1 = {
    "top1_agreement_benign": "top1_agreement",
    "retention_harmful": "harmful_refusal_ratio",
    "spread95": "bootstrap_ci95",
    "proof": "effect_check",
    "margin": "benign_target",
}


def _of_schema_1(value: Mapping[str, Any]) -> Row:
    """Return schema 2 of schema 1, which had the figures of the control vector at its top."""
    vector = {**value["vector"], **{name: value[name] for name in _FIGURES_1 if name in value}}
    files = {"vector": vector} | ({"adapter": value["adapter"]} if "adapter" in value else {})
    return {
        **{name: found for name, found in value.items() if name in RunRecord.model_fields},
        "schema_version": 2,
        "judge": {"name": value["judge"]},
        "files": {name: _file_of_schema_1(file) for name, file in files.items()},
    }


def _file_of_schema_1(file: Mapping[str, Any]) -> Row:
    gate, speed, spread = file["gate"], file["tokens_per_second"], file.get("spread95", {})
    return {
        **{_RENAMED_1.get(name, name): found for name, found in file.items()},
        "sets": {
            name: {key.replace("_baseline", "_unsteered"): figure for key, figure in figures.items()}
            for name, figures in file["sets"].items()
        },
        "estimator": GATED_ADAPTER if file["estimator"] == "gate" else file["estimator"],
        "bootstrap_ci95": {_RENAMED_1.get(name, name): interval for name, interval in spread.items()},
        "acceptance": {"verdict": "passed" if gate["passed"] else "failed", "reasons": gate["reasons"]},
        "tokens_per_second": {"unsteered": speed["baseline"], "steered": speed["steered"]},
    }
