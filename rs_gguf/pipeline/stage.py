"""A stage of a run, the run that it works on, and where a run tells how far it is.

A recipe, a run folder and the stages go in; each stage reads the files of those before it and is skipped
while its inputs are the same. `rs_gguf.cli.terminal` draws the progress; the library's own is silent.
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
from rs_gguf.judges.registry import Judge, kind_and_name, open_judge_spec
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
    """What a run calls."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` items; the value advances the count."""
        ...

    def skipped(self, name: str) -> None:
        """A stage was done before."""
        ...

    def download(self, done: int, total: int) -> None:
        """Bytes of a model download."""
        ...


class Silent:
    """Tells nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def skipped(self, name: str) -> None:
        pass

    def download(self, done: int, total: int) -> None:
        pass


class Stage(Protocol):
    """One stage: what it depends on and what it does."""

    info: StageInfo
    shared: bool = False
    """All processes of torchrun do it together. Rank 0 alone does the others."""
    always: bool = False
    """It is done even if its inputs are the same."""
    replaces_at_end: bool = False
    """What an earlier recipe left, hours of work, counts until `work` calls `run.forget_from(self)`."""

    def inputs(self, run: Run) -> list[Any]:
        """Return all that it depends on besides what the stages before it depend on, as JSON values.

        Of later stages nothing is read: a file that is not a model then fails when it is loaded.
        """
        ...

    def work(self, run: Run, key: str) -> None:
        """Do it, and leave what `info` says in the run's folder. `key` is a hash of the inputs so far."""
        ...

    def cost(self, costs: Costs) -> Cost | None:
        """Return what it costs; None if that is seconds."""
        ...


class Run:
    """One run: what its stages work on, and which of them are done.

    Models are loaded when a stage first needs them; leaving the context closes them.
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
                f"there are {', '.join(ESTIMATORS)}."
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
        """Hash of all that matters up to this stage: recipe sections, prompts, model, judge, version."""
        names = list(self.stages)
        wanted = names[: names.index(name) + 1]
        return key_of([(before, self.stages[before].inputs(self)) for before in wanted])

    def do(self, name: str) -> None:
        """Do one stage unless it is done with the same inputs."""
        stage, key = self.stages[name], self.key(name)
        if not stage.always and self.folder.is_done(name, key):
            self.progress.skipped(name)
            return
        # What it and later stages left may be of another recipe: it counts no more once it is replaced.
        if not stage.replaces_at_end:
            self.forget_from(stage)
        start = time.monotonic()
        if stage.shared:
            self.processes.from_first((name, key))
        stage.work(self, key)
        self.folder.mark_done(name, key, time.monotonic() - start)

    def forget_from(self, stage: Stage) -> None:
        """Have this stage and those after it done again."""
        names = list(self.stages)
        self.folder.forget(*names[names.index(stage.info.name) :])

    def follow(self) -> None:
        """Do this rank's part of the stages that rank 0 begins, until it releases the others.

        Raises:
            InputError: rank 0 ended before it released this one.
        """
        while (begun := self._begun()) is not None:
            name, key = begun
            self.stages[name].work(self, key)

    def _begun(self) -> tuple[str, str] | None:
        try:
            return self.processes.from_first(None)
        except RuntimeError as error:  # the connection is closed
            raise InputError("the process of rank 0 has ended; its own message says why.") from error

    def release(self) -> None:
        """Let the other ranks go."""
        self.processes.from_first(None)

    # ---- what they work on -----------------------------------------------------------------------

    @cached_property
    def pool(self) -> dict[str, dict[str, list[Prompt]]]:
        """All prompts that the run may choose from, by split and kind."""
        return prompts.pool(self.recipe.prompts.files)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by split, each kind cut to the recipe's size."""
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
        """More prompts to fit on, which are not answered: for gates, if the model can have any.

        They are read `in_contexts`.
        """
        can = engine_for(self.model_path).can
        if Can.MATRIX_INPUTS not in can or not dimensions.of_gguf(self.model_path).output_matrices:
            return []
        answered = {p.id for p in self.prompts["fit"] + self.prompts["tune"]}
        size, seed = self.recipe.prompts.gate_only, self.recipe.seed
        others = ([p for p in rows if p.id not in answered] for rows in self.pool["fit"].values())
        return [prompt for rows in others for prompt in prompts.stratified(rows, size, seed=seed)]

    @cached_property
    def in_contexts(self) -> list[tuple[Prompt, Context]]:
        """The gate-only prompts in the order in which they are read, with what stands around each."""
        return contexts.assign(self.gate_only, ChatFormat.of(self.model), seed=self.recipe.seed)

    @cached_property
    def model_path(self) -> Path:
        return models.resolve(self.recipe.model, progress=self.progress.download)

    @cached_property
    def model_hash(self) -> str:
        return models.fingerprint(self.model_path)

    @cached_property
    def model(self) -> Engine:
        model = open_engine(self.model_path, n_parallel=self.recipe.answers.parallel)
        self._open.callback(model.close)
        return model

    @cached_property
    def judge_hash(self) -> str | None:
        """Of a judge that the recipe names by its file, in whose place another one may be put."""
        _, name = kind_and_name(self.recipe.judge or "")
        path = from_home(name)
        return models.fingerprint(path) if path.is_file() else None

    @cached_property
    def judge(self) -> Judge:
        opened = open_judge_spec(self.recipe.judge, loaded=self.model, progress=self.progress.download)
        return self._open.enter_context(opened)
