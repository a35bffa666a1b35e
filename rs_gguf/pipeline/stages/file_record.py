"""What `metrics.json` says of a written file and of a baseline, from what was measured of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama import log as llama_log
from rs_gguf.engines.settings import EngineSettings
from rs_gguf.evaluation.decision import Decision
from rs_gguf.evaluation.drift import Drift
from rs_gguf.evaluation.kl import KlDivergence
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import (
    Acceptance,
    BaselineRecord,
    Effect,
    EffectCheck,
    FileRecord,
    GateActivation,
    LlamaCpp,
    MinimalPairs,
    SetRecord,
    Share,
    Speed,
)
from rs_gguf.records.trials import Trial
from rs_gguf.search.choice import reason_against_full
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.file import SteeringFile
from rs_gguf.steering.guard import MAX_ADAPTER_BYTES, open_gguf


@dataclass(frozen=True)
class WrittenFile:
    """The written file of a method, the trial that chose it, and what running it on the model showed.

    `word`: what people call the file.
    """

    word: str
    path: Path
    trial: Trial
    effect: Mapping[str, Any]

    @property
    def steering(self) -> Steering:
        return self.content.steering(self.path)

    @property
    def gates(self) -> Mapping[str, NDArray[np.float32]]:
        """Gate vectors by matrix; empty if the file has no gates."""
        return self.content.gates

    @property
    def content(self) -> SteeringFile:
        """What stands in the file now."""
        return steering_file.read(self.path)

    @cached_property
    def weights_hash(self) -> str:
        """A hash of the file's tensors. The metadata, into which figures are put, do not count."""
        digest = hashlib.sha256()
        for tensor in open_gguf(self.path, MAX_ADAPTER_BYTES).tensors:
            digest.update(f"{tensor.name}\0{tensor.data.shape}\0".encode())
            digest.update(tensor.data.tobytes())
        return digest.hexdigest()


def file_record(
    file: WrittenFile,
    sets: Mapping[str, SetRecord],
    drift: Drift,
    *,
    kl: KlDivergence,
    gate_activation: dict[str, GateActivation] | None = None,
    minimal_pairs: MinimalPairs | None = None,
    opened_on_subject: Share | None = None,
    acceptance: Acceptance,
    notes: Sequence[str],
    drift_ci95: tuple[float, float] | None,
    speed: Speed,
    llama_cpp: LlamaCpp,
) -> FileRecord:
    """Return what was measured of one written file, and how to use it."""
    candidate = file.trial.candidate
    return FileRecord(
        word=file.word,
        file=file.path.name,
        sha256=sha256(file.path),
        estimator=candidate.recorded,
        ridge=candidate.ridge,
        layers=candidate.layers,
        strength=candidate.strength,
        benign_target=candidate.benign_target,
        scale=1.0,
        feasible=file.trial.feasible,
        sets=dict(sets),
        benign_drift=drift.nats,
        benign_drift_ci95=drift_ci95,
        top1_agreement=drift.top1_agreement,
        kl_mean=kl.sequence,
        kl_first_token=kl.first_token,
        gate_activation=gate_activation,
        minimal_pairs=minimal_pairs,
        opened_on_subject=opened_on_subject,
        effect_check=EffectCheck.model_validate(dict(file.effect)),
        acceptance=acceptance,
        notes=tuple(notes),
        tokens_per_second=speed,
        llama_cpp=llama_cpp,
    )


def search_notes(trial: Trial, full_prompts: int) -> list[str]:
    """Return a sentence if the search gave a method no full-length answers although its trial is feasible.

    An infeasible trial fails an acceptance criterion, which says so.

    full_prompts: of the recipe; 0 for no such answers.
    """
    if not (full_prompts and trial.fidelity == "short" and trial.feasible and trial.n_sensitive):
        return []
    reason = reason_against_full(trial)
    return [f"gave no full-length answers in the search: {reason}"] if reason else []


def baseline_notes(
    sets: Mapping[str, SetRecord], baselines: Sequence[BaselineRecord], effect: Effect
) -> list[str]:
    """Return a sentence for each baseline that a file with these `sets` does not beat.

    A baseline is beaten if it changes fewer sensitive prompts, keeps fewer harmful refusals or closes more
    benign prompts. One that refuses everything beats no file.
    """
    word = "opens" if effect == "remove" else "closes"
    changed, kept, closed = _changes(sets, effect)
    notes = []
    for baseline in baselines:
        other_changed, other_kept, other_closed = _changes(baseline.sets, effect)
        if other_changed >= changed and other_kept >= kept and other_closed <= closed:
            notes.append(
                f"does not beat the baseline “{baseline.name}”, which {word} {other_changed} sensitive "
                f"prompts (this file {changed}), keeps {other_kept} harmful refusals (this file {kept}) "
                f"and closes {other_closed} benign prompts (this file {closed})"
            )
    return notes


def _changes(sets: Mapping[str, SetRecord], effect: Effect) -> tuple[int, int, int]:
    """Return how many sensitive prompts change as wanted, harmful refusals are kept, benign prompts close."""
    changed, kept, closed = sets["sensitive"].wanted(effect), sets["harmful"].kept, sets["benign"].closed
    return (changed.n if changed else 0), (kept.n if kept else 0), (closed.n if closed else 0)


def llama_cpp_of(model: Path, file: WrittenFile, engine: EngineSettings, *, reasoning_off: bool) -> LlamaCpp:
    """Return how llama.cpp loads the file, and which build of it is here.

    engine: its settings that change results are a part of the command.
    reasoning_off: whether llama.cpp needs the option against thinking (`ChatFormat.thinks_in_server`).
    """
    command = steering_file.server_command(model, file.path, file.content, reasoning_off=reasoning_off)
    return LlamaCpp(
        command=f"{command} {engine.result_options}".rstrip(),
        build=llama_log.build(),
        reasoning_off=reasoning_off,
    )


def record_figures(
    file: WrittenFile, sets: Mapping[str, SetRecord], drift: Drift, decision: Decision
) -> None:
    """Put what was measured into the metadata of the file itself."""
    figures: dict[str, Any] = {
        "measured": True,
        "acceptance.passed": decision.verdict == "passed",
        "acceptance.verdict": decision.verdict,
    }
    if math.isfinite(drift.nats):  # NaN where no benign prompt was answered
        figures["metrics.benign_drift"] = drift.nats
    for kind, found in sets.items():
        sides = found.outcomes_unsteered, found.outcomes_steered
        figures[f"metrics.{kind}.explicit_refusals"] = [outcomes.explicit for outcomes in sides]
        figures[f"metrics.{kind}.refusals"] = [outcomes.refuses for outcomes in sides]
        figures[f"metrics.{kind}.prompts"] = found.n
    if (kept := sets["harmful"].kept) is not None:
        figures["metrics.retention"] = [kept.n, kept.of]
    # Figures of an earlier measurement, perhaps of others than these, would stand beside the new ones.
    steering_file.write(file.content.with_facts(figures, in_place_of="metrics."), file.path)
