"""What a fit reads from the model: block outputs and the inputs of the matrices that write to the residual.

A model, conversations with their answers and the model's own chat prefix go in; arrays by name come out, for
the shards of an `ActivationStore`: `activations` [n, L, D] at the last prompt token (method §2) and, for the
gated adapter, `<matrix>/last` [n, L, W] there, `<matrix>/prompts` and `<matrix>/answers` [·, L, W] at other
tokens, for which no gate should open. One forward pass a conversation serves all. Processes can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.activations.store import ActivationStore
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Can, Engine, read_last
from rs_gguf.engines.generation import common_prefix
from rs_gguf.errors import InputError
from rs_gguf.machine import ALONE, Processes
from rs_gguf.models import dimensions
from rs_gguf.models.architecture import matrix_input_tensors, product_scale
from rs_gguf.prompts.contexts import Context
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import Prompt

Arrays = dict[str, NDArray[Any]]

SHARD = 64  # prompts whose activations are lost at most when a capture is killed
_CONSTANT = "constant"  # the shard of what the chat template puts before every prompt
ANSWER_TOKENS = 4  # that are read of one answer: neighbours say much the same
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Conversation:
    """A prompt as tokens and what the model answered; `gate_stays_closed`: the gate must not open in the answer."""

    prompt: Sequence[int]
    answer: Sequence[int]
    gate_stays_closed: bool


def conversations(
    model: Engine,
    asked: Sequence[Prompt],
    system: str | None,
    answers: Mapping[str, Sequence[int]],
    refused: Collection[str],
    others: Sequence[tuple[Prompt, Context]],
) -> tuple[list[Conversation], int]:
    """What is read of the prompts `asked`, then of the `others`, which were not answered.

    `answers` are tokens by the prompt's id, and `refused` ids. The second value is the number of tokens that
    all of `asked` begin with.
    """
    tokens, chat = chat_tokens(model, asked, system), ChatFormat.of(model)
    found = [
        Conversation(prompt, answers[p.id], gate_stays_closed=p.kind != "sensitive" or p.id not in refused)
        for p, prompt in zip(asked, tokens, strict=True)
    ]
    found += [
        Conversation(c.tokens(chat, model, p.prompt, system), [], gate_stays_closed=True) for p, c in others
    ]
    return found, common_prefix(tokens)


def capture_all(
    model: Engine,
    ids: Sequence[str],
    conversations: Sequence[Conversation],
    prefix: int,
    store: ActivationStore,
    *,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Read what the store does not hold yet of the prompts `ids` and their conversations, shard by shard.

    `processes` (torchrun) take turns with the shards of one store, each with a model of its own; all of it is
    there when this returns on any of them. `advance` counts the prompts of this one. What the store's folder
    holds under another key is deleted.

    Raises:
        InputError: the folder cannot be written, or the disk is full; what was captured is kept.
    """
    store.begin()
    for start in range(processes.rank * SHARD, len(ids), processes.count * SHARD):
        part = slice(start, start + SHARD)
        if not store.holds(_shard_of(start), ids[part]):
            store.append(_shard_of(start), ids[part], capture(model, conversations[part], prefix, seed=start))
        advance(len(ids[part]))
    if processes.rank == 0 and Can.MATRIX_INPUTS in model.can and not store.holds(_CONSTANT, []):
        store.append(_CONSTANT, [], capture_constant(model, conversations[0].prompt, prefix))
    processes.gather(None)  # waits for the others


def captured(
    store: ActivationStore, count: int, *, inputs: bool
) -> tuple[Activations, dict[str, MatrixInputs]]:
    """Return block outputs of `count` prompts and, if asked for, the matrices' inputs, from the store.

    Raises:
        DamagedStoreError: a shard is missing or was changed, or all are of another key.
    """
    shards = store.read([_shard_of(start) for start in range(0, count, SHARD)])
    constant: dict[str, Activations] = {}
    if inputs:
        constant = {name: Activations([part]) for name, part in store.read([_CONSTANT])[0].items()}
    return Activations([shard["activations"] for shard in shards]), output_matrices_of(shards, constant)


def _shard_of(start: int) -> str:
    """Name of the shard that begins with prompt number `start`."""
    return f"{start // SHARD:05d}"


def capture(model: Engine, conversations: Sequence[Conversation], prefix: int, *, seed: int) -> Arrays:
    """Read one shard. `prefix` is the number of tokens that `conversations` counts.

    An engine that cannot read the inputs of matrices (PyTorch) gives block outputs alone.

    Raises:
        InputError: an architecture whose block outputs are no residual stream that can be read.
    """
    layers = range(model.n_layer)
    if Can.MATRIX_INPUTS not in model.can:
        return {"activations": read_last(model, [c.prompt for c in conversations], layers)["l_out"]}
    writers = _writers(model)
    sequences, positions = [], []
    for number, conversation in enumerate(conversations):
        sequence, places = _places(conversation, prefix, np.random.default_rng((seed, number)))
        sequences.append(sequence)
        positions.append(places)
    last: dict[int, dict[str, NDArray[np.float32]]] = {}
    others: dict[str, list[dict[str, NDArray[np.float32]]]] = {"prompts": [], "answers": []}
    tensors = ("l_out", *writers.values())
    for i, position, found in model.read(sequences, positions, layers, tensors):
        beyond = position - (len(conversations[i].prompt) - 1)
        if beyond == 0:
            last[i] = found
        else:
            del found["l_out"]
            others["answers" if beyond > 0 else "prompts"].append(found)
    samples = [last[i] for i in range(len(conversations))]
    scale = _product_scale(model)
    arrays: Arrays = {"activations": np.stack([found["l_out"] for found in samples])}
    for writer, name in writers.items():
        here = np.stack([found[name] for found in samples])
        arrays[f"{writer}/last"] = _compact(here * scale)
        for sort, tokens in others.items():
            rows = np.reshape([found.pop(name) for found in tokens], (-1, *here.shape[1:]))
            arrays[f"{writer}/{sort}"] = _compact(rows * scale)
    return arrays


def capture_constant(model: Engine, prompt: Sequence[int], prefix: int) -> Arrays:
    """`<matrix>/constant` [T, L, W] at the T tokens that the chat template puts before every prompt."""
    writers = _writers(model)
    if not writers:
        return {}
    places = range(max(prefix, 1))  # one for the shape, where the template puts nothing
    read = model.read([prompt[: len(places)]], [places], range(model.n_layer), tuple(writers.values()))
    rows, scale = [found for _, _, found in read], _product_scale(model)
    return {
        f"{writer}/constant": np.stack([r[name] for r in rows])[:prefix] * scale
        for writer, name in writers.items()
    }


def _product_scale(model: Engine) -> np.float32:
    return np.float32(product_scale(model.architecture, model.n_layer, model.metadata))


def _writers(model: Engine) -> dict[str, str]:
    """The writing matrices that every block has, of the same width, and what they multiply."""
    names, alike = model.graph_tensors(), dimensions.of_gguf(model.path).writers
    try:
        found = [matrix_input_tensors(names, layer) for layer in range(model.n_layer)]
    except InputError:  # a block without any: control vectors are left
        return {}
    return {
        writer: name
        for writer, name in found[0].items()
        if writer in alike and all(f.get(writer) == name for f in found)
    }


def output_matrices_of(
    shards: Sequence[Mapping[str, Any]], constant: Mapping[str, Any]
) -> dict[str, MatrixInputs]:
    """The matrices' inputs of all shards, in the order of the samples and not read yet."""
    writers = [name.removesuffix("/constant") for name in constant]
    return {
        writer: MatrixInputs(
            last_token=Activations([shard[f"{writer}/last"] for shard in shards]),
            prompt_tokens=Activations([shard[f"{writer}/prompts"] for shard in shards]),
            answer_tokens=Activations([shard[f"{writer}/answers"] for shard in shards]),
            template_tokens=constant[f"{writer}/constant"],
        )
        for writer in writers
    }


def _places(conversation: Conversation, prefix: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """The tokens to run and the positions to read: the prompt's last, one before it, some of the answer."""
    end = len(conversation.prompt) - 1
    places = [end]
    if end > prefix:
        places.append(int(rng.integers(prefix, end)))
    sequence = [*conversation.prompt, *conversation.answer]
    if conversation.gate_stays_closed:
        count = min(ANSWER_TOKENS, len(conversation.answer))
        places += (end + 1 + rng.choice(len(conversation.answer), count, replace=False)).tolist()
    return sequence[: max(places) + 1], sorted(places)


def _compact(rows: NDArray[np.float32]) -> NDArray[Any]:
    """F16 where its range allows: half the memory, and 3 digits are plenty for a mean over samples."""
    return rows.astype(np.float16) if np.abs(rows).max(initial=0.0) < _LARGEST_F16 else rows
