"""How far a search may go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Probes and finalists of each kind of file, or seconds in place of both.

    `full`: prompts of each kind that the chosen candidate answers at full length; 0 for none.
    """

    trials: int
    finalists: int
    full: int
    seconds: float | None = None
