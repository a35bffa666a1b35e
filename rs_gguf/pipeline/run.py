"""Run the pipeline: answer, score, capture, fit, tune, write, measure, report.

A recipe and a run folder go in; `remove.gguf` and `remove-adapter.gguf` (or `induce…`), `metrics.json`,
`report.html` and `card.md` come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.estimators.device import resolve_device
from rs_gguf.judges.judge import try_out
from rs_gguf.machine import ALONE, Processes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe, dump
from rs_gguf.pipeline.stage import Progress, Run, Silent
from rs_gguf.pipeline.stages import IN_ORDER
from rs_gguf.records.artefacts import LAST
from rs_gguf.records.metrics import RunRecord
from rs_gguf.steering.file import shell_path


def run(
    recipe: Recipe,
    out: Path,
    *,
    fresh: bool = False,
    repeat: bool = True,
    progress: Progress | None = None,
    until: str = LAST,
) -> dict[str, Any]:
    """Run the stages up to `until` in the folder `out` and return the metrics (empty before `measure`).

    A call resumes: stages that an earlier call finished with the same recipe are not repeated. If the model,
    a prompt file or the judge is not available, the folder stays unchanged.

    Several processes (torchrun) share the stages `capture` and `fit`. Rank 0 runs the other stages; the other
    ranks return an empty dictionary after the fit.

    fresh: begin again, and delete what the stages of earlier calls left.
    repeat: whether stages that were done with another recipe are done again.

    Raises:
        InputError: the recipe, its files or the machine cannot be used, or a stage would have to be repeated;
            the message names the reason.
        VerificationError: the effect of a written file was not observed on the model, or the file was read
            back with other contents.
    """
    folder = RunFolder(out)
    with Processes.of_torchrun() as processes:
        if processes.rank > 0:
            with open_run(recipe, folder, processes=processes) as opened:
                opened.follow()
            return {}
        with folder.locked(), open_run(recipe, folder, progress, processes) as opened:
            outdated = opened.outdated() if not (repeat or fresh) else []
            if outdated:
                raise InputError(
                    f"{out}: the stage {outdated[0]} is out of date: the recipe, one of its files or the "
                    f"program changed. `{until}` does not repeat it; `rs-export run --out {shell_path(out)}` "
                    "does."
                )
            return _run(opened, fresh, until)


def open_run(
    recipe: Recipe, folder: RunFolder, progress: Progress | None = None, processes: Processes = ALONE
) -> Run:
    """Return the run of `recipe` in `folder`, as a context manager; no stage is done yet."""
    return Run(recipe, folder, progress or Silent(), processes, stages=IN_ORDER)


def _run(opened: Run, fresh: bool, until: str) -> dict[str, Any]:
    # A typo or a missing file must raise before anything changes. The key needs the model and the prompts.
    key = opened.key("score")
    if until != "answer" and (fresh or not opened.folder.is_done("score", key)):
        try_out(opened.judge)
    if fresh or not opened.folder.is_done("fit", opened.key("fit")):
        resolve_device(opened.recipe.fit.device)
    dump(opened.recipe, opened.folder / "recipe.toml")
    if fresh:
        opened.folder.forget_all()
    names = list(opened.stages)
    names = names[: names.index(until) + 1]
    shared = max(index for index, stage in enumerate(opened.stages.values()) if stage.shared) + 1
    for name in names[:shared]:
        opened.do(name)
    opened.release()
    for name in names[shared:]:
        opened.do(name)
    return RunRecord.read(opened.folder / "metrics.json").mapping() if "measure" in names else {}
