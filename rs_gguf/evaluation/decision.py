"""What the acceptance criteria decide: each criterion with its reason, and the verdict of all."""

from __future__ import annotations

from dataclasses import dataclass

from rs_gguf.records.metrics import Acceptance, Verdict


@dataclass(frozen=True)
class Criterion:
    """One criterion and how it ended. `reason` is a sentence, empty where it passed."""

    name: str
    verdict: Verdict = "passed"
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """All criteria. One that fails decides; else one that is undecided."""

    criteria: tuple[Criterion, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the file passes."""
        verdicts = {criterion.verdict for criterion in self.criteria}
        return "failed" if "failed" in verdicts else "undecided" if "undecided" in verdicts else "passed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not pass; failures first."""
        order = sorted(self.criteria, key=lambda criterion: criterion.verdict != "failed")
        return tuple(criterion.reason for criterion in order if criterion.reason)

    @property
    def acceptance(self) -> Acceptance:
        """The decision as metrics.json holds it."""
        return Acceptance(verdict=self.verdict, reasons=self.reasons)
