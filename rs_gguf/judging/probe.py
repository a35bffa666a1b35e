"""The judge's probe: hidden states of a judged pair go in, the logit of refusal and its kind come out.

The states are those at the place of the verdict, where the model has compared reply and request, and their
mean over the reply, which tells loops and nonsense better.

A probe is a safetensors file: weights, and in its metadata what it belongs to. It is fitted in
`rs_gguf.judging.calibration`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.errors import InputError
from rs_gguf.files import sha256, write_atomic
from rs_gguf.judging.rubric import judged_text, rubric_version, wording
from rs_gguf.llama import LlamaModel

LIKELY = 0.5  # least probability at which a kind is named


def read_states(
    model: LlamaModel, pairs: Sequence[tuple[str, str]], layers: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (index, states [2, L, D]) of each pair: at the verdict's place, and the mean over the reply."""
    texts = [judged_text(model, pair) for pair in pairs]
    places = [[*reply, len(tokens) - 1] for tokens, reply in texts]
    means = {i: np.zeros((len(layers), model.n_embd), np.float32) for i in range(len(pairs))}
    sequences = [tokens for tokens, _ in texts]
    for i, place, found in model.token_activations(sequences, places, layers=layers):
        if place == places[i][-1]:
            yield i, np.stack([found["l_out"], means.pop(i)])
        else:
            means[i] += found["l_out"] / (len(places[i]) - 1)


@dataclass(frozen=True)
class Kinds:
    """Which kind a refusal is: softmax over kinds of h · weights + bias, same states as the verdict.

    `weights` is [K, 2, L, D], `bias` [K], for the K `names`.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    def of(self, states: NDArray[np.float32]) -> list[str | None]:
        """The kind of each refusal with `states` [N, 2, L, D]; None where no kind is likely enough."""
        flat = states.reshape(len(states), -1).astype(np.float64)
        logits = flat @ self.weights.reshape(len(self.names), -1).astype(np.float64).T + self.bias
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return [self.names[row.argmax()] if row.max() >= LIKELY else None for row in share]


@dataclass(frozen=True)
class Probe:
    """A calibrated linear probe: logit of refusal = h · weights + bias, h the states of `read_states`.

    It belongs to one judge model, one rubric and one wording of the judge's prompt, and is refused for
    any other. `weights` is [2, L, D] over places and `layers`.
    """

    layers: tuple[int, ...]
    weights: NDArray[np.float32]
    bias: float
    model_sha256: str
    rubric_version: int
    wording: str
    kinds: Kinds | None = None

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logit of refusal [N] for `states` [N, 2, L, D]."""
        flat = states.reshape(len(states), -1).astype(np.float64)
        return flat @ self.weights.astype(np.float64).ravel() + self.bias

    def fingerprint(self) -> str:
        """Changes with anything that a judgement depends on."""
        return hashlib.sha256(_packed(self)).hexdigest()

    def check_belongs(self, model: LlamaModel) -> None:
        """Raise `InputError` unless this probe was fitted for this model, rubric and wording."""
        actual = (sha256(model.path), rubric_version(), wording())
        if actual != (self.model_sha256, self.rubric_version, self.wording):
            raise InputError(
                f"the judge's probe belongs to model {self.model_sha256[:12]}, rubric {self.rubric_version}, "
                f"wording {self.wording}; this is {actual[0][:12]}, {actual[1]}, {actual[2]}. Fit it anew "
                "with `rs-export judge --fit-probe`."
            )


def load_probe(path: Path) -> Probe:
    """Read a probe. `InputError` if the file is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})["probe"])
            kinds = None
            if "kinds" in meta:
                weights, bias = file.get_tensor("kind_weights"), file.get_tensor("kind_bias")
                kinds = Kinds(tuple(meta["kinds"]), weights.astype(np.float32), bias.astype(np.float32))
            probe = Probe(
                layers=tuple(meta["layers"]),
                weights=file.get_tensor("weights"),
                bias=float(meta["bias"]),
                model_sha256=meta["model_sha256"],
                rubric_version=int(meta["rubric_version"]),
                wording=meta["wording"],
                kinds=kinds,
            )
        if probe.weights.ndim != 3 or probe.weights.shape[:2] != (2, len(probe.layers)):
            raise ValueError(f"weights {probe.weights.shape} for layers {probe.layers}")
        numbers = [probe.weights, np.array(probe.bias)]
        if kinds is not None:
            count = len(kinds.names)
            if kinds.weights.shape != (count, *probe.weights.shape) or kinds.bias.shape != (count,):
                raise ValueError(f"weights {kinds.weights.shape} for {count} kinds")
            numbers += [kinds.weights, kinds.bias]
        if not all(np.isfinite(number).all() for number in numbers):
            raise ValueError("weights or bias are not finite")
        return probe
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a judge probe ({error}).") from error


def save_probe(probe: Probe, path: Path) -> None:
    """Write a probe as safetensors. The kinds' weights are kept in half precision."""
    data = _packed(probe)
    write_atomic(path, lambda file: file.write(data))


def _packed(probe: Probe) -> bytes:
    from safetensors.numpy import save

    meta: dict[str, Any] = {
        "layers": list(probe.layers),
        "bias": probe.bias,
        "model_sha256": probe.model_sha256,
        "rubric_version": probe.rubric_version,
        "wording": probe.wording,
    }
    tensors = {"weights": probe.weights}
    if probe.kinds is not None:
        meta["kinds"] = list(probe.kinds.names)
        tensors["kind_weights"] = probe.kinds.weights.astype(np.float16)
        tensors["kind_bias"] = probe.kinds.bias
    return save(tensors, metadata={"probe": json.dumps(meta)})
