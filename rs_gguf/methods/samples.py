"""Hold the prompts of the fit split and what was captured at them: the input of every method's fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.device import resolve_device
from rs_gguf.estimators.labels import Labels
from rs_gguf.machine import ALONE, Device, Processes
from rs_gguf.records.conversation import NEUTRAL, Prompt


@dataclass(frozen=True)
class Samples:
    """N judged prompts of the fit split, G more prompts for gate vectors, and what was captured at them.

    prompts: [N], the judged prompts.
    activations: [N, L, D], an array or `Activations`.
    confidence: [N], refusal confidence.
    inputs: inputs of each output matrix at the N prompts, then at the G others; empty if the engine cannot
        capture them.
    folder: where activations that are not one array are mapped to a file.
    gate_only: [G], prompts that were not answered, or whose answers could not be judged.
    categories: [N], rubric category of each refusal; None, or an empty list, where the judge gives none.
    contexts: [G], name of the context of each gate-only prompt; "" for none.
    model: the GGUF file of the model, for methods that read its weights; None for a Hugging Face folder.
    """

    prompts: Sequence[Prompt]
    activations: Any
    confidence: NDArray[np.float64]
    inputs: Mapping[str, MatrixInputs]
    folder: Path
    gate_only: Sequence[Prompt] = ()
    categories: Sequence[str | None] = ()
    contexts: Sequence[str] = ()
    model: Path | None = None

    @cached_property
    def rows(self) -> NDArray[Any]:
        """Return the activations as one array [N, L, D], for the projection kernel."""
        return Activations.of(self.activations).array(self.folder)

    def rows_on(self, device: Device) -> Any:
        """Return `rows`: on a GPU as a tensor, which PyTorch projects, else as the array for the kernel."""
        return self.rows if resolve_device(device).type == "cpu" else self._rows_on_gpu

    @cached_property
    def _rows_on_gpu(self) -> torch.Tensor:
        return torch.tensor(self.rows, device="cuda")

    def share(self, processes: Processes) -> Samples:
        """Return the share of the samples that this process reads."""
        if processes.count == 1:
            return self
        judged, others = processes.share(len(self.prompts)), processes.share(len(self.gate_only))
        indices = np.arange(len(self.prompts) + len(self.gate_only))
        local = np.concatenate([indices[: len(self.prompts)][judged], indices[len(self.prompts) :][others]])
        inputs = {name: rows.share(local, processes) for name, rows in self.inputs.items()}
        return replace(self.take(local), inputs=inputs)

    def take(self, indices: NDArray[np.intp]) -> Samples:
        """Return the samples at these ascending indices into the judged prompts and the others after them.

        The inputs at other tokens stay: they are not known by prompt.
        """
        judged, others = np.split(indices, [np.searchsorted(indices, len(self.prompts))])
        others = others - len(self.prompts)
        return replace(
            self,
            prompts=[self.prompts[i] for i in judged],
            activations=Activations.of(self.activations).take(judged),
            confidence=self.confidence[judged],
            inputs={name: rows.of(indices) for name, rows in self.inputs.items()},
            gate_only=[self.gate_only[i] for i in others],
            categories=[self.categories[i] for i in judged] if self.categories else (),
            contexts=[self.contexts[i] for i in others],
        )

    @cached_property
    def kinds(self) -> list[str]:
        """Return the kind [N] of each judged prompt."""
        return [prompt.kind for prompt in self.prompts]

    def labels(self, processes: Processes = ALONE) -> Labels:
        """Return the labels of all N + G samples, for gate vectors; with several `processes`, of all of them.

        Gate-only prompts have confidence 0, so they are in no class. The groups are topic, form, language and
        context.
        """
        prompts = [*self.prompts, *self.gate_only]
        confidence = np.concatenate([self.confidence, np.zeros(len(self.gate_only))])
        contexts = [""] * len(self.prompts) + [*self.contexts]
        names = [[p.topic, p.form, p.language, name] for p, name in zip(prompts, contexts, strict=True)]
        # Reshaped, so that a process without a share has four columns too.
        groups = np.array(names, dtype=np.str_).reshape(len(prompts), 4)
        return Labels.of(confidence, [prompt.kind for prompt in prompts], groups, processes=processes)

    def counts(self, kind: str) -> dict[str, int]:
        """Return how many prompts of a kind were refused, answered and neutral."""
        confidence = self.confidence[np.array([k == kind for k in self.kinds])]
        return {
            "refused": int((confidence > NEUTRAL).sum()),
            "answered": int((confidence < -NEUTRAL).sum()),
            "neutral": int((np.abs(confidence) <= NEUTRAL).sum()),
        }

    def check_classes(self, effect: str) -> None:
        """Raise `InputError` unless every class of the fit has a sample."""
        target = ("sensitive", "refused" if effect == "remove" else "answered")
        for kind, verdict in (target, ("benign", "answered"), ("harmful", "refused")):
            counts = self.counts(kind)
            if counts[verdict] == 0:
                raise InputError(
                    f"fit: none of the {sum(counts.values())} {kind} prompts was {verdict}; at least one is "
                    f"needed. Use more or other {kind} prompts (prompts.fit, prompts.{kind}), or another "
                    "model."
                )
