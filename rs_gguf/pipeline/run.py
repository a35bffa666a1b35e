"""The pipeline: prompts → answers → scores → activations → directions → strength → GGUF → before/after.

A recipe and a run folder go in; `remove.gguf` and `remove-adapter.gguf` (or `induce…`), `metrics.json`,
`report.html` and `card.md` come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rs_gguf.estimators.device import resolve_device
from rs_gguf.judges.judge import try_out
from rs_gguf.machine import ALONE, Processes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe, dump
from rs_gguf.pipeline.stage import Progress, Run, Silent
from rs_gguf.pipeline.stages import IN_ORDER
from rs_gguf.records.metrics import RunRecord


def run(
    recipe: Recipe, out: Path, *, fresh: bool = False, progress: Progress | None = None, until: str = "report"
) -> dict[str, Any]:
    """Run the stages up to `until` in the folder `out` and return the metrics (empty before `measure`).

    Resumes by itself: what an earlier call with the same recipe finished is not done again. Where the model,
    a prompt file or the judge cannot be had, the folder stays as it was.

    Several processes (torchrun) share the stages `capture` and `fit`. Rank 0 runs the others; the other ranks
    return nothing once the fit is done.

    Raises:
        InputError: something in the recipe, its files or the machine does not serve; the message says what.
        VerificationError: a written file's effect could not be observed on the model, or it was read back otherwise.
    """
    folder = RunFolder(out)
    with Processes.of_torchrun() as processes:
        if processes.rank > 0:
            with open_run(recipe, folder, processes=processes) as one:
                one.follow()
            return {}
        with folder.locked(), open_run(recipe, folder, progress, processes) as one:
            return _run(one, fresh, until)


def open_run(
    recipe: Recipe, folder: RunFolder, progress: Progress | None = None, processes: Processes = ALONE
) -> Run:
    """Return the run of `recipe` in `folder`, a context manager, before any stage is done."""
    return Run(recipe, folder, progress or Silent(), processes, stages=IN_ORDER)


def _run(one: Run, fresh: bool, until: str) -> dict[str, Any]:
    # What is mistyped or out of reach must cost nothing. The key needs the model and the prompts.
    key = one.key("score")
    if until != "answer" and (fresh or not one.folder.is_done("score", key)):
        try_out(one.judge)
    resolve_device(one.recipe.fit.device)
    dump(one.recipe, one.folder / "recipe.toml")
    if fresh:
        one.folder.forget_all()
    names = list(one.stages)
    wanted = names[: names.index(until) + 1]
    shared = max(index for index, stage in enumerate(one.stages.values()) if stage.shared) + 1
    for name in wanted[:shared]:
        one.do(name)
    one.release()
    for name in wanted[shared:]:
        one.do(name)
    return RunRecord.read(one.folder / "metrics.json").mapping() if "measure" in wanted else {}
