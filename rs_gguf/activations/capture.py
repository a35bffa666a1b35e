"""Read from the model what a fit needs: activations, and the inputs of the output matrices.

Takes a model and conversations with their answers. Writes arrays by name to the shards of an
`ActivationStore`: `activations` [n, L, D] at the last prompt token (method §2). For the gated adapter also
`<matrix>/last` [n, M, W] at the same token, and `<matrix>/prompts` and `<matrix>/answers` [·, M, W] at other
tokens, where the gate must stay closed. M are the layers that have the matrix. Each conversation takes one
forward pass; what neighbours of one context begin with is read once. Several processes can share the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.activations import Activations, MatrixInputs
from rs_gguf.activations.matrix_inputs import InputReader, Inputs, Matrices
from rs_gguf.activations.store import ActivationStore
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Can, Engine, read_last
from rs_gguf.engines.generation import common_prefix
from rs_gguf.machine import ALONE, Processes
from rs_gguf.prompts.contexts import Context
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import Prompt

Arrays = dict[str, NDArray[Any]]

SHARD = 64  # prompts per shard; a killed capture loses at most one shard
_TEMPLATE_SHARD = "constant"  # the shard of the tokens that the chat template puts before every prompt
ANSWER_TOKENS = 4  # tokens to read per answer; neighbouring tokens are similar
_MAX_F16 = 65504.0


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answer, as tokens.

    `gate_stays_closed`: the gate must stay closed in the answer. `context`: the name of what is around the
    prompt.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    gate_stays_closed: bool
    context: str = ""


def conversations(
    model: Engine,
    prompts: Sequence[Prompt],
    system: str | None,
    answers: Mapping[str, Sequence[int]],
    refused: Collection[str],
    gate_only: Sequence[tuple[Prompt, Context]],
) -> tuple[list[Conversation], int]:
    """Return the conversations of answered prompts, then of gate-only prompts, which have no answers.

    `answers`: tokens by prompt id. `refused`: ids of refused prompts. The second value is the number of
    tokens that all `prompts` begin with.
    """
    tokens, chat = chat_tokens(model, prompts, system), ChatFormat.of(model)
    answered = [
        Conversation(prompt, answers[p.id], gate_stays_closed=p.kind != "sensitive" or p.id not in refused)
        for p, prompt in zip(prompts, tokens, strict=True)
    ]
    unanswered = [
        Conversation(c.tokens(chat, model, p.prompt, system), [], gate_stays_closed=True, context=c.name)
        for p, c in gate_only
    ]
    return answered + unanswered, common_prefix(tokens)


def capture_all(
    model: Engine,
    ids: Sequence[str],
    conversations: Sequence[Conversation],
    prefix: int,
    store: ActivationStore,
    *,
    matrices: Matrices | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Read all conversations that the store does not hold yet, shard by shard. `ids`: their prompts.

    `prefix`: the number of tokens that all prompts begin with. `matrices`: the layers of each output matrix
    whose inputs are read; by default, all. `processes` (torchrun) share the shards of
    one store, each with its own model; when this returns in one of them, all shards are complete. `advance`
    counts the prompts of this process. Shards of another key in the store's folder are deleted.

    Raises:
        InputError: the folder cannot be written, or the disk is full. Complete shards stay.
    """
    store.begin()
    for start in range(processes.rank * SHARD, len(ids), processes.count * SHARD):
        part = slice(start, start + SHARD)
        if not store.holds(_shard_of(start), ids[part]):
            arrays = capture(model, conversations[part], prefix, seed=start, matrices=matrices)
            store.append(_shard_of(start), ids[part], arrays)
        advance(len(ids[part]))
    if processes.rank == 0 and Can.MATRIX_INPUTS in model.can and not store.holds(_TEMPLATE_SHARD, []):
        arrays = capture_template_tokens(model, conversations[0].prompt, prefix, matrices)
        store.append(_TEMPLATE_SHARD, [], arrays)
    processes.gather(None)  # Wait for the other processes.


def captured(
    store: ActivationStore, count: int, *, inputs: bool, matrices: Matrices | None = None
) -> tuple[Activations, dict[str, MatrixInputs]]:
    """Return the activations of `count` prompts from the store, and with `inputs` the matrices' inputs too.

    `matrices`: the layers of each that were read (`capture_all`).

    Raises:
        DamagedStoreError: a shard is missing or was changed, or the store has another key.
    """
    shards = store.read([_shard_of(start) for start in range(0, count, SHARD)])
    template = store.read([_TEMPLATE_SHARD])[0] if inputs else {}
    activations = Activations([shard["activations"] for shard in shards])
    return activations, join_matrix_inputs(shards, template, matrices)


def _shard_of(start: int) -> str:
    """Return the name of the shard that begins with prompt number `start`."""
    return f"{start // SHARD:05d}"


def capture(
    model: Engine,
    conversations: Sequence[Conversation],
    prefix: int,
    *,
    seed: int,
    matrices: Matrices | None = None,
) -> Arrays:
    """Return the arrays of one shard. `prefix`, `matrices`: as for `capture_all`.

    An engine that cannot read the inputs of matrices (PyTorch) gives `activations` alone.

    Raises:
        InputError: the architecture has no single residual stream after its layers.
    """
    layers = range(model.n_layer)
    if Can.MATRIX_INPUTS not in model.can:
        return {"activations": _compact(read_last(model, [c.prompt for c in conversations], layers)["l_out"])}
    reader = InputReader(model, matrices)
    sequences, positions = [], []
    for number, conversation in enumerate(conversations):
        sequence, places = _positions(conversation, prefix, np.random.default_rng((seed, number)))
        sequences.append(sequence)
        positions.append(places)
    last: dict[int, dict[str, NDArray[np.float32]]] = {}
    others: dict[str, list[dict[str, NDArray[np.float32]]]] = {"prompts": [], "answers": []}
    contexts = [conversation.context for conversation in conversations]
    for i, position, rows in _read(reader, sequences, positions, contexts, layers):
        distance = position - (len(conversations[i].prompt) - 1)
        if distance == 0:
            last[i] = rows
        else:
            del rows["l_out"]
            others["answers" if distance > 0 else "prompts"].append(rows)
    samples = [last[i] for i in range(len(conversations))]
    arrays: Arrays = {"activations": _compact(np.stack([rows["l_out"] for rows in samples]))}
    for matrix, names in reader.groups.items():
        last_inputs = np.stack([[rows[name] for name in names] for rows in samples])
        arrays[f"{matrix}/last"] = _compact(last_inputs)
        for sort, tokens in others.items():
            other_inputs = [[rows.pop(name) for name in names] for rows in tokens]
            arrays[f"{matrix}/{sort}"] = _compact(np.reshape(other_inputs, (-1, *last_inputs.shape[1:])))
    return arrays


def _read(
    reader: InputReader,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    contexts: Sequence[str],
    layers: Sequence[int],
) -> Iterator[tuple[int, int, Inputs]]:
    """Yield as `InputReader.read` does. What neighbours of one context begin with is read once."""
    for _, group in itertools.groupby(range(len(sequences)), key=lambda i: contexts[i]):
        members = list(group)
        shared = common_prefix([sequences[i] for i in members])
        early = sorted({p for i in members for p in positions[i] if p < shared})
        if early:
            prefix = sequences[members[0]][:shared]
            for _, position, rows in reader.read([prefix], [early], reader.names, layers):
                yield from ((i, position, dict(rows)) for i in members if position in positions[i])
        late = {i: own for i in members if (own := [p for p in positions[i] if p >= shared])}
        numbers = list(late)
        for k, position, rows in reader.read(
            [sequences[i] for i in numbers], list(late.values()), reader.names, layers
        ):
            yield numbers[k], position, rows


def capture_template_tokens(
    model: Engine, prompt: Sequence[int], prefix: int, matrices: Matrices | None = None
) -> Arrays:
    """Return `<matrix>/constant` [T, M, W] at the T tokens that the template puts before every prompt."""
    reader = InputReader(model, matrices)
    if not reader.groups:
        return {}
    positions = range(max(prefix, 1))  # If the template puts nothing there, read one token for the shape.
    reads = reader.read([prompt[: len(positions)]], [positions], reader.names)
    tokens = [rows for _, _, rows in reads]
    return {
        f"{matrix}/constant": np.stack([[rows[name] for name in names] for rows in tokens])[:prefix]
        for matrix, names in reader.groups.items()
    }


def join_matrix_inputs(
    shards: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    matrices: Matrices | None = None,
) -> dict[str, MatrixInputs]:
    """Return the inputs of each output matrix from all shards, in the order of the samples. Read nothing.

    `template`: the arrays of `capture_template_tokens`. `matrices`: as for `captured`.
    """
    parts = {name.removesuffix("/constant"): array for name, array in template.items()}

    def joined(matrix: str, sort: str) -> Activations:
        rows = [shard[f"{matrix}/{sort}"] for shard in shards] if sort else [parts[matrix]]
        return Activations(rows, layers=(matrices or {}).get(matrix))

    return {
        matrix: MatrixInputs(*(joined(matrix, sort) for sort in ("last", "prompts", "answers", "")))
        for matrix in parts
    }


def _positions(
    conversation: Conversation, prefix: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return the tokens to run and the positions to read.

    Read the last prompt token, one random token before it and, if the gate stays closed, random answer
    tokens.
    """
    end = len(conversation.prompt) - 1
    positions = [end]
    if end > prefix:
        positions.append(int(rng.integers(prefix, end)))
    sequence = [*conversation.prompt, *conversation.answer]
    if conversation.gate_stays_closed:
        count = min(ANSWER_TOKENS, len(conversation.answer))
        positions += (end + 1 + rng.choice(len(conversation.answer), count, replace=False)).tolist()
    return sequence[: max(positions) + 1], sorted(positions)


def _compact(rows: NDArray[np.float32]) -> NDArray[Any]:
    """Return the rows as F16 if they fit its range: half the memory, and 3 digits suffice for a mean."""
    return rows.astype(np.float16) if np.abs(rows).max(initial=0.0) < _MAX_F16 else rows
