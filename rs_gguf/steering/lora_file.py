"""GGUF LoRA adapters: the low-rank changes of weight matrices that llama.cpp loads with `--lora`.

In: pairs (A, B) by the name of the matrix they change, W' = W + scale · B A, or a file. Out: the other, or
every reason why llama.cpp would refuse it (src/llama-adapter.cpp, `llama_adapter_lora_init_impl`). Unlike a
control vector, what an adapter adds depends on the input. Formats: docs/adapters.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from rs_gguf.errors import InputError
from rs_gguf.steering.container import (
    add_provenance,
    finish,
    metadata,
    provenance_of,
    schema_faults,
    write_verified,
)
from rs_gguf.steering.guard import MAX_ADAPTER_BYTES, open_gguf
from rs_gguf.steering.vector import ProvenanceValue, checked_provenance
from rs_gguf.steering.vector_file import CheckReport

Factors = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_NAME = re.compile(r"(blk\.[0-9]{1,4}\.[a-z0-9_]+\.weight)\.lora_([ab])")
_PASSED_OVER = "_norm.weight"  # llama.cpp's loader does, in files of mergekit say
# Types of the key that makes an adapter an aLoRA; an empty list tells none of its entries.
_TOKENS = ([GGUFValueType.ARRAY, GGUFValueType.UINT32], [GGUFValueType.ARRAY])
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank changes of named matrices: `factors` maps `blk.N.<matrix>.weight` to A [r, in], B [out, r].

    At scale 1.0 exactly B A is added to the matrix. `architecture` is llama.cpp's name of the model family,
    which its loader compares; `provenance` is as in `SteeringVector`. `invoked`: another tool's aLoRA, which
    llama-server applies after its invocation tokens alone. Arrays are copied, made read-only and sorted by
    block.

    Raises:
        InputError: no matrix or architecture, shapes that do not multiply, numbers that are not finite, or a
            change of the embedding or the output, which aborts llama.cpp where the two are one matrix.
    """

    factors: Mapping[str, Factors]
    architecture: str
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)
    invoked: bool = False

    def __post_init__(self) -> None:
        factors = {name: (_copied(a), _copied(b)) for name, (a, b) in self.factors.items()}
        faults = [fault for name, pair in factors.items() for fault in _factor_faults(name, *pair)]
        if not factors:
            faults.append("the adapter changes no matrix")
        if not self.architecture:
            faults.append("the architecture is missing, and llama.cpp's loader compares it with the model's")
        if faults:
            raise InputError("; ".join(faults) + ". Fit the adapter again.")
        ordered = dict(sorted(factors.items(), key=lambda item: _order(item[0])))
        object.__setattr__(self, "factors", ordered)
        object.__setattr__(self, "provenance", checked_provenance(self.provenance))

    @property
    def layers(self) -> list[int]:
        """The blocks that hold a changed matrix, ascending."""
        return sorted({_order(name)[0] for name in self.factors})

    @property
    def matrices(self) -> list[str]:
        """The kinds of matrix that are changed in some block, such as `ffn_down`."""
        return sorted({_order(name)[1] for name in self.factors})

    @property
    def rank(self) -> int:
        """The largest rank among the changes."""
        return max(len(a) for a, _ in self.factors.values())

    @property
    def norms(self) -> dict[str, float]:
        """Frobenius norm of each change B A."""
        return {name: math.sqrt(max(0.0, _inner(pair, pair))) for name, pair in self.factors.items()}

    def same_as(self, other: LoraAdapter) -> bool:
        """Whether every number, the architecture and the provenance with its types are the same."""
        return (
            list(self.factors) == list(other.factors)
            and all(
                np.array_equal(x, y)
                for name, pair in self.factors.items()
                for x, y in zip(pair, other.factors[name], strict=True)
            )
            and self.architecture == other.architecture
            # 1 == 1.0 == True in Python, but not in a file; the keys are sorted.
            and repr(self.provenance) == repr(other.provenance)
        )


def write(adapter: LoraAdapter, path: str | Path) -> None:
    """Write for `--lora`, whole or not at all, read back and compared; the same content gives the same bytes.

    Raises `InputError` when no matrix would change, for an aLoRA, for one that would be too large to be read
    again, or when the place cannot be written, `GateError` when what was read back differs.
    """
    refuse_invoked(adapter)
    size = sum(factor.nbytes for pair in adapter.factors.values() for factor in pair)
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{path} would have {size >> 20} MiB, and an adapter has at most {MAX_ADAPTER_BYTES >> 20} here. "
            "Take fewer or smaller ones."
        )
    if not any(adapter.norms.values()):
        raise InputError(f"Every change is zero: {path} would do nothing. Choose other weights or blocks.")
    write_verified(Path(path), lambda draft: _serialise(adapter, draft), lambda d: read(d).same_as(adapter))


def refuse_invoked(adapter: LoraAdapter) -> None:
    """Raise `InputError` for an aLoRA: its factors alone would change every token."""
    if adapter.invoked:
        raise InputError(
            "The adapter is an aLoRA: llama-server applies it after its invocation tokens alone, and what is "
            "written here is always on. Use the file as it is."
        )


def read(path: str | Path) -> LoraAdapter:
    """Read an adapter that llama.cpp accepts. Raises `InputError` with every reason when it is none."""
    found = _survey(open_gguf(path, MAX_ADAPTER_BYTES))
    if isinstance(found, LoraAdapter):
        return found
    raise InputError(f"{path} is no usable LoRA adapter:\n" + "\n".join(f"- {reason}" for reason in found))


def is_adapter(path: str | Path) -> bool:
    """Whether a GGUF file says of itself that it is an adapter. Raises `InputError` when it is unsound."""
    return bool(metadata(open_gguf(path, MAX_ADAPTER_BYTES)).get("general.type") == "adapter")


def check(path: str | Path, model: str | Path | None = None) -> CheckReport:
    """Judge an adapter file by the rules of llama.cpp's loader, collecting every reason.

    With `model`, a GGUF file, llama.cpp also loads it there, which compares names and shapes, and its effect
    is proven (`rs_gguf.steering.proof.prove`). Never raises for a bad adapter; `InputError` for a bad model,
    or where there is no room for drafts.
    """
    try:
        reader = open_gguf(path, MAX_ADAPTER_BYTES)
    except InputError as error:
        return CheckReport(str(path), errors=(str(error),), warnings=())
    found = _survey(reader)
    if not isinstance(found, LoraAdapter):
        return CheckReport(str(path), errors=tuple(found), warnings=())
    errors: list[str] = []
    zero = [name for name, norm in found.norms.items() if norm == 0.0]
    warnings = [f"{zero} do nothing: their changes are zero."] if zero else []
    if len(zero) == len(found.factors):
        errors, warnings = ["Every change is zero: the file would do nothing."], []
    norms = [tensor.name for tensor in reader.tensors if tensor.name.endswith(_PASSED_OVER)]
    if norms:
        warnings.append(
            f"llama.cpp passes over {norms[0]!r} and {len(norms) - 1} more: norms stay as they are."
        )
    if found.invoked:
        warnings.append(
            "It is an aLoRA: llama-server applies it after its invocation tokens alone, others always."
        )
    proof = None
    if model is not None and not errors:
        from rs_gguf.steering.proof import other_model, prove

        warnings += other_model(found.provenance, model)
        proof = prove(path, model)
        errors += proof.reasons
    return CheckReport(str(path), tuple(errors), tuple(warnings), proof=proof)


def combine(parts: Sequence[tuple[LoraAdapter, float]]) -> LoraAdapter:
    """The sum of weight × adapter, over the union of their matrices; ranks add up.

    Equal to loading them all with `--lora-scaled`, up to rounding. The provenance of part i is kept under
    `combine.i.`, its weight as `combine.i.weight`. Raises `InputError` when there is no part, a weight is not
    finite, one is an aLoRA, or the parts belong to different models.
    """
    if not parts:
        raise InputError("There is nothing to combine; give at least one adapter.")
    families = sorted({adapter.architecture for adapter, _ in parts})
    if len(families) > 1:
        raise InputError(f"The adapters are for {' and '.join(families)}: they belong to different models.")
    total: dict[str, Factors] = {}
    provenance: dict[str, ProvenanceValue] = {}
    for index, (adapter, weight) in enumerate(parts):
        if not math.isfinite(weight):
            raise InputError(f"The weight {weight} of adapter {index} is not a finite number; give one.")
        refuse_invoked(adapter)
        for name, (a, b) in adapter.factors.items():
            with np.errstate(over="ignore"):  # the constructor below reports it
                weighted = b * np.float32(weight)
            if name not in total:
                total[name] = a, weighted
                continue
            _same_shape(name, total[name], (a, b))
            before = total[name]
            total[name] = np.concatenate([before[0], a]), np.concatenate([before[1], weighted], axis=1)
        provenance |= {f"combine.{index}.{key}": value for key, value in adapter.provenance.items()}
        provenance[f"combine.{index}.weight"] = float(weight)
    return LoraAdapter(total, families[0], provenance)


def cosines(first: LoraAdapter, second: LoraAdapter) -> dict[str, float]:
    """Cosine ⟨B A, B' A'⟩ / (‖B A‖ ‖B' A'‖) between the changes of each matrix that both change.

    Raises `InputError` when a matrix has another shape in each.
    """
    found = {}
    ours, theirs = first.norms, second.norms
    for name, pair in first.factors.items():
        if name in second.factors and ours[name] and theirs[name]:
            _same_shape(name, pair, second.factors[name])
            found[name] = _inner(pair, second.factors[name]) / (ours[name] * theirs[name])
    return found


def _survey(reader: GGUFReader) -> LoraAdapter | list[str]:
    """The adapter in an opened file, or every reason why it is none."""
    values = metadata(reader)
    reasons = [
        f"{key} is {values.get(key)!r:.80}; llama.cpp wants {wanted!r}"
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"))
        if values.get(key) != wanted
    ]
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        reasons.append("general.architecture is missing")
    alpha = values.get(_ALPHA, 0.0)
    # Another type aborts the whole process in llama.cpp, where the key is read.
    if _ALPHA in values and reader.fields[_ALPHA].types != [GGUFValueType.FLOAT32]:
        reasons.append(f"{_ALPHA} is no 32-bit float, which aborts llama.cpp")
    elif not math.isfinite(alpha):
        reasons.append(f"{_ALPHA} is {alpha}; a finite number is needed")
    if _INVOCATION in values and reader.fields[_INVOCATION].types not in _TOKENS:
        reasons.append(f"{_INVOCATION} is no list of 32-bit unsigned numbers, as llama.cpp wants it")
    reasons += schema_faults(values)
    halves = _halves(reader, reasons)
    if reasons:
        return reasons
    factors = {}
    for name, pair in halves.items():
        a, b = pair["a"], pair["b"]
        # llama.cpp multiplies by alpha / rank, and by the scale alone where alpha is 0.
        with np.errstate(over="ignore"):  # the constructor below reports it
            factors[name] = (a, b * np.float32(alpha / len(a)) if alpha else b)
    try:
        invoked = bool(values.get(_INVOCATION))
        return LoraAdapter(factors, str(architecture), provenance_of(values), invoked)
    except InputError as error:
        return [str(error)]


def _halves(reader: GGUFReader, reasons: list[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    halves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if tensor.name.endswith(_PASSED_OVER):
            continue
        if match is None:
            reasons.append(f"tensor {tensor.name!r}: only blk.N.<matrix>.weight.lora_a and .lora_b are used")
        elif tensor.tensor_type not in _FLOATS:
            reasons.append(f"tensor {tensor.name!r} is {tensor.tensor_type.name}; F32, F16 or BF16 is needed")
        elif len(tensor.shape) != 2:
            reasons.append(f"tensor {tensor.name!r} has the shape {list(map(int, tensor.shape))}; 2-D needed")
        else:
            halves.setdefault(match[1], {})[match[2]] = dequantize(tensor.data, tensor.tensor_type)
    for name, pair in halves.items():
        if len(pair) != 2:
            reasons.append(f"{name}: lora_a and lora_b must both be there")
        else:
            reasons += _factor_faults(name, pair["a"], pair["b"])
    if not reader.tensors:
        reasons.append("the file holds no tensor")
    return halves


def _copied(factor: Any) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # Inf is a fault with a name below
        copy = np.array(factor, dtype=np.float32, order="C")
    copy.flags.writeable = False
    return copy


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


def _inner(first: Factors, second: Factors) -> float:
    """⟨B A, B' A'⟩, the sum of products of all entries, without either product being formed."""
    (a, b), (c, d) = ([factor.astype(np.float64) for factor in pair] for pair in (first, second))
    return float(np.sum((b.T @ d) * (a @ c.T)))


def _same_shape(name: str, first: Factors, second: Factors) -> None:
    shapes = [(len(b), a.shape[1]) for a, b in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{name} has the shape {shapes[0]} for one adapter and {shapes[1]} for another: they belong to "
            "different models."
        )


def _serialise(adapter: LoraAdapter, path: Path) -> None:
    writer = GGUFWriter(path, adapter.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    # alpha / rank multiplies the user's scale; 0 leaves the scale as it is, whatever the rank.
    writer.add_float32(_ALPHA, 0.0)
    add_provenance(writer, adapter.provenance)
    for name, (a, b) in adapter.factors.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    finish(writer)
