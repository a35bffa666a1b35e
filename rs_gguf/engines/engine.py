"""What runs a model: the one interface of all engines, what each of them can do, and what is put on a model.

Token lists go in; answers, next-token logits, log-probabilities or what is computed on the way come out.
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

from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.prompts.template import ChatModel
from rs_gguf.records.conversation import Generation

# Of each (prompt, continuation): log-probabilities [T] of the continuation, and which tokens are top-1 [T].
LogProbs = Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]]


class Can(Flag):
    """What not every engine does."""

    LORA = auto()
    """It applies LoRA adapters in GGUF files."""
    MATRIX_INPUTS = auto()
    """It reads what the matrices multiply that write to the residual stream, and names them."""
    LLAMA_CPP = auto()
    """It loads model and files as the users' llama.cpp does, so that what it shows holds there too."""


@dataclass(frozen=True)
class Steering:
    """What is put on the model: directions added to blocks, and LoRA adapters with their scales."""

    directions: Mapping[int, Any] = field(default_factory=dict)
    adapters: Sequence[tuple[Path, float]] = ()

    def scaled(self, factor: float) -> Steering:
        """The same steering, every scale times `factor`."""
        return Steering(
            {layer: np.float32(factor) * direction for layer, direction in self.directions.items()},
            [(path, factor * scale) for path, scale in self.adapters],
        )

    def with_added(self, other: Steering) -> Steering:
        """Return both together: directions of a layer add up."""
        directions = dict(self.directions)
        for layer, direction in other.directions.items():
            directions[layer] = directions[layer] + direction if layer in directions else direction
        return Steering(directions, [*self.adapters, *other.adapters])

    def check(self, n_layer: int, width: int, model: str) -> None:
        """Raise `InputError` for a direction of a layer or a width that the model of this name lacks."""
        for layer, direction in self.directions.items():
            if not FIRST_STEERABLE <= layer < n_layer:
                raise InputError(
                    f"layer {layer} cannot be steered: this model has blocks 1 to {n_layer - 1} "
                    "(llama.cpp never steers block 0)."
                )
            if np.shape(direction) != (width,):
                raise InputError(
                    f"layer {layer}: direction of shape {np.shape(direction)}, but {model} has "
                    f"width {width}. The vector belongs to another model."
                )


NO_STEERING = Steering()


class Engine(ChatModel, Protocol):
    """A loaded model. Sequences are lists of tokens; many are worked on at once, in any order.

    `max_length`: the most tokens of a sequence, its answer included. `metadata`: the keys of a GGUF file that
    llama.cpp loaded; another engine has none.
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
        """Let go of the weights. The object is of no use afterwards."""

    def token_text(self, token: int) -> str:
        """The literal text of one token, special ones included."""

    def steered(self, steering: Steering) -> AbstractContextManager[None]:
        """Within the block, the steering is on the model; after it, none is.

        Raises:
            InputError: a direction that the model has no place for, or an adapter that cannot be applied.
        """

    def check_lengths(self, sequences: Sequence[Sequence[int]], max_tokens: int = 0) -> None:
        """Raise `InputError` if a sequence and an answer of `max_tokens` do not fit `max_length`."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, Generation]]:
        """Answer `prompts`; yield (index, answer) in the order they finish.

        Raises:
            InputError: an empty prompt, or one that is too long.
        """

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, logits [V]) of the token after each prompt. The array is a view: copy to keep it."""

    def token_logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> LogProbs:
        """For each (prompt, continuation): log-probabilities [T] of its tokens, and which are top-1 [T]."""

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {tensor: [L, width]}) for each of `positions[index]` of each sequence.

        `l_out` is the output of a block (method §2); others take `Can.MATRIX_INPUTS`. Steering is included in what
        is read. Blocks after the deepest of `layers` are not computed.

        Raises:
            InputError: an empty sequence, no position, a layer that the model does not have, or a tensor that
                cannot be read.
        """

    def graph_tensors(self) -> Sequence[str]:
        """Names of all tensors that can be read, such as `l_out-3`, in the order of evaluation."""


def read_last(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    tensors: Sequence[str] = ("l_out",),
) -> dict[str, NDArray[np.float32]]:
    """Return {tensor: [N, L, width]} at the last token of each prompt; errors as in `read`."""
    last = [(len(tokens) - 1,) for tokens in prompts]
    found = {i: rows for i, _, rows in engine.read(prompts, last, layers, tensors)}
    return {name: np.stack([found[i][name] for i in range(len(prompts))]) for name in tensors}
