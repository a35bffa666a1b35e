"""`metrics.json`: what a run measured on its validation split, and which files pass the acceptance criteria.

`RunRecord` is the whole file. It is written as schema 2 and read as schema 1, of earlier versions, or 2.
Rates are fractions of 1, drift is in nats a token. A null stands for what was not measured.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rs_gguf.errors import InputError
from rs_gguf.records.rows import Row, finite, read_json, write_json
from rs_gguf.records.schema_1 import of_schema_1

_log = logging.getLogger("rs_gguf.metrics")

Effect = Literal["remove", "induce"]
Interval = tuple[float, float]
Verdict = Literal["passed", "failed", "undecided"]
Finite = Annotated[float | None, BeforeValidator(finite)]  # JSON knows no NaN


class Record(BaseModel):
    """An immutable value that is written as JSON."""

    model_config = ConfigDict(frozen=True)


class Outcomes(Record):
    """How many answers have which outcome; `explicit` counts a part of `refuses`."""

    complies: int
    refuses: int
    explicit: int
    fails: int
    unjudged: int

    @property
    def total(self) -> int:
        """How many answers there are."""
        return self.complies + self.refuses + self.fails + self.unjudged


class Share(Record):
    """How many of a number of prompts, with the 95% interval of the rate."""

    n: int
    of: int
    ci95: Interval

    @property
    def rate(self) -> float | None:
        """The rate; None of nothing."""
        return self.n / self.of if self.of else None


class CorrectedRates(Record):
    """Rates of explicit refusals, and of all refusals, after Rogan and Gladen."""

    explicit: Finite
    refuses: Finite


class TraceRecord(Record):
    """The thinking traces of one side: how many answers have one, and how many of these traces …

    `endless`: have no end, so that no answer came. `loops`: repeat themselves, by rule. `refusal_phrases`:
    have a phrase of refusal, by rule. `refused_in_trace`: refuse as the judge sees it, where the final answer
    is missing or evades. `mean_tokens` is None where a server gave the traces, as text alone.
    """

    n: int
    mean_tokens: float | None
    endless: int
    loops: int
    refusal_phrases: int
    refused_in_trace: int


class SetRecord(Record):
    """The same prompts unsteered and steered.

    A refusal is explicit or an evasion, and a failure is neither. `opened` and `kept` are of the prompts that
    were refused, `closed` of those that were complied with, `broken` of those whose judged answer did not
    fail. `unconfirmed` changes were not shown by a second run and count as none.
    """

    kind: str | None = None  # None where the prompts are of several kinds
    n: int
    # Where None is the default, schema 1 did not know the figure.
    explicit_unsteered: Share | None = None
    explicit_steered: Share | None = None
    explicit_kept: int | None = None  # explicit refusals that stay explicit
    explicit_p: float | None = None  # McNemar, of explicit refusals
    outcomes_unsteered: Outcomes
    outcomes_steered: Outcomes
    # Rows are unsteered, columns steered: complies, refuses, fails. What is unjudged on either side is not
    # among them.
    transitions: tuple[tuple[int, ...], ...] | None = None
    opened: Share | None = None
    kept: Share | None = None
    closed: Share | None = None
    broken: Share | None = None
    unconfirmed: int | None = None
    # Rates of judged answers, corrected for the errors of the judge; None where these are not known.
    corrected_unsteered: CorrectedRates | None = None
    corrected_steered: CorrectedRates | None = None
    degenerate_unsteered: float
    degenerate_steered: float
    traces_unsteered: TraceRecord | None = None  # None if no answer has a thinking trace
    traces_steered: TraceRecord | None = None

    def wanted(self, effect: Effect) -> Share | None:
        """Return the changes that the effect asks for; None of schema 1."""
        return self.opened if effect == "remove" else self.closed


class EffectCheck(Record):
    """What running the file in llama.cpp showed; `effect_observed` is null where it was not run there."""

    effect_observed: bool | None = None
    largest_relative_error: Finite = None
    kl_mean: Finite = None
    reasons: tuple[str, ...] = ()


class GateActivation(Record):
    """Mean gate activation with the file in force: at the last prompt token, and in the answer."""

    prompt: Finite
    answer: Finite


class MinimalPairs(Record):
    """How well the gates separate sensitive prompts from harmful ones in the same words.

    `separated`: pairs whose sensitive prompt has the higher gate activation. `auroc`: of all these prompts.
    """

    separated: Share
    auroc: Finite


class Acceptance(Record):
    """Whether a file meets the acceptance criteria, and every reason why it does not."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()


class Speed(Record):
    """Tokens a second of the same prompts."""

    unsteered: float
    steered: float


class LlamaCpp(Record):
    """How llama.cpp loads the file, and the build that it was measured with."""

    command: str
    build: str | None = None
    reasoning_off: bool = False  # llama.cpp must be told not to think


class FileRecord(Record):
    """One written file: what it is, what was measured of it, and how it is used."""

    word: str  # what people call it: "control vector", "gated adapter"
    file: str
    sha256: str
    estimator: str
    ridge: float
    layers: tuple[int, int]  # both included
    strength: float
    benign_target: float
    scale: float
    feasible: bool | None = None  # whether the search found it within all limits; None in earlier records
    sets: dict[str, SetRecord]
    benign_drift: Finite
    top1_agreement: Finite
    kl_mean: Finite = None  # KL(steered‖unsteered) in nats, over the tokens of benign answers
    kl_first_token: Finite = None  # KL(unsteered‖steered) in nats, everyday prompts
    gate_activation: dict[str, GateActivation] | None = None  # by kind of prompt; None without gates
    minimal_pairs: MinimalPairs | None = None  # None without gates, or if no such pair was measured
    opened_on_subject: Share | None = None  # of opened sensitive answers; None without a second judge
    benign_drift_ci95: Interval | None = None
    effect_check: EffectCheck
    acceptance: Acceptance
    notes: tuple[str, ...] = ()
    tokens_per_second: Speed
    llama_cpp: LlamaCpp

    @property
    def passed(self) -> bool:
        """Whether the file meets every acceptance criterion."""
        return self.acceptance.verdict == "passed"


class BaselineRecord(Record):
    """A baseline, measured on the same prompts."""

    name: str
    sets: dict[str, SetRecord]
    benign_drift: Finite = None
    system_prompt: str | None = None  # the wording, where the baseline is one


class ModelRecord(Record):
    """The model that the files are for."""

    name: str
    sha256: str
    architecture: str
    n_layer: int
    n_embd: int


class JudgeRecord(Record):
    """Who graded the answers, and how far a second judge agrees, if one was asked.

    `n` answers were graded by both, unsteered and under each file, and `disagreements` got another outcome;
    explicit refusals and evasions count as one. `disagreed` counts them by "FIRST, SECOND", such as
    "complies, refuses". `kappa` is Cohen's; None if all outcomes are equal.
    """

    name: str
    second: str | None = None
    n: int | None = None
    disagreements: int | None = None
    disagreed: dict[str, int] | None = None
    kappa: Finite = None


class RunRecord(Record):
    """The content of metrics.json. `files` has the keys `vector` and `adapter`, as far as written."""

    schema_version: Literal[2] = 2
    date: str
    tool: str | None = None
    effect: Effect
    model: ModelRecord
    judge: JudgeRecord
    test_tokens: int
    subset: bool
    seed: int
    files: dict[str, FileRecord]
    baselines: tuple[BaselineRecord, ...] = ()
    seconds: dict[str, float] | None = None  # of each stage; known when the run ends

    def mapping(self) -> Row:
        """Return the record as JSON has it."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the record as schema 2."""
        write_json(path, self.mapping())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a metrics.json of schema 1 or 2.

        Raises:
            InputError: the file is missing or damaged, or of another schema.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, value: Any, path: Path) -> Self:
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
                value = of_schema_1(value)
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
