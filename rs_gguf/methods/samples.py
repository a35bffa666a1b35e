"""The prompts of the fit split with what was read of them: what every method is fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import Device, resolve_device
from rs_gguf.estimators.labels import Labels
from rs_gguf.machine import ALONE, Processes
from rs_gguf.records.conversation import NEUTRAL, Prompt


@dataclass(frozen=True)
class Samples:
    """The prompts of the fit split, and what was read of them.

    `prompts`: the judged ones; `activations` [N, L, D], an array or `Activations`; `confidence` [N];
    `inputs` by matrix, empty where the engine cannot read them. `folder`: where activations that are not one
    array are mapped to a file. `others`: prompts that were not answered, or whose answers could not be
    judged; their inputs come after the inputs of `prompts`, and only gates learn from them. `categories`
    [N]: category of each refusal, where the judge gives one. `contexts`: names of what stood around the
    `others`, "" for nothing.
    """

    prompts: Sequence[Prompt]
    activations: Any
    confidence: NDArray[np.float64]
    inputs: Mapping[str, MatrixInputs]
    folder: Path
    others: Sequence[Prompt] = ()
    categories: Sequence[str | None] = ()
    contexts: Sequence[str] = ()

    @cached_property
    def rows(self) -> NDArray[Any]:
        """The activations as one array, for the projection kernel."""
        return Activations.of(self.activations).array(self.folder)

    def rows_on(self, device: Device) -> Any:
        """Return `rows`, as a tensor where PyTorch projects them, on a GPU; the kernel takes an array."""
        where = resolve_device(device)
        return self.rows if where.type == "cpu" else torch.tensor(self.rows, device=where)

    def share(self, processes: Processes) -> Samples:
        """Return the part of them that this process reads."""
        if processes.count == 1:
            return self
        mine, rest = processes.share(len(self.prompts)), processes.share(len(self.others))
        places = np.arange(len(self.prompts) + len(self.others))
        read = np.concatenate([places[: len(self.prompts)][mine], places[len(self.prompts) :][rest]])
        return Samples(
            self.prompts[mine],
            Activations.of(self.activations).take(mine),
            self.confidence[mine],
            {name: rows.share(read, processes) for name, rows in self.inputs.items()},
            self.folder,
            self.others[rest],
            self.categories[mine],
            self.contexts[rest],
        )

    @cached_property
    def kinds(self) -> list[str]:
        return [prompt.kind for prompt in self.prompts]

    def labels(self, processes: Processes = ALONE) -> Labels:
        """Return the labels of all samples, as a gate takes them: of the `others` kind and cells alone count.

        With several `processes`, of the samples of all of them.
        """
        every = [*self.prompts, *self.others]
        confidence = np.concatenate([self.confidence, np.zeros(len(self.others))])
        contexts = [""] * len(self.prompts) + [*self.contexts]
        cells = [[p.topic, p.form, p.language, name] for p, name in zip(every, contexts, strict=True)]
        names = np.array(cells, dtype=np.str_).reshape(len(every), 4)  # also where a rank has no share
        return Labels.of(confidence, [prompt.kind for prompt in every], names, processes=processes)

    def counts(self, kind: str) -> dict[str, int]:
        """How many of a kind were refused, answered and neither."""
        values = self.confidence[np.array([k == kind for k in self.kinds])]
        return {
            "refused": int((values > NEUTRAL).sum()),
            "answered": int((values < -NEUTRAL).sum()),
            "neutral": int((np.abs(values) <= NEUTRAL).sum()),
        }

    def check_classes(self, effect: str) -> None:
        """Raise `InputError` unless each class that is fitted on has a sample."""
        changed = ("sensitive", "refused" if effect == "remove" else "answered")
        for kind, side in (changed, ("benign", "answered"), ("harmful", "refused")):
            counts = self.counts(kind)
            if counts[side] == 0:
                raise InputError(
                    f"fit: none of the {sum(counts.values())} {kind} prompts was {side}: no class to fit on. "
                    f"Use more or other {kind} prompts (prompts.fit, prompts.{kind}) or another model."
                )
