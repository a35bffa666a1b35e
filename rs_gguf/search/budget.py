"""How far a search may go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Numbers of trials for each method, or seconds in their place.

    trials: candidates measured by one forward pass. finalists: candidates that give short answers. full:
    prompts of each kind that the selected candidate answers at full length; 0 for none. seconds: None for no
    limit in time.
    """

    trials: int
    finalists: int
    full: int
    seconds: float | None = None
