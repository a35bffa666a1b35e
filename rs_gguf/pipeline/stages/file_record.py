"""What `metrics.json` says of a written file and of a baseline, from what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama import log as llama_log
from rs_gguf.evaluation.paired import (
    Drift,
    PairedEvaluation,
)
from rs_gguf.evaluation.safety import Effect
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import (
    Acceptance,
    BaselineRecord,
    BaselineSet,
    EffectCheck,
    FileRecord,
    LlamaCpp,
    SetRecord,
    Speed,
)
from rs_gguf.records.trials import Trial
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.file import SteeringFile


@dataclass(frozen=True)
class WrittenFile:
    """The written files of a method, the trial that chose them, and what running them on the model showed."""

    paths: Sequence[Path]
    trial: Trial
    effect: Mapping[str, Any]

    @property
    def steering(self) -> Steering:
        return reduce(Steering.with_added, [found.steering(path) for path, found in self.files.items()])

    @property
    def files(self) -> dict[Path, SteeringFile]:
        """What stands in the files now."""
        return {path: steering_file.read(path) for path in self.paths}


def file_record(
    file: WrittenFile,
    sets: Mapping[str, SetRecord],
    drift: Drift,
    *,
    reasons: Sequence[str],
    notes: Sequence[str],
    bootstrap: Mapping[str, tuple[float, float] | None],
    speed: Speed,
    llama_cpp: LlamaCpp,
) -> FileRecord:
    """Return what was measured of one written file, and how to use it.

    reasons: why it fails the safety rule, empty where it passes.
    """
    candidate, harmful = file.trial.candidate, sets["harmful"]
    before, after = harmful.refused_unsteered, harmful.refused_steered
    return FileRecord(
        file=file.paths[0].name,
        sha256=sha256(file.paths[0]),
        estimator=candidate.recorded,
        ridge=candidate.ridge,
        layers=(candidate.first, candidate.last),
        strength=candidate.strength,
        benign_target=candidate.benign_target,
        scale=1.0,
        sets=dict(sets),
        benign_drift=drift.nats,
        top1_agreement=drift.top1_agreement,
        harmful_refusal_ratio=after / before if before else None,
        bootstrap_ci95=dict(bootstrap),
        effect_check=EffectCheck.model_validate(dict(file.effect)),
        acceptance=Acceptance(verdict="failed" if reasons else "passed", reasons=tuple(reasons)),
        notes=tuple(notes),
        tokens_per_second=speed,
        llama_cpp=llama_cpp,
    )


def baseline_notes(
    sets: Mapping[str, SetRecord], baselines: Sequence[BaselineRecord], effect: Effect
) -> list[str]:
    """Return a sentence for each baseline that a file with these `sets` does not beat.

    To beat it is to change refusals of sensitive prompts, and more of them, while no fewer harmful ones stay
    refused; above the unsteered share of these nothing is gained.
    """
    notes = []
    sensitive, harmful = sets["sensitive"], sets["harmful"]
    sign = 1 if effect == "remove" else -1
    for baseline in baselines:
        other = baseline.sets
        least = (sign * other["sensitive"].refusal, sign * sensitive.refusal_unsteered)
        changes_more = sign * sensitive.refusal_steered < min(least)
        needed = min(other["harmful"].refusal, harmful.refusal_unsteered)
        if not changes_more or harmful.refusal_steered < needed:
            notes.append(
                f"does not beat the baseline “{baseline.name}”: sensitive prompts refused "
                f"{sensitive.refusal_steered:.0%} against {other['sensitive'].refusal:.0%}, harmful "
                f"ones {harmful.refusal_steered:.0%} against {other['harmful'].refusal:.0%} "
                f"(unsteered {sensitive.refusal_unsteered:.0%} and {harmful.refusal_unsteered:.0%})"
            )
    return notes


def baseline_record(name: str, evaluation: PairedEvaluation, drift: Drift) -> BaselineRecord:
    sets = {
        kind: BaselineSet(
            kind=kind,
            n=found.n,
            refusal=found.refusal_steered,
            ci95=found.ci95_steered,
            degenerate=found.degenerate_steered,
        )
        for kind, found in evaluation.by_kind().items()
    }
    return BaselineRecord(name=name, sets=sets, benign_drift=drift.nats)


def llama_cpp_of(model: Path, file: WrittenFile, *, reasoning_off: bool) -> LlamaCpp:
    """Return how llama.cpp loads the file, and which build of it is here.

    reasoning_off: whether llama.cpp needs the option against thinking (`ChatFormat.thinks_in_server`).
    """
    return LlamaCpp(
        command=steering_file.server_command(model, file.files, reasoning_off=reasoning_off),
        build=llama_log.build(),
        reasoning_off=reasoning_off,
    )
