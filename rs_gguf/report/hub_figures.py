"""Choose the figures that the hub shows beside a card (its `model-index`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rs_gguf.records.metrics import Outcomes, SetRecord, Share
from rs_gguf.report.recommendation import ReportedFile


@dataclass(frozen=True)
class HubFigure:
    """One measured rate, as a fraction of 1. `type`: its name for programs."""

    dataset: str
    type: str
    name: str
    value: float


def hub_figures(files: Sequence[ReportedFile]) -> Iterator[HubFigure]:
    """Yield explicit refusals of each set, unsteered and with each file, and the retention with each.

    These are the shares of the card: explicit refusals of judged answers.
    """
    for number, file in enumerate(files):
        for name, one in file.sets.items():
            dataset, word = f"rs-gguf, validation split, {name} prompts", f"with the {file.word}"
            rates = [
                ("explicit_refusals_steered", f"explicit refusals, {word}",
                 _explicit(one, one.outcomes_steered, one.explicit_steered)),
                ("retention", f"retention of refusals, {word}",
                 one.kept.rate if one.kind == "harmful" and one.kept else None),
            ]  # fmt: skip
            if number == 0:  # all files were measured on the same prompts
                before = _explicit(one, one.outcomes_unsteered, one.explicit_unsteered)
                rates.insert(0, ("explicit_refusals_unsteered", "explicit refusals, unsteered", before))
            for kind, title, rate in rates:
                if rate is not None:
                    yield HubFigure(dataset, kind, title, round(rate, 4))


def _explicit(one: SetRecord, outcomes: Outcomes, share: Share | None) -> float | None:
    """Return the rate of explicit refusals; of all answers where schema 1 knew no share."""
    if share is not None:
        return share.rate
    return outcomes.explicit / one.n if one.n else None
