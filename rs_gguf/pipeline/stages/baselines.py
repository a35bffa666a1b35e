"""The baselines that a run is measured beside: which it can have, and the conditions that they are.

A run and the written files go in; the `Condition`s of its recipe's baselines come out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from rs_gguf.engines.answers import Advance
from rs_gguf.evaluation.condition import Condition
from rs_gguf.methods import baselines
from rs_gguf.methods.vector import ControlVector
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages import wordings
from rs_gguf.pipeline.stages.file_record import WrittenFile
from rs_gguf.pipeline.stages.fit import samples
from rs_gguf.records.rows import RowLog
from rs_gguf.search.unsteered import UnsteeredAnswers

_log = logging.getLogger("rs_gguf.baselines")


def usable(run: Run) -> list[str]:
    """Return the names of the recipe's baselines that can be made here, and log a warning for each other one.

    A published folder has no captured activations, which most of them need.
    """
    names = run.recipe.measure.baselines
    if not run.folder.is_done("capture", run.key("capture")):
        left_out = [name for name in names if name not in baselines.WITHOUT_ACTIVATIONS]
        if left_out:
            why = (
                "the activations are of another version or other engine options"
                if run.folder.was_done("capture")
                else "there are no captured activations"
            )
            _log.warning("%s: %s. The baselines %s are left out.", run.folder.path, why, ", ".join(left_out))
        names = [name for name in names if name not in left_out]
    return baselines.usable(names, run.model)


def build(
    run: Run,
    names: Sequence[str],
    files: Mapping[str, WrittenFile],
    tuned: UnsteeredAnswers | None,
    log: RowLog,
    advance: Advance,
) -> list[Condition]:
    """Return the baselines of these `usable` names.

    tuned: the unsteered answers on which the system prompt is selected; None without that baseline.
    log, advance: as for `wordings.select`.
    """

    def system_prompt() -> Condition:
        assert tuned is not None  # it is named
        return wordings.select(run, tuned, log, advance)

    recipe = run.recipe
    return baselines.build(
        names, lambda: samples(run), run.model, run.folder.path,
        effect=recipe.effect, system=recipe.prompts.system, device=recipe.fit.device,
        layers=vector_layers(files), system_prompt=system_prompt,
    )  # fmt: skip


def vector_layers(files: Mapping[str, WrittenFile]) -> tuple[int, int]:
    """Return first and last layer of the written vector."""
    return files[ControlVector.name].trial.candidate.layers
