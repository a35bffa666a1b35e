"""Convert vectors of other tools into vectors that llama.cpp adds at the right layer.

In: a GGUF or safetensors file and the name of its source tool. Out: a `SteeringVector` and a sentence for
each change. docs/control-vectors.md describes the conventions of each tool (layer numbering, sign, scale);
this module has only the facts that the conversion needs. Pickled files are refused, since opening one runs
its code.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from rs_gguf.errors import InputError
from rs_gguf.steering.container import SCHEMA_KEY, metadata
from rs_gguf.steering.formats.tools import FORMATS
from rs_gguf.steering.guard import MAX_NUMBERS, open_gguf, read_bounded
from rs_gguf.steering.provenance import INT64, KEY, ProvenanceValue
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import MODE_KEY, loader_layer

MAX_SAFETENSORS_HEADER = 2**20
_FLOATS = (
    GGMLQuantizationType.F64,
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
)
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Types of safetensors files that hold directions, and how NumPy reads their numbers."""


@dataclass(frozen=True)
class Conversion:
    """A converted vector, and a sentence for each change."""

    vector: SteeringVector
    notes: tuple[str, ...]


def convert(
    path: str | Path, from_format: str, base: int | None = None, architecture: str | None = None
) -> Conversion:
    """Read another tool's vector file.

    `from_format` is one of `FORMATS`. `base` overrides the number that the file gives to layer 0 (1 for files
    indexed like transformers' `hidden_states`, whose entry 0 is the embedding). `architecture` overrides the
    file's model hint. Directions keep their sign and length. A direction of layer 0 is dropped.

    Raises:
        InputError: the file cannot be read, was written by this project, or holds no usable direction.
    """
    if from_format not in FORMATS:
        raise InputError(f"unknown format {from_format!r}; choose one of {', '.join(FORMATS)}.")
    data = read_bounded(path)
    notes: list[str] = []
    source_metadata: dict[str, Any] = {}
    if data.startswith(b"GGUF"):
        reader = open_gguf(path)
        source_metadata = metadata(reader)
        if SCHEMA_KEY in source_metadata:
            raise InputError(f"{path} was written by this project: it needs no conversion. Use it as it is.")
        if source_metadata.get(MODE_KEY, "add") != "add":
            raise InputError(f"{path} is a GLP file, whose directions are not added. Use --from glp.")
        numbered = list(_gguf_rows(reader, notes))
    elif _is_safetensors(data):
        numbered = list(_safetensors_rows(path, data, notes))
    elif data.startswith((b"PK\x03\x04", b"\x80")):
        raise InputError(
            f"{path} is a pickled PyTorch or Python file; opening it would run code from it. If you trust "
            "it, load it in Python and save {str(layer): tensor} with safetensors.torch.save_file."
        )
    else:
        raise InputError(f"{path} is neither a GGUF nor a safetensors file; give one of these.")
    start = FORMATS[from_format] if base is None else base
    directions = _placed(numbered, start, from_format, notes)
    hint = source_metadata.get("controlvector.model_hint", "") if architecture is None else architecture
    if not hint:
        notes.append("The file does not name its model; give the model family with --architecture.")
    provenance: dict[str, ProvenanceValue] = {
        **{f"source.{key}": value for key, value in source_metadata.items() if keepable(key, value)},
        "source.format": from_format,
        "source.file": Path(path).name,
        "source.sha256": hashlib.sha256(data).hexdigest(),
        "source.base": start,
    }
    return Conversion(
        SteeringVector(directions, provenance, hint if isinstance(hint, str) else ""), tuple(notes)
    )


def _gguf_rows(reader: GGUFReader, notes: list[str]) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """Yield (name, number, row) of each direction tensor."""
    other = [tensor.name for tensor in reader.tensors if loader_layer(tensor.name) is None]
    if other:
        shown = ", ".join(map(repr, other[:5])) + (" …" if len(other) > 5 else "")
        notes.append(f"Left out {len(other)} tensors, for which llama.cpp would reject the file: {shown}.")
    kinds = set()
    for tensor in reader.tensors:
        number = loader_layer(tensor.name)
        if number is None:
            continue
        if tensor.tensor_type not in _FLOATS:
            raise InputError(
                f"{tensor.name!r} has type {tensor.tensor_type.name}; accepted are F64, F32, F16 and BF16."
            )
        kinds.add(tensor.tensor_type)
        # `dequantize` accepts 16- and 32-bit floats, but not F64.
        is_f64 = tensor.tensor_type is GGMLQuantizationType.F64
        yield tensor.name, number, tensor.data if is_f64 else dequantize(tensor.data, tensor.tensor_type)
    _note_types({kind.name for kind in kinds}, notes)


def _note_types(kinds: set[str], notes: list[str]) -> None:
    for kind in sorted(kinds - {"F32"}):
        notes.append(f"Stored {kind} as F32: llama.cpp rejects a file with any other type.")


def _is_safetensors(data: bytes) -> bool:
    """Return whether a file starts like safetensors: the length of a JSON header, then the header."""
    header = int.from_bytes(data[:8], "little")
    return data[8:9] == b"{" and header <= min(MAX_SAFETENSORS_HEADER, len(data) - 8)


def _safetensors_rows(
    path: str | Path, data: bytes, notes: list[str]
) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """Yield (name, number, row) of each tensor named by one number, or of each row of one matrix [L, D]."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{path}: not a sound safetensors file ({error}). Download or write it again."
        ) from error
    total = 0
    for name, tensor in tensors.items():
        if tensor["dtype"] not in _SAFETENSORS:
            raise InputError(
                f"{path}: tensor {name!r} has type {tensor['dtype']}; floats of at least 16 bits are needed."
            )
        total += math.prod(tensor["shape"])
        if total > MAX_NUMBERS:
            raise InputError(f"{path}: more than {MAX_NUMBERS} numbers; a vector has fewer. Is this a model?")
        if re.search(r"(?<![A-Za-z0-9])-[0-9]", name):  # a minus sign, unlike the hyphen in layer-12
            raise InputError(
                f"{path}: tensor {name!r} has a negative number. Name each tensor by the number of its "
                "layer, counted from 0."
            )
        inside = re.search(r"resid_pre|resid_mid|attn_out|mlp_out|input_layernorm", name)
        if inside:
            raise InputError(
                f"{path}: tensor {name!r} belongs to {inside[0]}, but llama.cpp adds directions to layer "
                "outputs. Give directions of layer outputs (hook_resid_post, or resid_pre of the next layer)."
            )
        rows = _float32(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])
        numbers = re.findall(r"[0-9]+", name)
        if len(numbers) == 1 and len(numbers[0]) < 10:
            yield name, int(numbers[0]), rows
        elif len(tensors) == 1 and not numbers and rows.ndim == 2:
            yield from ((f"row {number} of {name}", number, row) for number, row in enumerate(rows))
        else:
            raise InputError(
                f"{path}: tensor {name!r} of shape {list(rows.shape)} does not name its layer. Accepted are "
                "names with one number, such as layer_12 or model.layers.12, or a single matrix with a row "
                "for each layer."
            )
    _note_types({tensor["dtype"] for tensor in tensors.values()}, notes)


def _float32(data: bytes, kind: str) -> npt.NDArray[np.float32]:
    """Return numbers of one of the types `_SAFETENSORS` as float32."""
    if kind == "BF16":  # the upper half of a float32; NumPy has no such type
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # such numbers are refused later, by their place
        return np.frombuffer(data, _SAFETENSORS[kind]).astype(np.float32)


def _placed(
    numbered: list[tuple[str, int, npt.NDArray[Any]]], start: int, from_format: str, notes: list[str]
) -> dict[int, npt.NDArray[Any]]:
    """Return the rows [D] by layer, if the source tool gives layer 0 the number `start`."""
    if start:
        notes.append(
            f"Moved every direction by {-start}: {from_format} numbers layer 0 as {start}, so its "
            f"direction.N belongs to layer N{-start:+d}. llama.cpp adds direction.N to the output of layer N."
        )
    placed: dict[int, npt.NDArray[Any]] = {}
    for name, number, row in numbered:
        layer = number - start
        if layer < 0:
            raise InputError(
                f"{name!r} would be layer {layer}; layers start at 0. "
                f"Check the format ({from_format}) and the base ({start})."
            )
        if layer == 0:
            notes.append(
                f"Left out {name!r}: it is for layer 0, which llama.cpp cannot steer. llama.cpp rejects the "
                "whole file if it holds direction.0."
            )
            continue
        if layer in placed:
            raise InputError(f"{name!r} is the second direction for layer {layer}; keep one of them.")
        if row.size != max(row.shape, default=0):
            raise InputError(
                f"{name!r} has shape {list(row.shape)}; one direction [D] for each layer is needed."
            )
        placed[layer] = row.reshape(-1)
    if not placed:
        raise InputError(
            "no usable direction is left: llama.cpp steers layers from 1 on. Check --from and --base."
        )
    return placed


def keepable(key: str, value: Any) -> bool:
    """Return whether foreign metadata fits into provenance: short plain names, single finite values."""
    if KEY.fullmatch(key) is None or len(key) > 200 or len(str(value)) > 1000:
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and value in INT64)
