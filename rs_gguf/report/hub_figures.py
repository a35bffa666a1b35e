"""Choose the figures that the hub shows beside a card (its `model-index`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rs_gguf.report.recommendation import ReportedFile


@dataclass(frozen=True)
class HubFigure:
    """One measured rate, as a fraction of 1. `type`: its name for programs."""

    dataset: str
    type: str
    name: str
    value: float


def hub_figures(files: Sequence[ReportedFile]) -> Iterator[HubFigure]:
    """Yield explicit refusals of each set, unsteered and with each file, and the retention with each."""
    for number, file in enumerate(files):
        for name, one in file.sets.items():
            dataset, word = f"rs-gguf, validation split, {name} prompts", f"with the {file.word}"
            if one.n:
                before, after = (
                    round(side.explicit / one.n, 4) for side in (one.outcomes_unsteered, one.outcomes_steered)
                )
                if number == 0:  # all files were measured on the same prompts
                    yield HubFigure(
                        dataset, "explicit_refusals_unsteered", "explicit refusals, unsteered", before
                    )
                yield HubFigure(dataset, "explicit_refusals_steered", f"explicit refusals, {word}", after)
            if one.kind == "harmful" and one.kept and one.kept.rate is not None:
                yield HubFigure(
                    dataset, "retention", f"retention of refusals, {word}", round(one.kept.rate, 4)
                )
