"""The interface of all engines, the optional abilities of each, and the steering that is put on a model.

Token lists go in; answers, next-token logits, log-probabilities or internal tensors come out.
`rs_gguf.engines.open_engine` chooses the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Flag, auto
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.generation import GREEDY, Enough, Pairs, Sampling, TokenLists, never_enough
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.prompts.template import ChatModel
from rs_gguf.records.conversation import Generation

# For each (prompt, continuation): log-probabilities [T] of the continuation in nats, and whether each token
# is the top-1 token [T].
LogProbs = Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]]


class Can(Flag):
    """Abilities that only some engines have."""

    LORA = auto()
    """The engine applies LoRA adapters in GGUF files."""
    MATRIX_INPUTS = auto()
    """The engine names and reads the inputs of the output matrices."""
    LLAMA_CPP = auto()
    """The engine loads model and files as the users' llama.cpp does, so its results hold there too."""


@dataclass(frozen=True)
class Steering:
    """Changes to a loaded model: {layer: direction [D] to add}, and LoRA adapters with their scales."""

    directions: Mapping[int, Any] = field(default_factory=dict)
    adapters: Sequence[tuple[Path, float]] = ()

    def scaled(self, factor: float) -> Steering:
        """Return the steering with every direction and scale multiplied by `factor`."""
        return Steering(
            {layer: np.float32(factor) * direction for layer, direction in self.directions.items()},
            [(path, factor * scale) for path, scale in self.adapters],
        )

    def with_added(self, other: Steering) -> Steering:
        """Return both steerings combined. Directions of the same layer add up."""
        directions = dict(self.directions)
        for layer, direction in other.directions.items():
            directions[layer] = directions[layer] + direction if layer in directions else direction
        return Steering(directions, [*self.adapters, *other.adapters])

    def check(self, n_layer: int, width: int, model: str) -> None:
        """Raise `InputError` if a direction does not fit the layers or the width of `model` (its name)."""
        for layer, direction in self.directions.items():
            if not FIRST_STEERABLE <= layer < n_layer:
                raise InputError(
                    f"layer {layer} cannot be steered: this model has steerable layers 1 to {n_layer - 1} "
                    "(llama.cpp never steers layer 0). Use a vector that was fitted on this model."
                )
            if np.shape(direction) != (width,):
                raise InputError(
                    f"layer {layer}: the direction has shape {np.shape(direction)}, but {model} has "
                    f"width {width}. Use a vector that was fitted on this model."
                )


NO_STEERING = Steering()


class Engine(ChatModel, Protocol):
    """A loaded model. Sequences are lists of tokens; the engine batches them and returns them in any order.

    Attributes:
        can: the optional abilities of the engine.
        n_parallel: the most sequences that are answered at once.
        metadata: the keys of the GGUF file; empty for PyTorch.
        n_layer, n_embd, n_vocab, n_params: layers, width, vocabulary size, parameters.
        max_length: the most tokens of a sequence, its answer included.
    """

    can: ClassVar[Can]
    n_parallel: int

    def __init__(self, path: Path, *, n_parallel: int = 32) -> None: ...

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_params(self) -> int: ...
    @property
    def max_length(self) -> int: ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None:
        """Free the weights. The engine cannot be used afterwards."""

    def token_text(self, token: int) -> str:
        """Return the literal text of one token, also of a control token."""

    def steered(self, steering: Steering) -> AbstractContextManager[None]:
        """Steer the model inside the `with` block. Afterwards the model is unsteered.

        Raises:
            InputError: a direction does not fit the model, or an adapter cannot be applied.
        """

    def check_lengths(self, sequences: Sequence[Sequence[int]], max_tokens: int = 0) -> None:
        """Raise `InputError` if a sequence and an answer of `max_tokens` together exceed `max_length`."""

    def generate(
        self, prompts: TokenLists, *, max_tokens: int, sampling: Sampling = GREEDY, drafts: TokenLists = (),
        enough: Enough = never_enough, reordered: bool = False,
    ) -> Iterator[tuple[int, Generation]]:  # fmt: skip
        """Answer `prompts`; yield (index, answer) in the order in which they finish.

        drafts: the tokens of an earlier answer to each prompt. An engine may read many of them in one step,
            and keeps those that it draws too. They change an answer only where batches of another form do.
        enough: truncates an answer before `max_tokens`.
        reordered: sum in another order, if the engine can. It rounds otherwise, so near ties may fall
            otherwise, as on another machine.

        Raises:
            InputError: a prompt is empty or too long.
        """

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, logits [V]) for the token after each prompt. The array is a view: copy to keep it."""

    def token_logprobs(self, pairs: Pairs) -> LogProbs:
        """Return log-probabilities [T] in nats and top-1 flags [T] of each (prompt, continuation)."""

    def answer_logits(self, pairs: Pairs) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield (index, step, logits [V]) that predict token `step` of the continuation of each pair.

        Every token of each continuation comes once, in any order. The array is a view: copy to keep it.

        Raises:
            InputError: a prompt or continuation is empty, or both together are too long.
        """

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
        matrices: Sequence[str] = (),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {tensor: [L, width]}) for each of `positions[index]` of each sequence.

        `l_out` is the activation (method §2); other tensors and `matrices` need `Can.MATRIX_INPUTS`. For a
        matrix such as `blk.3.ffn_down.weight`, its input [width] is yielded under its name; for
        `blk.3.ffn_down.product`, its product. The values include the steering. Layers after the deepest of
        `layers` are not computed, unless a product is read.

        Raises:
            InputError: a sequence is empty or has no position, or the model lacks a layer, tensor or matrix.
        """


def read_last(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    tensors: Sequence[str] = ("l_out",),
    matrices: Sequence[str] = (),
) -> dict[str, NDArray[np.float32]]:
    """Return {tensor: [N, L, width]} and {matrix: [N, width]} at the last token of each prompt.

    Raises as `Engine.read` does.
    """
    last = [(len(tokens) - 1,) for tokens in prompts]
    rows = {i: row for i, _, row in engine.read(prompts, last, layers, tensors, matrices)}
    return {name: np.stack([rows[i][name] for i in range(len(prompts))]) for name in rows[0]}
