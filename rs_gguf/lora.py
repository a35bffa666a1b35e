"""GGUF LoRA adapters: the low-rank changes of weight matrices that llama.cpp loads with `--lora`.

In: pairs (A, B) by the name of the matrix they change, W' = W + scale · B A, or a file. Out: the other, or
every reason why llama.cpp would refuse it (src/llama-adapter.cpp, `llama_adapter_lora_init_impl`). Unlike a
control vector, what an adapter adds depends on the input. Formats: docs/adapters.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from rs_gguf.errors import InputError
from rs_gguf.gguf_file import add_provenance, finish, metadata, provenance_of, schema_faults, write_verified
from rs_gguf.gguf_guard import open_gguf
from rs_gguf.steering import ProvenanceValue, checked_provenance

Factors = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
_NAME = re.compile(r"(blk\.\d+\.[a-z0-9_]+\.weight)\.lora_([ab])")


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank changes of named matrices: `factors` maps `blk.N.<matrix>.weight` to A [r, in], B [out, r].

    At scale 1.0 exactly B A is added to the matrix. `architecture` is llama.cpp's name of the model family,
    which its loader compares; `provenance` is as in `SteeringVector`.

    Raises:
        InputError: no matrix, shapes that do not multiply, numbers that are not finite, or a change of the
            embedding or the output, which aborts llama.cpp where the two are one matrix.
    """

    factors: Mapping[str, Factors]
    architecture: str
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [fault for name, pair in self.factors.items() for fault in _factor_faults(name, *pair)]
        if not self.factors:
            faults.append("the adapter changes no matrix")
        if not self.architecture:
            faults.append("the architecture is missing, and llama.cpp's loader compares it with the model's")
        if faults:
            raise InputError("; ".join(faults) + ". Fit the adapter again.")
        factors = {
            name: (np.ascontiguousarray(a, dtype=np.float32), np.ascontiguousarray(b, dtype=np.float32))
            for name, (a, b) in sorted(self.factors.items(), key=lambda item: _order(item[0]))
        }
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))

    @property
    def layers(self) -> list[int]:
        """The blocks that hold a changed matrix, ascending."""
        return sorted({_order(name)[0] for name in self.factors})

    @property
    def rank(self) -> int:
        """The largest rank among the changes."""
        return max(len(a) for a, _ in self.factors.values())

    @property
    def norms(self) -> dict[str, float]:
        """Frobenius norm of each change B A."""
        return {
            name: float(np.sqrt(max(0.0, np.trace((b.T @ b) @ (a @ a.T)))))
            for name, (a, b) in (
                (name, (a.astype(np.float64), b.astype(np.float64))) for name, (a, b) in self.factors.items()
            )
        }

    def same_as(self, other: LoraAdapter) -> bool:
        """Whether every number, the architecture and the provenance are the same."""
        return (
            list(self.factors) == list(other.factors)
            and all(
                np.array_equal(x, y)
                for name, pair in self.factors.items()
                for x, y in zip(pair, other.factors[name], strict=True)
            )
            and self.architecture == other.architecture
            and dict(self.provenance) == dict(other.provenance)
        )


def write(adapter: LoraAdapter, path: str | Path) -> None:
    """Write for `--lora`, whole or not at all, read back and compared; the same content gives the same bytes.

    Raises `InputError` when the place cannot be written, `GateError` when what was read back differs.
    """
    write_verified(Path(path), lambda draft: _serialise(adapter, draft), lambda d: read(d).same_as(adapter))


def read(path: str | Path) -> LoraAdapter:
    """Read an adapter that llama.cpp accepts. Raises `InputError` with every reason when it is none."""
    reader = open_gguf(path)
    values = metadata(reader)
    reasons = [
        f"{key} is {values.get(key)!r}; llama.cpp wants {wanted!r}"
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"))
        if values.get(key) != wanted
    ]
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        reasons.append("general.architecture is missing")
    reasons += schema_faults(values)
    halves = _halves(reader, reasons)
    if reasons:
        raise InputError(f"{path} is no usable LoRA adapter:\n" + "\n".join(f"- {r}" for r in reasons))
    alpha = float(values.get("adapter.lora.alpha") or 0.0)
    factors = {}
    for name, pair in halves.items():
        a, b = pair["a"], pair["b"]
        # llama.cpp multiplies by alpha / rank, and by the scale alone where alpha is 0.
        factors[name] = (a, b * np.float32(alpha / len(a)) if alpha else b)
    return LoraAdapter(factors, str(architecture), provenance_of(values))


def is_adapter(path: str | Path) -> bool:
    """Whether a GGUF file says of itself that it is an adapter. Raises `InputError` when it is unsound."""
    return bool(metadata(open_gguf(path)).get("general.type") == "adapter")


def _halves(reader: GGUFReader, reasons: list[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    halves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            reasons.append(f"tensor {tensor.name!r}: only blk.N.<matrix>.weight.lora_a and .lora_b are used")
        elif tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            reasons.append(f"tensor {tensor.name!r} is {tensor.tensor_type.name}; F32 or F16 is needed")
        elif len(tensor.shape) != 2:
            reasons.append(f"tensor {tensor.name!r} has the shape {list(map(int, tensor.shape))}; 2-D needed")
        else:
            halves.setdefault(match[1], {})[match[2]] = np.array(tensor.data, dtype=np.float32)
    for name, pair in halves.items():
        if len(pair) != 2:
            reasons.append(f"{name}: lora_a and lora_b must both be there")
        else:
            reasons += _factor_faults(name, pair["a"], pair["b"])
    if not reader.tensors:
        reasons.append("the file holds no tensor")
    return halves


def _factor_faults(name: str, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> list[str]:
    if not _NAME.fullmatch(f"{name}.lora_a"):
        return [f"{name!r} is not the weight of a block (blk.N.<matrix>.weight)"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (a.size, b.size):
        return [f"{name}: A {a.shape} and B {b.shape} do not multiply; A is [r, in], B [out, r]"]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return [f"{name}: NaN or Inf, which would reach every logit"]
    return []


def _order(name: str) -> tuple[int, str]:
    _, layer, matrix, _ = name.split(".")
    return int(layer), matrix


def _serialise(adapter: LoraAdapter, path: Path) -> None:
    writer = GGUFWriter(path, adapter.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    # alpha / rank multiplies the user's scale; 0 leaves the scale as it is, whatever the rank.
    writer.add_float32("adapter.lora.alpha", 0.0)
    add_provenance(writer, adapter.provenance)
    for name, (a, b) in adapter.factors.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    finish(writer)
