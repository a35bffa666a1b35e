"""Define a stage, the run that it works on, and how a run reports progress.

A recipe, a run folder and the stages go in; files of the run folder come out. Each stage reads the files of
earlier stages, and is skipped while its inputs are unchanged. `rs_gguf.cli.terminal` draws the progress; the
library alone is silent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rs_gguf.engines import engine_for, open_engine
from rs_gguf.engines.engine import Can, Engine
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS
from rs_gguf.judges.registry import (
    Judge,
    SecondJudge,
    judges_with_model,
    kind_and_name,
    open_judge_spec,
    open_second_judge,
)
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import baselines
from rs_gguf.models import dimensions
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.costs import Cost, Costs
from rs_gguf.pipeline.folder import RunFolder, key_of
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts import contexts
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.contexts import Context
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import StageInfo
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.files import from_home


class Progress(Protocol):
    """The receiver of a run's progress."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` items; the context's value is a function that advances the count."""
        ...

    def skipped(self, name: str) -> None:
        """Report a stage that is already done."""
        ...

    def download(self, done: int, total: int) -> None:
        """Report the bytes of a model download."""
        ...


class Silent:
    """Progress that reports nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def skipped(self, name: str) -> None:
        pass

    def download(self, done: int, total: int) -> None:
        pass


class Stage(Protocol):
    """One stage: its inputs, its work and its cost.

    shared: all processes of torchrun do the stage together; rank 0 alone does the other stages.
    always: the stage is done even if its inputs are unchanged.
    replaces_at_end: the files of an earlier recipe stay valid until `work` calls `run.forget_from(self)`.
    """

    info: StageInfo
    shared: bool = False
    always: bool = False
    replaces_at_end: bool = False

    def inputs(self, run: Run) -> list[Any]:
        """Return the inputs that earlier stages do not have, as JSON values.

        Read nothing that only later stages need. A file that is not a model then fails at loading.
        """
        ...

    def work(self, run: Run, key: str) -> None:
        """Do the stage, and leave the files of `info` in the run folder.

        key: hash of the inputs of this stage and all earlier ones.
        """
        ...

    def cost(self, costs: Costs) -> Cost | None:
        """Return the cost of the stage; None if it takes only seconds."""
        ...


class Run:
    """One run: what its stages work on, and which of them are done.

    Models are loaded when a stage first needs them; leaving the context closes them.

    Raises:
        InputError: an estimator of the recipe does not exist, or a baseline is not possible.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        progress: Progress,
        processes: Processes = ALONE,
        *,
        stages: Sequence[Stage],
    ) -> None:
        unknown = sorted(set(recipe.estimators) - ESTIMATORS.keys())
        if unknown:
            raise InputError(
                f"recipe: fit.estimators: no estimator {', '.join(unknown)}; "
                f"{', '.join(ESTIMATORS)} are accepted."
            )
        self.recipe, self.folder, self.progress, self.processes = recipe, folder, progress, processes
        self.stages = {stage.info.name: stage for stage in stages}
        self._open = contextlib.ExitStack()
        if "ablation" in recipe.measure.baselines and (
            recipe.effect == "induce" or Can.LORA not in engine_for(self.model_path).can
        ):
            raise InputError(baselines.NO_ABLATION)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    # ---- stages ----------------------------------------------------------------------------------

    def key(self, name: str) -> str:
        """Return a hash of the inputs of this stage and all earlier ones."""
        names = list(self.stages)
        names = names[: names.index(name) + 1]
        return key_of([(before, self.stages[before].inputs(self)) for before in names])

    def outdated(self) -> list[str]:
        """Return the stages that were finished with other inputs, so that a run repeats them."""
        return [
            name
            for name, stage in self.stages.items()
            if not stage.always
            and self.folder.was_done(name)
            and not self.folder.is_done(name, self.key(name))
        ]

    def do(self, name: str) -> None:
        """Do one stage, unless it is already done with the same inputs."""
        stage, key = self.stages[name], self.key(name)
        if not stage.always and self.folder.is_done(name, key):
            self.progress.skipped(name)
            return
        # Files of this and later stages may belong to another recipe. They are not valid once replaced.
        if not stage.replaces_at_end:
            self.forget_from(stage)
        start = time.monotonic()
        if stage.shared:
            self.processes.from_first((name, key))
        stage.work(self, key)
        self.folder.mark_done(name, key, time.monotonic() - start)

    def forget_from(self, stage: Stage) -> None:
        """Mark this stage and all later ones as not done."""
        names = list(self.stages)
        self.folder.forget(*names[names.index(stage.info.name) :])

    def follow(self) -> None:
        """Do this rank's part of the stages that rank 0 starts, until rank 0 calls `release`.

        Raises:
            InputError: rank 0 ended without `release`.
        """
        while (started := self._next_shared()) is not None:
            name, key = started
            self.stages[name].work(self, key)

    def _next_shared(self) -> tuple[str, str] | None:
        """Return name and key of the next stage that rank 0 starts; None after `release`."""
        try:
            return self.processes.from_first(None)
        except RuntimeError as error:  # the connection is closed
            raise InputError("the process of rank 0 has ended; its message names the reason.") from error

    def release(self) -> None:
        """End `follow` on the other ranks."""
        self.processes.from_first(None)

    # ---- what they work on -----------------------------------------------------------------------

    @cached_property
    def pool(self) -> dict[str, dict[str, list[Prompt]]]:
        """Return all prompts that the run can choose from, by split and kind."""
        return prompts.pool(self.recipe.prompts.files)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Return the prompts of each split, sampled to the recipe's size per kind."""
        return {
            split: [
                prompt
                for rows in kinds.values()
                for prompt in prompts.stratified(
                    rows, getattr(self.recipe.prompts, split), seed=self.recipe.seed
                )
            ]
            for split, kinds in self.pool.items()
        }

    @cached_property
    def gate_only(self) -> list[Prompt]:
        """Return more fit prompts, for gate vectors, which are not answered; none without an adapter.

        Their activations are captured `in_contexts`.
        """
        can = engine_for(self.model_path).can
        if Can.MATRIX_INPUTS not in can or not dimensions.of_gguf(self.model_path).output_matrices:
            return []
        answered = {p.id for p in self.prompts["fit"] + self.prompts["tune"]}
        size, seed = self.recipe.prompts.gate_only, self.recipe.seed
        unused = ([p for p in rows if p.id not in answered] for rows in self.pool["fit"].values())
        return [prompt for rows in unused for prompt in prompts.stratified(rows, size, seed=seed)]

    @cached_property
    def in_contexts(self) -> list[tuple[Prompt, Context]]:
        """Return the gate-only prompts, each with its context, in the order in which they are captured."""
        return contexts.assign(self.gate_only, ChatFormat.of(self.model), seed=self.recipe.seed)

    @cached_property
    def model_path(self) -> Path:
        """Return the path of the model, which is downloaded if necessary."""
        return models.resolve(self.recipe.model, progress=self.progress.download)

    @cached_property
    def model_hash(self) -> str:
        """Return the fingerprint of the model."""
        return models.fingerprint(self.model_path)

    @cached_property
    def model(self) -> Engine:
        """Return the loaded model."""
        recipe = self.recipe
        model = open_engine(self.model_path, n_parallel=recipe.answers.parallel, settings=recipe.engine)
        self._open.callback(model.close)
        return model

    @cached_property
    def judge_hash(self) -> str | None:
        """Return the fingerprint of the judge's file, since a file may be replaced; None without a file."""
        return _file_hash(self.recipe.judge)

    @cached_property
    def second_judge_hash(self) -> str | None:
        """Return the fingerprint of the second judge's file; None without a file."""
        return _file_hash(self.recipe.judge_second)

    @cached_property
    def judge(self) -> Judge:
        """Return the loaded judge."""
        recipe, progress = self.recipe, self.progress.download
        opened = open_judge_spec(recipe.judge, loaded=self.model, engine=recipe.engine, progress=progress)
        return self._open.enter_context(opened)

    @cached_property
    def second_judge(self) -> SecondJudge | None:
        """Return the loaded second judge; None if the recipe names none."""
        spec, engine, progress = self.recipe.judge_second, self.recipe.engine, self.progress.download
        if spec is None:
            return None
        opened = open_second_judge(spec, loaded=self.model, engine=engine, progress=progress)
        return self._open.enter_context(opened)


def _file_hash(judge: str | None) -> str | None:
    """Return the fingerprint of the file that a judge's name gives; None if it gives no file."""
    kind, name = kind_and_name(judge or "")
    if not judges_with_model(kind):  # a long address or pattern is not even the name of a file
        return None
    path = from_home(name)
    return models.fingerprint(path) if path.is_file() else None
