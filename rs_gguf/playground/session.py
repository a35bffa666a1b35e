"""What answers on the page: a loaded model, or a running llama-server, unsteered and steered at once.

A prompt and a scale factor go in. Both answers, as far as they have come, and the gate activations of the
prompt come out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Steering
from rs_gguf.evaluation.gate_activation import activations_by_matrix
from rs_gguf.prompts.grid import grid, of_each_kind
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.rows import read_rows
from rs_gguf.steering import file as steering_file

if TYPE_CHECKING:
    from rs_gguf.engines.generation import Asking
    from rs_gguf.engines.llama.model import LlamaModel
    from rs_gguf.engines.server.llama_server import LlamaServer

_EXAMPLES = 12  # prompts of each kind that are offered

Answers = Generator[tuple[str, str], None, None]  # (unsteered, steered), as far as they have come


@dataclass(frozen=True)
class GateReading:
    """Gate activation of a prompt: by token, as (text, mean), and the mean by layer at the last token."""

    tokens: Sequence[tuple[str, float]]
    layers: Mapping[int, float]


class Session(Protocol):
    """A model that answers the page's prompts. `name` is what the page calls it."""

    @property
    def name(self) -> str: ...

    def answers(self, prompt: str, factor: float) -> Answers:
        """Yield both answers whenever one grows. `factor` multiplies every scale of the steered one.

        Raises:
            InputError: the prompt cannot be answered.
        """

    def gates(self, prompt: str, factor: float) -> GateReading | None:
        """Return the gate activations of a prompt; None if there are no gates, or they cannot be read."""


class LoadedModel:
    """A `Session` of a model in this process. Close it before the model.

    Args:
        model: the loaded model.
        files: steering files with their scales.
        asking: system prompt, most tokens of an answer, sampling.

    Raises:
        InputError: a file is not one that llama.cpp accepts.
    """

    def __init__(self, model: LlamaModel, files: Sequence[tuple[Path, float]], asking: Asking) -> None:
        self.name = model.path.name
        self._model, self._asking = model, asking
        self._steering, self._gates = NO_STEERING, dict[str, NDArray[np.float32]]()
        # Held while llama.cpp computes: the page does so in threads of its own, which Ctrl-C does not stop.
        self._computing, self._closed = Lock(), False
        self._streams = contextlib.ExitStack()  # of the last answers
        for path, scale in files:
            content = steering_file.read(path)
            self._steering = self._steering.with_added(content.steering(path, scale))
            self._gates |= content.gates

    def close(self) -> None:
        """End what is running, so that the model can be closed. There are no answers afterwards."""
        self._closed = True
        with self._computing:
            self._streams.close()

    def answers(self, prompt: str, factor: float) -> Answers:
        """Yield both answers, a token of each at a time."""
        with self._computing:
            if self._closed:
                return
            (tokens,) = chat_tokens(self._model, [Prompt(prompt, "sensitive")], self._asking.system)
            self._streams = streams = contextlib.ExitStack()
            unsteered, steered = (
                streams.enter_context(contextlib.closing(self._texts(tokens, steering)))
                for steering in (NO_STEERING, self._steering.scaled(factor))
            )
        texts = side_by_side(unsteered, steered)
        try:
            while (both := self._next(texts)) is not None:
                yield both
        finally:
            with self._computing:
                streams.close()

    def _next(self, texts: Answers) -> tuple[str, str] | None:
        with self._computing:
            return None if self._closed else next(texts, None)

    def _texts(self, prompt: Sequence[int], steering: Steering) -> Generator[str, None, None]:
        tokens: list[int] = []
        asking = self._asking
        stream = self._model.stream(prompt, steering, max_tokens=asking.max_tokens, sampling=asking.sampling)
        for token in stream:
            tokens.append(token)
            # A character of several tokens is unfinished until its last one.
            yield self._model.detokenize(tokens).rstrip("\N{REPLACEMENT CHARACTER}")

    def gates(self, prompt: str, factor: float) -> GateReading | None:
        """Return the gate activations of a prompt with the files in force; None without gates."""
        with self._computing:
            return self._read_gates(prompt, factor) if self._gates and not self._closed else None

    def _read_gates(self, prompt: str, factor: float) -> GateReading:
        (tokens,) = chat_tokens(self._model, [Prompt(prompt, "sensitive")], self._asking.system)
        by_position: dict[int, dict[str, float]] = {}
        with self._model.steered(self._steering.scaled(factor)):
            readings = activations_by_matrix(self._model, self._gates, [tokens], [range(len(tokens))])
            for _, position, by_matrix in readings:
                by_position[position] = by_matrix
        last = by_position[len(tokens) - 1]
        layers = sorted({_layer(name) for name in last})
        return GateReading(
            [
                (self._model.token_text(token), float(np.mean(list(by_position[k].values()))))
                for k, token in enumerate(tokens)
            ],
            {
                layer: float(np.mean([value for name, value in last.items() if _layer(name) == layer]))
                for layer in layers
            },
        )


class ServedModel:
    """A `Session` of a running llama-server, which has loaded the adapters. It shows no gate activations."""

    def __init__(self, server: LlamaServer, asking: Asking) -> None:
        self.name = server.name
        self._server, self._asking = server, asking

    def answers(self, prompt: str, factor: float) -> Answers:
        """Yield both answers. The server makes them at the same time if it has two slots."""
        asked = Prompt(prompt, "sensitive")
        yield from side_by_side(*(self._server.stream(asked, scale, self._asking) for scale in (0.0, factor)))

    def gates(self, prompt: str, factor: float) -> GateReading | None:
        """Return None: a server does not show the inputs of its matrices."""


def side_by_side(unsteered: Iterator[str], steered: Iterator[str]) -> Answers:
    """Yield the latest text of both, each time that one has grown. Advance both in turns."""
    texts, running = ["", ""], {0: unsteered, 1: steered}
    while running:
        for side, stream in list(running.items()):
            text = next(stream, None)
            if text is None:
                del running[side]
            else:
                texts[side] = text
                yield texts[0], texts[1]


def examples(files: Sequence[Path]) -> list[Prompt]:
    """Return prompts to offer: of a run folder that holds one of the files, else the project's own ones."""
    for file in files:
        answers = file.parent / "test_answers.jsonl"
        if answers.is_file():
            prompts = [Prompt(row["prompt"], row["kind"]) for row in read_rows(answers)]
            break
    else:
        prompts = [prompt for prompt in grid() if prompt.split == "validation"]
    return [*chain.from_iterable(of_each_kind(prompts, _EXAMPLES, seed=0).values())]


def _layer(matrix: str) -> int:
    return int(matrix.split(".")[1])
