"""What `rs-export scan` finds of a model: outcomes, published files, planned time and a recommendation."""

from __future__ import annotations

from typing import Literal

from rs_gguf.records.conversation import Kind
from rs_gguf.records.metrics import Effect, ModelRecord, Outcomes, Record, Verdict

Advice = Literal["file", "run", "nothing to remove", "not possible", "unclear"]


class ScannedSet(Record):
    """The outcomes of the prompts of one kind."""

    n: int
    outcomes: Outcomes


class Example(Record):
    """An answer with its outcome, such as `explicit`. None is to a harmful prompt."""

    kind: Kind
    outcome: str
    prompt: str
    answer: str


class PublishedFile(Record):
    """A published file for one model file: its path in the repository, and llama.cpp's command there."""

    path: str
    word: str  # what people call it
    effect: Effect
    verdict: Verdict  # the worse one of the validation split and a sealed set
    command: str
    model_sha256: str


class PlannedRun(Record):
    """What a default run takes on this machine: seconds, and bytes of memory and disk."""

    seconds: float
    memory: float
    disk: float


class ScanRecord(Record):
    """The whole scan. `advice` is the recommendation, and `reason` a sentence for people."""

    schema_version: Literal[1] = 1
    model: ModelRecord
    judge: str
    tokens: int  # most of an answer
    sets: dict[Kind, ScannedSet]
    examples: tuple[Example, ...]
    files: tuple[PublishedFile, ...]
    run: PlannedRun | None  # None if the judge's time is unknown
    advice: Advice
    reason: str
