"""The judge's probe: hidden states of a judged pair go in, the logit of refusal and a category come out.

The states are taken at the verdict's position, where the model has compared reply and request. Their mean
over the reply is used too, because it detects loops and nonsense better.

A probe is a safetensors file with weights. Its metadata name the model, rubric and wording that it belongs
to. `rs_gguf.judges.calibration` fits it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError
from rs_gguf.judges.rubric import judged_text, rubric_version, wording
from rs_gguf.models.resolve import fingerprint
from rs_gguf.records.files import write_atomic

LIKELY = 0.5  # the least probability at which a category is given


def read_states(
    model: Engine, pairs: Sequence[tuple[str, str]], layers: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (index, states [2, L, D]) of each pair: at the verdict's position, and mean over the reply."""
    texts = [judged_text(model, pair) for pair in pairs]
    positions = [[*reply, len(tokens) - 1] for tokens, reply in texts]
    means = {i: np.zeros((len(layers), model.n_embd), np.float32) for i in range(len(pairs))}
    sequences = [tokens for tokens, _ in texts]
    for i, position, tensors in model.read(sequences, positions, layers):
        if position == positions[i][-1]:
            yield i, np.stack([tensors["l_out"], means.pop(i)])
        else:
            means[i] += tensors["l_out"] / (len(positions[i]) - 1)


@dataclass(frozen=True)
class Components:
    """R principal components of hidden states.

    `mean`, `scale` and each of the R orthonormal rows of `basis` [R, …] have the shape of one pair's states.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    basis: NDArray[np.float16]

    def of(self, states: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the coordinates [N, R] of states [N, …]."""
        scaled = (states.astype(np.float64) - self.mean) / self.scale
        return np.asarray(scaled.reshape(len(states), -1) @ self._basis.T)

    @cached_property
    def _basis(self) -> NDArray[np.float64]:
        return self.basis.reshape(len(self.basis), -1).astype(np.float64)


@dataclass(frozen=True)
class Categories:
    """A classifier of refusals: softmax(weights · z + bias), where z [R] are coordinates of states.

    `weights` [K, R] and `bias` [K] belong to the K categories in `names`.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    def of(self, coordinates: NDArray[np.float64]) -> list[str | None]:
        """Return the category for each row of coordinates [N, R]; None if none reaches `LIKELY`."""
        from scipy.special import softmax

        shares = softmax(coordinates @ self.weights.astype(np.float64).T + self.bias, axis=1)
        return [self.names[row.argmax()] if row.max() >= LIKELY else None for row in shares]


@dataclass(frozen=True)
class Probe:
    """A calibrated kernel probe: logit of refusal = Σ_s dual_s · exp(−γ |z − centre_s|²) + bias.

    z [R] are the coordinates of the states of `read_states`; `centres` is [S, R] and `dual` [S]. A probe
    belongs to one judge model, one rubric and one wording of the judge's prompt. `categories` is None in a
    probe that gives none.
    """

    layers: tuple[int, ...]
    components: Components
    centres: NDArray[np.float16]
    dual: NDArray[np.float32]
    gamma: float
    bias: float
    model_sha256: str
    rubric_version: int
    wording: str
    categories: Categories | None = None

    def logits(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the logits of refusal [N] for coordinates [N, R] of the `components`."""
        from scipy.spatial.distance import cdist

        squares = cdist(coordinates, self.centres.astype(np.float64), "sqeuclidean")
        return np.asarray(np.exp(-self.gamma * squares) @ self.dual.astype(np.float64) + self.bias)

    def fingerprint(self) -> str:
        """Return a hash of everything in the probe."""
        return hashlib.sha256(_packed(self)).hexdigest()

    def check_belongs(self, model: Engine) -> None:
        """Raise `InputError` unless this probe was fitted for this model, rubric and wording."""
        actual = (fingerprint(model.path), rubric_version(), wording())
        if actual != (self.model_sha256, self.rubric_version, self.wording):
            raise InputError(
                f"the judge's probe belongs to model {self.model_sha256[:12]}, rubric {self.rubric_version}, "
                f"wording {self.wording}; this is {actual[0][:12]}, {actual[1]}, {actual[2]}. Use the judge "
                "`labels:MODEL`, or fit a probe for this model."
            )


def load_probe(path: Path) -> Probe:
    """Read a probe from a file. Raise `InputError` if the file is not a probe."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})["probe"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
        categories = None
        if "kinds" in meta:  # the key of categories in the file
            categories = Categories(tuple(meta["kinds"]), tensors["kind_weights"], tensors["kind_bias"])
        probe = Probe(
            layers=tuple(meta["layers"]),
            components=Components(tensors["mean"], tensors["scale"], tensors["basis"]),
            centres=tensors["centres"],
            dual=tensors["dual"],
            gamma=float(meta["gamma"]),
            bias=float(meta["bias"]),
            model_sha256=meta["model_sha256"],
            rubric_version=int(meta["rubric_version"]),
            wording=meta["wording"],
            categories=categories,
        )
        _check(probe, [*tensors.values(), np.array([probe.gamma, probe.bias])])
        return probe
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not a judge probe ({error}). Give a file that `save_probe` wrote."
        ) from error


def _check(probe: Probe, numbers: Sequence[NDArray[Any]]) -> None:
    """Raise `ValueError` if shapes do not match, a number is not finite, or a scale is not positive."""
    components = probe.components
    rank, n_centres = len(components.basis), len(probe.centres)
    expected: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
        "mean": (components.mean, (2, len(probe.layers), *components.mean.shape[2:])),
        "scale": (components.scale, components.mean.shape),
        "basis": (components.basis, (rank, *components.mean.shape)),
        "centres": (probe.centres, (n_centres, rank)),
        "dual": (probe.dual, (n_centres,)),
    }
    if probe.categories is not None:
        count = len(probe.categories.names)
        expected["kind_weights"] = (probe.categories.weights, (count, rank))
        expected["kind_bias"] = (probe.categories.bias, (count,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or (name == "mean" and tensor.ndim != 3):
            raise ValueError(f"{name} has shape {tensor.shape}, not {shape}")
    if not all(np.isfinite(array).all() for array in numbers) or (components.scale <= 0).any():
        raise ValueError("a number is not finite, or a scale is not above 0")


def save_probe(probe: Probe, path: Path) -> None:
    """Write a probe to a safetensors file."""
    data = _packed(probe)
    write_atomic(path, lambda file: file.write(data))


def _packed(probe: Probe) -> bytes:
    from safetensors.numpy import save

    meta: dict[str, Any] = {
        "layers": list(probe.layers),
        "gamma": probe.gamma,
        "bias": probe.bias,
        "model_sha256": probe.model_sha256,
        "rubric_version": probe.rubric_version,
        "wording": probe.wording,
    }
    tensors: dict[str, NDArray[Any]] = {
        "mean": probe.components.mean,
        "scale": probe.components.scale,
        "basis": probe.components.basis,
        "centres": probe.centres,
        "dual": probe.dual,
    }
    if probe.categories is not None:
        meta["kinds"] = list(probe.categories.names)
        tensors |= {"kind_weights": probe.categories.weights, "kind_bias": probe.categories.bias}
    # safetensors writes the buffer of an array as it is, so arrays must be in C order.
    in_order = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save(in_order, metadata={"probe": json.dumps(meta)})
