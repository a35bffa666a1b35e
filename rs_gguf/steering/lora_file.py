"""GGUF LoRA adapters, which llama.cpp loads with `--lora`: read, write, and judge whether it will.

In: a `LoraAdapter`, or a file. Out: the other, or every reason why llama.cpp would refuse it
(src/llama-adapter.cpp, `llama_adapter_lora_init_impl`). Formats: docs/adapters.md.
"""

from __future__ import annotations

import math
from pathlib import Path

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
from rs_gguf.steering.lora import FACTOR_NAME, LoraAdapter, factor_faults
from rs_gguf.steering.report import CheckReport

_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_PASSED_OVER = "_norm.weight"  # llama.cpp's loader does, in files of mergekit say
# Types of the key that makes an adapter an aLoRA; an empty list tells none of its entries.
_TOKENS = ([GGUFValueType.ARRAY, GGUFValueType.UINT32], [GGUFValueType.ARRAY])
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def write(adapter: LoraAdapter, path: str | Path) -> None:
    """Write for `--lora`, whole or not at all, read back and compared; the same content gives the same bytes.

    Raises `InputError` when no matrix would change, for an aLoRA, for one that would be too large to be read
    again, or when the place cannot be written, `VerificationError` when what was read back differs.
    """
    adapter.refuse_invoked()
    size = sum(factor.nbytes for pair in adapter.factors.values() for factor in pair)
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{path} would have {size >> 20} MiB, and an adapter has at most {MAX_ADAPTER_BYTES >> 20} here. "
            "Take fewer or smaller ones."
        )
    if not any(adapter.norms.values()):
        raise InputError(f"Every change is zero: {path} would do nothing. Choose other weights or blocks.")
    write_verified(Path(path), lambda draft: _serialise(adapter, draft), lambda draft: read(draft) == adapter)


def read(path: str | Path) -> LoraAdapter:
    """Read an adapter that llama.cpp accepts. Raises `InputError` with every reason when it is none."""
    found, reasons = _survey(open_gguf(path, MAX_ADAPTER_BYTES))
    if found is None:
        raise InputError(
            f"{path} is no usable LoRA adapter:\n" + "\n".join(f"- {reason}" for reason in reasons)
        )
    return found


def check(path: str | Path) -> CheckReport[LoraAdapter]:
    """Judge an adapter file by the rules of llama.cpp's loader, collecting every reason.

    Never raises for a bad adapter.
    """
    try:
        reader = open_gguf(path, MAX_ADAPTER_BYTES)
    except InputError as error:
        return CheckReport(str(path), errors=(str(error),), warnings=())
    found, reasons = _survey(reader)
    if found is None:
        return CheckReport(str(path), errors=tuple(reasons), warnings=())
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
    return CheckReport(str(path), tuple(errors), tuple(warnings), found=found)


def _survey(reader: GGUFReader) -> tuple[LoraAdapter | None, list[str]]:
    """The adapter in an opened file, or None and every reason why it is none."""
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
        return None, reasons
    factors = {}
    for name, pair in halves.items():
        a, b = pair["a"], pair["b"]
        # llama.cpp multiplies by alpha / rank, and by the scale alone where alpha is 0.
        with np.errstate(over="ignore"):  # the constructor below reports it
            factors[name] = (a, b * np.float32(alpha / len(a)) if alpha else b)
    try:
        invoked = bool(values.get(_INVOCATION))
        return LoraAdapter(factors, str(architecture), provenance_of(values), invoked), []
    except InputError as error:
        return None, [str(error)]


def _halves(reader: GGUFReader, reasons: list[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    halves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for tensor in reader.tensors:
        match = FACTOR_NAME.fullmatch(tensor.name)
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
            reasons += factor_faults(name, pair["a"], pair["b"])
    if not reader.tensors:
        reasons.append("the file holds no tensor")
    return halves


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
