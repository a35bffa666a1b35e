"""Plan what a run costs, stage by stage: seconds, memory and disk space.

A recipe goes in; a `Plan` comes out. Nothing is downloaded. The metadata of the model is enough: its weights
are read only to measure the speed of this machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rs_gguf.engines import open_engine
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Engine
from rs_gguf.engines.llama.contexts import kv_cells
from rs_gguf.errors import InputError
from rs_gguf.judges.registry import Judge, judges_with_model, kind_and_name, open_judge_spec, shipped_probe
from rs_gguf.models import dimensions
from rs_gguf.models import resolve as models
from rs_gguf.models.dimensions import ModelDimensions
from rs_gguf.pipeline.costs import Cost, Costs
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.speed import JudgeModel, Speed, measured_speed, stored_speed
from rs_gguf.pipeline.stages import IN_ORDER
from rs_gguf.prompts import grid as prompts
from rs_gguf.records.files import from_home


@dataclass(frozen=True)
class Plan:
    """The cost of each stage in order, and the assumptions of the plan.

    prompts: number of prompts by split, and of `gate_only` prompts.
    """

    stages: Mapping[str, Cost]
    prompts: Mapping[str, int]
    model: ModelDimensions
    speed: Speed

    @property
    def seconds(self) -> float:
        """Return the seconds of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def memory(self) -> float:
        """Return the peak memory in bytes."""
        return max(stage.memory for stage in self.stages.values())

    @property
    def disk(self) -> float:
        """Return the disk space in bytes."""
        return sum(stage.disk for stage in self.stages.values())

    def to_row(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"seconds": self.seconds, "memory": self.memory, "disk": self.disk, **asdict(self)}


def plan(recipe: Recipe, model: ModelDimensions, speed: Speed, judge: JudgeModel | None) -> Plan:
    """Return what `recipe` costs on `model`. Without `judge`, judging costs this machine nothing.

    Raises:
        InputError: a prompt file of the recipe cannot be read.
    """
    costs = Costs(recipe, prompts.pool(recipe.prompts.files), model, speed, judge)
    stages = {stage.info.name: cost for stage in IN_ORDER if (cost := stage.cost(costs)) is not None}
    counts = {split: sum(n.values()) for split, n in costs.sizes.items()}
    return Plan(stages, {**counts, "gate_only": costs.gate_only}, model, speed)


def model_file(recipe: Recipe) -> Path:
    """Return the path of the recipe's model: a GGUF file, a Hugging Face folder or a config.json.

    Raises:
        InputError: the model is not on this machine.
    """
    return _local_path(recipe.model)


def model_dimensions(path: Path, bits: float | None = None) -> ModelDimensions:
    """Return the dimensions of a model.

    bits: bits per weight; a configuration then gives the dimensions of a GGUF file.

    Raises:
        InputError: the model cannot be read, or `bits` is given for a GGUF file.
    """
    if path.is_dir() or path.suffix == ".json":
        return dimensions.of_folder(path, bits)
    if bits is not None:
        raise InputError(
            f"--bits: {path.name} is a GGUF file, whose bits per weight are known. Give --bits only with a "
            "config.json or a Hugging Face folder."
        )
    return dimensions.of_gguf(path)


def judge_of(recipe: Recipe, find: Callable[[str], Path] | None = None) -> JudgeModel | None:
    """Return the judge, if it is a model on this machine; None for rules and endpoints.

    find: returns the path of the judge's model; by default, nothing is downloaded.

    Raises:
        InputError: the judge's model is not on this machine, or the judge is `votes:`, whose time is unknown.
    """
    kind, name = kind_and_name(recipe.judge or models.DEFAULT)
    if not judges_with_model(kind):
        return None
    if kind == "votes":
        raise InputError(
            f"judge {recipe.judge}: it is not known how long this judge thinks. Plan with another judge, as "
            "with `--set judge=keywords`."
        )
    try:
        path = (find or _local_path)(name)
    except InputError as error:
        raise InputError(f"judge: {error} Or plan with `--set judge=keywords`.") from None
    model = dimensions.of_gguf(path)
    hashes = {one.path: one.sha256 for one in models.CATALOGUE.values()}
    probe = None if kind == "labels" else shipped_probe(hashes.get(path, ""))
    if probe is None:
        return JudgeModel(model)
    # A probe does not need the layers behind its own.
    return JudgeModel(model, (max(probe.layers) + 1) / model.n_layer)


def stored(recipe: Recipe, model: ModelDimensions, judge: JudgeModel | None) -> Speed:
    """Return the stored speed of a server core, times the threads of the recipe."""
    return stored_speed(recipe.engine.n_threads, model, judge, _at_once(recipe))


def measure(recipe: Recipe, path: Path, judge: JudgeModel | None) -> Speed:
    """Measure the speed of this machine on the recipe's model, loaded from `path`, and on its judge.

    Raises:
        InputError: the model or the judge cannot be loaded.
    """
    with contextlib.ExitStack() as opened:
        engine = recipe.engine
        model = opened.enter_context(open_engine(path, n_parallel=_at_once(recipe), settings=engine))
        loaded = None
        if judge is not None:
            spec = open_judge_spec(recipe.judge, loaded=model, engine=engine, cached=False)
            loaded = opened.enter_context(spec)
        return measure_loaded(recipe, model, loaded)


def measure_loaded(recipe: Recipe, model: Engine, judge: Judge | None) -> Speed:
    """Measure the speed of a loaded model and of its judge, if it has one. Cached judgements take no time."""
    count = max(2, _at_once(recipe))  # a judge is timed on one prompt with another in place of its answer
    fit = [row for rows in prompts.pool(recipe.prompts.files)["fit"].values() for row in rows]
    sample = fit[:: max(1, len(fit) // count)][:count]
    return measured_speed(model, judge, sample, chat_tokens(model, sample, recipe.prompts.system))


def _at_once(recipe: Recipe) -> int:
    """Return how many short prompts are answered at once."""
    return max(1, min(recipe.answers.parallel, recipe.engine.ctx_size // kv_cells(1)))


def _local_path(model: str) -> Path:
    if model in models.CATALOGUE:
        return models.path_of(model)
    if not from_home(model).exists():
        raise InputError(
            f"no file or folder {model}. A plan downloads nothing: give a GGUF file, a config.json or a "
            "Hugging Face folder."
        )
    return models.resolve(model)
