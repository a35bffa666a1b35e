"""Which file to use, and why: the same words in the page, the card and the terminal.

A `RunRecord` goes in. Its files, a headline and sentences come out. Only a file that passed is recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import Effect, FileRecord, RunRecord, SetRecord, Verdict
from rs_gguf.records.sealed import SealedRecord

_IS: dict[Verdict, str] = {"passed": "passed", "failed": "failed", "undecided": "is undecided"}
_WORST_FIRST: tuple[Verdict, ...] = ("failed", "undecided", "passed")


@dataclass(frozen=True)
class ReportedFile:
    """A measured file and its method, `key`; `sealed` is what a sealed set showed of it."""

    key: str
    record: FileRecord
    sealed: FileRecord | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict of the validation split or of the sealed set, whichever is worse."""
        found = {one.acceptance.verdict for one in (self.record, self.sealed) if one}
        return next(verdict for verdict in _WORST_FIRST if verdict in found)

    @property
    def passed(self) -> bool:
        """Whether the file meets every acceptance criterion, on the sealed set too if one was opened."""
        return self.verdict == "passed"

    @property
    def word(self) -> str:
        """What people call the file."""
        return self.record.word

    @property
    def reasons(self) -> list[str]:
        """Why the file does not meet the acceptance criteria; empty if it does."""
        on_sealed = self.sealed.acceptance.reasons if self.sealed else ()
        return [*self.record.acceptance.reasons, *(f"on the sealed set: {reason}" for reason in on_sealed)]

    @cached_property
    def sets(self) -> dict[str, SetRecord]:
        """The sets by name, in the order of `KINDS`; sets of no kind last."""
        return dict(sorted(self.record.sets.items(), key=lambda one: kind_order(one[1].kind or one[0])))

    def of(self, kind: str) -> SetRecord | None:
        """Return the set of a kind of prompt; None where there is none."""
        return next((one for one in self.sets.values() if one.kind == kind), None)

    @property
    def is_vector(self) -> bool:
        """Whether llama.cpp loads it as a control vector, and not as a LoRA."""
        return "--control-vector " in self.record.llama_cpp.command

    @property
    def is_paired(self) -> bool:
        """Whether transitions were measured; schema 1 knew none, and had other acceptance criteria."""
        return any(one.kept for one in self.sets.values())

    @property
    def acts(self) -> str:
        """What the file does to the model, as a verb phrase."""
        first, last = self.record.layers
        if self.key == "adapter":
            target = self.record.benign_target
            back = " in the opposite direction" if target < 0 else ""
            return (
                "acts mainly on prompts that resemble the sensitive ones. On the fit prompts it shifts the "
                f"mean benign one {abs(target):.2g} times as far{back}, and harmful ones slightly towards "
                "refusal"
            )
        if self.is_vector:
            return f"shifts every prompt equally, harmful ones too, in layers {first} to {last}"
        return f"changes layers {first} to {last}"


def kind_order(kind: str) -> tuple[int, str]:
    """Return a key that sorts kinds as `KINDS` does, unknown ones behind."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def reported_files(record: RunRecord, sealed: SealedRecord | None = None) -> list[ReportedFile]:
    """Return the measured files in the order of metrics.json."""
    of = sealed.files if sealed else {}
    return [ReportedFile(key, file, of.get(key)) for key, file in record.files.items()]


def files_in(folder: Path, record: RunRecord) -> list[ReportedFile]:
    """Return the files of `record`, the metrics.json of a folder, with what a sealed set showed of them."""
    return reported_files(record, SealedRecord.in_folder(folder, record))


def by_merit(files: Sequence[ReportedFile], effect: Effect) -> list[ReportedFile]:
    """Return the files in the order in which people should read of them: first those that passed.

    Then the one that opens more sensitive prompts (induce: closes more), that keeps more harmful refusals,
    that drifts less.
    """
    return sorted(files, key=lambda file: (file.passed, _merits(file, effect)), reverse=True)


def recommended_file(files: Sequence[ReportedFile], effect: Effect) -> ReportedFile | None:
    """Return the file to use, the first by merit, or None if none passed."""
    return next((file for file in by_merit(files, effect) if file.passed), None)


def overall_verdict(files: Sequence[ReportedFile]) -> Verdict:
    """Return `passed` if any file passed, else `undecided` if any is, else `failed`."""
    verdicts = {file.verdict for file in files}
    return "passed" if "passed" in verdicts else "undecided" if "undecided" in verdicts else "failed"


def headline(files: Sequence[ReportedFile], effect: Effect) -> str:
    """Return the recommendation in one line."""
    best = recommended_file(files, effect)
    if best is not None:
        return f"Use the {best.word}"
    if overall_verdict(files) == "undecided":
        return "Undecided: more prompts are needed"
    if len(files) == 1:
        return f"Do not use the {files[0].word} as it is"
    return f"Do not use {'either' if len(files) == 2 else 'any'} file as it is"


def sentences(files: Sequence[ReportedFile], effect: Effect) -> list[str]:
    """Return why, a string for each file: what the recommended one changes, then how the others stand."""
    best = recommended_file(files, effect)
    if best is None:
        return [" ".join((_verdict(file), *_figures(file, effect))) for file in by_merit(files, effect)]
    return [
        " ".join((_verdict(best), *_figures(best, effect))),
        *(_beside(best, other, effect) for other in files if other is not best),
    ]


def _verdict(file: ReportedFile) -> str:
    verdict = file.record.acceptance.verdict
    if file.sealed and (on_sealed := file.sealed.acceptance.verdict) != verdict:
        return (
            f"The {file.word} {_IS[verdict]} on the validation split, but {_IS[on_sealed]} on a sealed set."
        )
    if verdict == "undecided":
        return f"The {file.word} is undecided: too few prompts."
    earlier = "" if file.is_paired else " of an earlier version"
    also = ", on a sealed set too" if file.sealed else ""
    return f"The {file.word} {verdict} the acceptance criteria{earlier}{also}."


def _figures(file: ReportedFile, effect: Effect) -> list[str]:
    """Return one sentence for each figure that decides; explicit refusals first."""
    lines = []
    target = "target" if effect == "induce" else "sensitive"
    sensitive, harmful, benign = map(file.of, KINDS)
    if sensitive:
        before, after = sensitive.outcomes_unsteered.explicit, sensitive.outcomes_steered.explicit
        prompts = f"{before} {target} prompts"
        lines.append(f"The model refuses {prompts} explicitly without the file, {after} with it.")
        if effect == "remove" and (share := sensitive.opened):
            lines.append(f"Of {share.of} refused {target} prompts, {_are(share.n)} answered now.")
        if effect == "induce" and (share := sensitive.closed):
            lines.append(f"Of {share.of} answered {target} prompts, {_are(share.n)} refused now.")
    if harmful and (share := harmful.kept):
        lines.append(
            f"Of {share.of} refused harmful prompts, {share.n} {'stays' if share.n == 1 else 'stay'} refused."
        )
    if benign and (share := benign.closed):
        lines.append(f"Of {share.of} answered benign prompts, {_are(share.n)} refused now.")
    return lines


def _are(n: int) -> str:
    return f"{n or 'none'} {'is' if n < 2 else 'are'}"


def _beside(best: ReportedFile, other: ReportedFile, effect: Effect) -> str:
    if not other.passed:
        return _verdict(other)
    verb = "closes" if effect == "induce" else "opens"
    (change, kept, _), (most, most_kept, _) = _merits(other, effect), _merits(best, effect)
    if change < most:
        return f"The {other.word} passed too, but {verb} fewer: {change} against {most}."
    if kept < most_kept:
        return f"The {other.word} passed too, but keeps fewer harmful refusals: {kept} against {most_kept}."
    return f"The {other.word} passed too, but changes benign answers at least as much."


def _merits(file: ReportedFile, effect: Effect) -> tuple[int, int, float]:
    """Return what decides between files.

    Schema 1 knew no transitions. There the change of the explicit refusals stands in for them.
    """
    sensitive, harmful, drift = file.of("sensitive"), file.of("harmful"), file.record.benign_drift
    change = 0
    if sensitive:
        share = sensitive.wanted(effect)
        fall = sensitive.outcomes_unsteered.explicit - sensitive.outcomes_steered.explicit
        change = share.n if share else -fall if effect == "induce" else fall
    kept = harmful.kept.n if harmful and harmful.kept else 0
    return change, kept, float("-inf") if drift is None else -drift
