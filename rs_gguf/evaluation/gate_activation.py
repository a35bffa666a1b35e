"""Gate activation with the file in force: how far each kind of prompt opens the gates of an adapter.

A model, a steering, its gate vectors and conversations go in. The mean over the changed matrices of aᵀx
comes out, at the last prompt token and over the first tokens of the steered answer. The fit gives the mean
sensitive prompt an activation of 1. Minimal pairs show whether the gates read more than single words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rs_gguf.activations.matrix_inputs import InputReader
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.evaluation.paired_statistics import clusters_of, rate_interval
from rs_gguf.prompts.grid import of_each_kind
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.metrics import GateActivation, MinimalPairs, Share

_PROMPTS = 32  # of each kind
_TOKENS = 16  # of an answer

Gates = Mapping[str, NDArray[np.float32]]  # gate vectors [W] by the name of their matrix


def gate_activation_by_kind(
    model: Engine,
    steering: Steering,
    gates: Gates,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    system: str | None,
    *,
    seed: int = 0,
) -> dict[str, GateActivation] | None:
    """Return the mean gate activation by kind of prompt; None without gates.

    answers: what the steered model answered to the `prompts`.
    """
    if not gates:
        return None
    tokens = {prompt.id: answer.tokens for prompt, answer in zip(prompts, answers, strict=True)}
    found: dict[str, GateActivation] = {}
    for kind, members in of_each_kind(prompts, _PROMPTS, seed=seed).items():
        pairs = zip(chat_tokens(model, members, system), (tokens[p.id] for p in members), strict=True)
        at_prompt, in_answer = gate_activations(model, steering, gates, list(pairs)).T
        found[kind] = GateActivation(prompt=_mean(at_prompt), answer=_mean(in_answer))
    return found


def minimal_pairs(
    model: Engine, steering: Steering, gates: Gates, prompts: Sequence[Prompt], system: str | None
) -> MinimalPairs | None:
    """Return how well the gates separate the minimal pairs among `prompts`, at the last prompt token.

    A pair is a sensitive and a harmful prompt of the same `pair`. None without gates or pairs.
    """
    harmful = {prompt.pair: prompt for prompt in prompts if prompt.kind == "harmful" and prompt.pair}
    pairs = [(p, harmful[p.pair]) for p in prompts if p.kind == "sensitive" and p.pair in harmful]
    if not gates or not pairs:
        return None
    tokens = chat_tokens(model, [prompt for pair in pairs for prompt in pair], system)
    at_prompt = gate_activations(model, steering, gates, [(one, []) for one in tokens])[:, 0]
    return separation([prompt for prompt, _ in pairs], at_prompt.reshape(-1, 2))


def separation(sensitive: Sequence[Prompt], activations: NDArray[np.float64]) -> MinimalPairs:
    """Return how well `activations` [P, 2] of sensitive prompts and their harmful twins are separated."""
    ours, theirs = activations.T
    hits = ours > theirs
    return MinimalPairs(
        separated=Share(
            n=int(hits.sum()),
            of=len(hits),
            ci95=rate_interval(hits, np.ones_like(hits), clusters_of(sensitive)),
        ),
        # The share of all (sensitive, harmful) combinations in the right order; a tie counts half.
        auroc=float((1 + np.sign(np.subtract.outer(ours, theirs))).mean() / 2),
    )


def gate_activations(
    model: Engine,
    steering: Steering,
    gates: Gates,
    conversations: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> NDArray[np.float64]:
    """Return the gate activation [N, 2] of each (prompt, answer): at the last prompt token, in the answer.

    The second is the mean over the first tokens of the answer; NaN without a token.
    """
    sequences = [[*prompt, *answer[:_TOKENS]] for prompt, answer in conversations]
    positions = [
        range(len(prompt) - 1, len(sequence))
        for (prompt, _), sequence in zip(conversations, sequences, strict=True)
    ]
    values: list[dict[int, float]] = [{} for _ in conversations]
    with model.steered(steering):
        for i, position, by_matrix in activations_by_matrix(model, gates, sequences, positions):
            values[i][position] = float(np.mean(list(by_matrix.values())))
    pairs = [
        (value[p.start], _mean([value[k] for k in p[1:]])) for value, p in zip(values, positions, strict=True)
    ]
    return np.reshape(np.array(pairs, np.float64), (-1, 2))


def activations_by_matrix(
    model: Engine,
    gates: Gates,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Yield (index, position, {matrix: aᵀx}) for each of `positions[index]`, under the steering in force."""
    for i, position, inputs in InputReader(model).read(sequences, positions, list(gates)):
        yield i, position, {name: float(a.astype(np.float64) @ inputs[name]) for name, a in gates.items()}


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the mean of the values that are not NaN; NaN without one."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")
