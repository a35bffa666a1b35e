"""The report stage: write the measured results as pages for people (`rs_gguf.report`).

The files of a run folder go in; `report.html` and `card.md` come out.
"""

from __future__ import annotations

from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.pipeline.costs import Costs
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.tune import chosen
from rs_gguf.pipeline.stages.write import path_of
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.metrics import RunRecord
from rs_gguf.report.page import write_card, write_report


class Report(Stage):
    """The stage that writes `report.html` and `card.md`."""

    info = STAGES["report"]
    always = True  # it takes seconds, and also shows files that other commands put into the folder

    def inputs(self, run: Run) -> list[Any]:
        return []

    def work(self, run: Run, key: str) -> None:
        for path in (path_of(run, name) for name in chosen(run.folder)):
            if not path.is_file():
                raise InputError(
                    f"{path}, which this run wrote, is missing. Put it back, or run again with --fresh."
                )
        # The seconds of all earlier stages are known only now.
        path = run.folder / "metrics.json"
        RunRecord.read(path).model_copy(update={"seconds": run.folder.seconds()}).write(path)
        with run.progress.stage(self.info.name, 2) as advance:
            write_report(run.folder.path)
            advance(1)
            write_card(run.folder.path)
            advance(1)

    def cost(self, costs: Costs) -> None:
        return None
