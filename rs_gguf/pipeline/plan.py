"""What a run will cost before it is run: seconds, memory and disk, stage by stage.

A recipe goes in; a `Plan` comes out. Nothing is downloaded. The metadata of the model is enough: its weights
are read only when the speed of this machine is to be measured on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rs_gguf.engines.llama.contexts import CONTEXT, kv_cells
from rs_gguf.errors import InputError
from rs_gguf.judges.registry import kind_and_name, shipped_probe
from rs_gguf.machine import usable_cores
from rs_gguf.models import dimensions as shapes
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
    """The stages in their order, and what the figures follow from; sizes are bytes."""

    stages: Mapping[str, Cost]
    prompts: Mapping[str, int]  # by split, and those that are only read
    model: ModelDimensions
    speed: Speed

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def memory(self) -> float:
        return max(stage.memory for stage in self.stages.values())

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages.values())

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return {"seconds": self.seconds, "memory": self.memory, "disk": self.disk, **asdict(self)}


def plan(recipe: Recipe, model: ModelDimensions, speed: Speed, judge: JudgeModel | None) -> Plan:
    """What running `recipe` on `model` takes. Without `judge`, judging costs this machine nothing.

    Raises:
        InputError: a prompt file of the recipe that cannot be read.
    """
    costs = Costs(recipe, prompts.pool(recipe.prompts.files), model, speed, judge)
    stages = {stage.info.name: cost for stage in IN_ORDER if (cost := stage.cost(costs)) is not None}
    counts = {split: sum(n.values()) for split, n in costs.sizes.items()}
    return Plan(stages, {**counts, "gate_only": costs.gate_only}, model, speed)


def model_file(recipe: Recipe) -> Path:
    """Where the recipe's model is: a GGUF file, a Hugging Face folder or a config.json.

    Raises:
        InputError: it is not on this machine.
    """
    return _here(recipe.model)


def model_dimensions(path: Path, bits: float | None = None) -> ModelDimensions:
    """The shape of the model there; `bits` turn a configuration into that of a GGUF file.

    Raises:
        InputError: nothing that can be read, or `bits` for a GGUF file.
    """
    if path.is_dir() or path.suffix == ".json":
        return shapes.of_folder(path, bits)
    if bits is not None:
        raise InputError(f"bits a weight are for a config.json; {path.name} has its own.")
    return shapes.of_gguf(path)


def judge_of(recipe: Recipe) -> JudgeModel | None:
    """The model that judges on this machine, if one does.

    Raises:
        InputError: it is not here, or thinks for nobody knows how long.
    """
    kind, name = kind_and_name(recipe.judge or models.DEFAULT)
    if kind in ("keywords", "endpoint"):
        return None
    if kind == "votes":
        raise InputError(
            f"judge {recipe.judge}: how long a judge thinks cannot be planned. Plan with another judge."
        )
    try:
        path = _here(name)
    except InputError as error:
        raise InputError(f"judge: {error} Or plan with `--set judge=keywords`.") from None
    model = shapes.of_gguf(path)
    probe = shipped_probe()
    # The probe belongs to the default model, whose deeper blocks it does not need.
    if probe is None or kind == "labels" or path != models.CATALOGUE[models.DEFAULT].path:
        return JudgeModel(model)
    return JudgeModel(model, (max(probe.layers) + 1) / model.n_layer)


def stored(recipe: Recipe, model: ModelDimensions, judge: JudgeModel | None) -> Speed:
    """The speed of as many cores like those that this project is measured on as this process may use."""
    return stored_speed(usable_cores(), model, judge, _at_once(recipe))


def measure(recipe: Recipe, path: Path, judge: JudgeModel | None) -> Speed:
    """The speed of this machine on the recipe's model, loaded from `path`, and on its judge if it has one.

    Raises:
        InputError: one of them cannot be loaded.
    """
    from rs_gguf.engines import open_engine
    from rs_gguf.engines.answers import chat_tokens
    from rs_gguf.judges.registry import open_judge_spec

    count = _at_once(recipe)
    rows = [row for kind in prompts.pool(recipe.prompts.files)["fit"].values() for row in kind]
    some = rows[:: max(1, len(rows) // count)][:count]
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_engine(path, n_parallel=len(some)))
        asked = chat_tokens(model, some, recipe.prompts.system)
        grades = None
        if judge is not None:
            grades = opened.enter_context(open_judge_spec(recipe.judge, loaded=model, cached=False))
        return measured_speed(model, grades, some, asked)


def _at_once(recipe: Recipe) -> int:
    """How many prompts are answered at once, where they are not too long."""
    return min(recipe.answers.parallel, CONTEXT // kv_cells(1))


def _here(model: str) -> Path:
    if model in models.CATALOGUE:
        return models.path_of(model)
    if not from_home(model).exists():
        raise InputError(
            f"no file or folder {model}. A plan downloads nothing: give a GGUF file or a Hugging Face "
            "folder, of which config.json alone will do."
        )
    return models.resolve(model)
