"""Read, write and check GGUF LoRA adapters, which llama.cpp loads with `--lora`.

In: a `LoraAdapter` or a file. Out: the file or the adapter, or every reason why llama.cpp would refuse the
file (src/llama-adapter.cpp, `llama_adapter_lora_init_impl`). Formats: docs/adapters.md.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from rs_gguf.errors import InputError
from rs_gguf.models.architecture import holds_experts
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
_IGNORED = "_norm.weight"  # llama.cpp's loader ignores these tensors; mergekit, for example, writes them
# Types of the key that makes an adapter an aLoRA. An empty list has no type of its entries.
_TOKENS = ([GGUFValueType.ARRAY, GGUFValueType.UINT32], [GGUFValueType.ARRAY])
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def write(adapter: LoraAdapter, path: str | Path) -> None:
    """Write an adapter for `--lora` completely or not at all; read it back and compare.

    The same content gives the same bytes.

    Raises:
        InputError: no matrix would change, the adapter is an aLoRA or too large to be read again, or `path`
            cannot be written.
        VerificationError: the content that was read back differs.
    """
    adapter.refuse_invoked()
    size = sum(factor.nbytes for pair in adapter.factors.values() for factor in pair)
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{path} would have {size >> 20} MiB; at most {MAX_ADAPTER_BYTES >> 20} MiB can be read again. "
            "Combine fewer or smaller adapters."
        )
    if not any(adapter.norms.values()):
        raise InputError(f"every change is zero: {path} would do nothing. Choose other weights or layers.")
    write_verified(Path(path), lambda draft: _serialise(adapter, draft), lambda draft: read(draft) == adapter)


def read(path: str | Path) -> LoraAdapter:
    """Read an adapter that llama.cpp accepts. Raise `InputError` with every reason if it does not."""
    adapter, reasons = _survey(open_gguf(path, MAX_ADAPTER_BYTES))
    if adapter is None:
        raise InputError(
            f"{path} is not a usable LoRA adapter:\n" + "\n".join(f"- {reason}" for reason in reasons)
        )
    return adapter


def check(path: str | Path) -> CheckReport[LoraAdapter]:
    """Check an adapter file against the rules of llama.cpp's loader and report every reason.

    A bad adapter raises nothing.
    """
    try:
        reader = open_gguf(path, MAX_ADAPTER_BYTES)
    except InputError as error:
        return CheckReport(str(path), errors=(str(error),), warnings=())
    adapter, reasons = _survey(reader)
    if adapter is None:
        return CheckReport(str(path), errors=tuple(reasons), warnings=())
    errors: list[str] = []
    zero = [name for name, norm in adapter.norms.items() if norm == 0.0]
    warnings = [f"{zero} do nothing: their changes are zero."] if zero else []
    if len(zero) == len(adapter.factors):
        errors, warnings = ["every change is zero: the file would do nothing."], []
    norms = [tensor.name for tensor in reader.tensors if tensor.name.endswith(_IGNORED)]
    if norms:
        warnings.append(f"llama.cpp ignores {norms[0]!r} and {len(norms) - 1} more: norms keep their values.")
    if adapter.invoked:
        warnings.append(
            "it is an aLoRA: llama-server applies it only after its invocation tokens, other programs always."
        )
    return CheckReport(str(path), tuple(errors), tuple(warnings), content=adapter)


def _survey(reader: GGUFReader) -> tuple[LoraAdapter | None, list[str]]:
    """Return the adapter in an open file, or None and every reason why the file is not usable."""
    values = metadata(reader)
    reasons = [
        f"{key} is {values.get(key)!r:.80}; llama.cpp needs {wanted!r}"
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"))
        if values.get(key) != wanted
    ]
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        reasons.append("general.architecture is missing")
    alpha = values.get(_ALPHA, 0.0)
    # llama.cpp aborts the whole process when it reads this key with another type.
    if _ALPHA in values and reader.fields[_ALPHA].types != [GGUFValueType.FLOAT32]:
        reasons.append(f"{_ALPHA} is not a 32-bit float, which aborts llama.cpp")
    elif not math.isfinite(alpha):
        reasons.append(f"{_ALPHA} is {alpha}; a finite number is needed")
    if _INVOCATION in values and reader.fields[_INVOCATION].types not in _TOKENS:
        reasons.append(f"{_INVOCATION} is not a list of 32-bit unsigned numbers, which llama.cpp needs")
    reasons += schema_faults(values)
    pairs = _factor_pairs(reader, reasons)
    if reasons:
        return None, reasons
    factors = {}
    for name, pair in pairs.items():
        a, b = pair["a"], pair["b"]
        # llama.cpp multiplies by scale · alpha / rank; alpha 0 stands for the scale alone.
        with np.errstate(over="ignore"):  # the constructor below reports it
            factors[name] = (a, b * np.float32(alpha / a.shape[-2]) if alpha else b)
    try:
        invoked = bool(values.get(_INVOCATION))
        return LoraAdapter(factors, str(architecture), provenance_of(values), invoked), []
    except InputError as error:
        return None, [str(error)]


def _factor_pairs(reader: GGUFReader, reasons: list[str]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    """Return the factors, "a" and "b", by matrix name; append every fault of the tensors to `reasons`."""
    pairs: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for tensor in reader.tensors:
        match = FACTOR_NAME.fullmatch(tensor.name)
        if tensor.name.endswith(_IGNORED):
            continue
        if match is None:
            reasons.append(
                f"tensor {tensor.name!r}: only blk.N.<matrix>.weight.lora_a and .lora_b are accepted"
            )
        elif tensor.tensor_type not in _FLOATS:
            reasons.append(f"tensor {tensor.name!r} is {tensor.tensor_type.name}; F32, F16 or BF16 is needed")
        elif len(tensor.shape) != (needed := 3 if holds_experts(match[1]) else 2):
            shape = list(map(int, tensor.shape))
            reasons.append(f"tensor {tensor.name!r} has the shape {shape}; {needed}-D needed")
        else:
            pairs.setdefault(match[1], {})[match[2]] = dequantize(tensor.data, tensor.tensor_type)
    for name, pair in pairs.items():
        if len(pair) != 2:
            reasons.append(f"{name}: both lora_a and lora_b are needed")
        else:
            reasons += factor_faults(name, pair["a"], pair["b"])
    if not reader.tensors:
        reasons.append("the file holds no tensor")
    return pairs


def _serialise(adapter: LoraAdapter, path: Path) -> None:
    writer = GGUFWriter(path, adapter.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp multiplies the user's scale by alpha / rank; alpha 0 leaves the scale unchanged.
    writer.add_float32(_ALPHA, 0.0)
    add_provenance(writer, adapter.provenance)
    for name, (a, b) in adapter.factors.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    finish(writer)
