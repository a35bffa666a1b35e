"""Other tools' vectors into ones that llama.cpp adds at the right block.

In: a GGUF or safetensors file and the name of its writer. Out: a `SteeringVector` with every change
explained. The conventions of each writer (block numbering, sign, scale) are in docs/control-vectors.md; here
stands only what the conversion needs. Pickled files are refused, since opening one runs the code in it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from rs_gguf.errors import InputError
from rs_gguf.steering.container import SCHEMA_KEY, metadata
from rs_gguf.steering.formats.tools import FORMATS
from rs_gguf.steering.guard import MAX_NUMBERS, open_gguf, read_bounded
from rs_gguf.steering.provenance import INT64, KEY, ProvenanceValue
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import loader_layer

MAX_SAFETENSORS_HEADER = 2**20
_FLOATS = (
    GGMLQuantizationType.F64,
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
)


@dataclass(frozen=True)
class Conversion:
    """A converted vector, and what was changed on the way, a sentence each."""

    vector: SteeringVector
    notes: tuple[str, ...]


def convert(
    path: str | Path, from_format: str, base: int | None = None, architecture: str | None = None
) -> Conversion:
    """Read another tool's vector file.

    `from_format` is one of `FORMATS`. `base` overrides the number that the file gives to block 0 (1 for files
    indexed like transformers' `hidden_states`, whose entry 0 is the embedding). `architecture` overrides the
    file's model hint. Directions keep their sign and length; those that fall on block 0 are dropped. Raises
    `InputError` for files that cannot be read, were written here, or hold no direction that can be used.
    """
    if from_format not in FORMATS:
        raise InputError(f"Format {from_format!r} is unknown; choose one of {', '.join(FORMATS)}.")
    data = read_bounded(path)
    notes: list[str] = []
    known: dict[str, Any] = {}
    if data.startswith(b"GGUF"):
        reader = open_gguf(path)
        known = metadata(reader)
        if SCHEMA_KEY in known:
            raise InputError(f"{path} was written by this project: it needs no conversion. Use it as it is.")
        numbered = list(_gguf_rows(reader, notes))
    elif _is_safetensors(data):
        numbered = list(_safetensors_rows(path, data, notes))
    elif data.startswith((b"PK\x03\x04", b"\x80")):
        raise InputError(
            f"{path} is a pickled PyTorch or Python file, and opening it would run code from it. Where you "
            "trust it, load it there and save {str(layer): tensor} with safetensors.torch.save_file."
        )
    else:
        raise InputError(f"{path} is neither a GGUF nor a safetensors file; give one of these.")
    start = FORMATS[from_format] if base is None else base
    directions = _placed(numbered, start, from_format, notes)
    hint = known.get("controlvector.model_hint", "") if architecture is None else architecture
    if not hint:
        notes.append("The file does not say which model it is for; name the family with --architecture.")
    provenance: dict[str, ProvenanceValue] = {
        **{f"source.{key}": value for key, value in known.items() if _keepable(key, value)},
        "source.format": from_format,
        "source.file": Path(path).name,
        "source.sha256": hashlib.sha256(data).hexdigest(),
        "source.base": start,
    }
    return Conversion(
        SteeringVector(directions, provenance, hint if isinstance(hint, str) else ""), tuple(notes)
    )


def _gguf_rows(reader: GGUFReader, notes: list[str]) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """(name, number, row) of each direction tensor."""
    other = [tensor.name for tensor in reader.tensors if loader_layer(tensor.name) is None]
    if other:
        shown = ", ".join(map(repr, other[:5])) + (" …" if len(other) > 5 else "")
        notes.append(f"Left out {len(other)} tensors that llama.cpp would reject the file for: {shown}.")
    kinds = set()
    for tensor in reader.tensors:
        number = loader_layer(tensor.name)
        if number is None:
            continue
        if tensor.tensor_type not in _FLOATS:
            raise InputError(
                f"{tensor.name!r} is of type {tensor.tensor_type.name}; convertible are F64, F32, F16 and "
                "BF16."
            )
        kinds.add(tensor.tensor_type)
        # `dequantize` knows the 16- and 32-bit floats, but not F64.
        wide = tensor.tensor_type is GGMLQuantizationType.F64
        yield tensor.name, number, tensor.data if wide else dequantize(tensor.data, tensor.tensor_type)
    _note_types({kind.name for kind in kinds}, notes)


def _note_types(kinds: set[str], notes: list[str]) -> None:
    for kind in sorted(kinds - {"F32"}):
        notes.append(f"Stored {kind} as F32: llama.cpp rejects a file with any other type.")


def _is_safetensors(data: bytes) -> bool:
    """Whether a file starts as the format does: the length of a JSON object that lies inside it, then the
    object.
    """
    header = int.from_bytes(data[:8], "little")
    return data[8:9] == b"{" and header <= min(MAX_SAFETENSORS_HEADER, len(data) - 8)


def _safetensors_rows(
    path: str | Path, data: bytes, notes: list[str]
) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """(name, number, row) of each tensor: named by one number, or the rows of a single matrix [L, D]."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: not a sound safetensors file ({error}). Get or write it again.") from error
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    total = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise InputError(
                f"{path}: tensor {name!r} is of type {tensor.dtype}; floats are needed, of 16 bits or more."
            )
        total += tensor.numel()
        if total > MAX_NUMBERS:
            raise InputError(f"{path}: no vector has more than {MAX_NUMBERS} numbers. Is this a model?")
        if re.search(r"(?<![A-Za-z0-9])-[0-9]", name):  # a sign, and no hyphen as in layer-12
            raise InputError(
                f"{path}: tensor {name!r} has a negative number. Name each tensor by the number of its "
                "block, counted from 0."
            )
        inside = re.search(r"resid_pre|resid_mid|attn_out|mlp_out|input_layernorm", name)
        if inside:
            raise InputError(
                f"{path}: tensor {name!r} is of {inside[0]}, no block's output, where llama.cpp adds a "
                "direction. Give those of the outputs (hook_resid_post, or resid_pre of the block after)."
            )
        rows = tensor.to(torch.float32).numpy()
        numbers = re.findall(r"[0-9]+", name)
        if len(numbers) == 1 and len(numbers[0]) < 10:
            yield name, int(numbers[0]), rows
        elif len(tensors) == 1 and not numbers and rows.ndim == 2:
            yield from ((f"row {number} of {name}", number, row) for number, row in enumerate(rows))
        else:
            raise InputError(
                f"{path}: which block is tensor {name!r} of shape {list(rows.shape)} for? Accepted are names "
                "with one number, such as layer_12 or model.layers.12, or a single matrix with a row for "
                "each block."
            )
    _note_types({kinds[tensor.dtype] for tensor in tensors.values()}, notes)


def _placed(
    numbered: list[tuple[str, int, npt.NDArray[Any]]], start: int, from_format: str, notes: list[str]
) -> dict[int, npt.NDArray[Any]]:
    """Rows by block, [D] each, where the writer calls block 0 number `start`."""
    if start:
        notes.append(
            f"Moved every direction by {-start}: {from_format} numbers block 0 as {start}, and stores as "
            f"direction.N what belongs to block N{-start:+d}; llama.cpp adds direction.N after block N."
        )
    placed: dict[int, npt.NDArray[Any]] = {}
    for name, number, row in numbered:
        layer = number - start
        if layer < 0:
            raise InputError(
                f"{name!r} would be block {layer}. Is the file really from {from_format}, base {start}?"
            )
        if layer == 0:
            notes.append(
                f"Left out {name!r}: it is for block 0, which llama.cpp cannot steer; a file with "
                "direction.0 is rejected whole."
            )
            continue
        if layer in placed:
            raise InputError(f"{name!r} is the second direction for block {layer}; keep one of them.")
        if row.size != max(row.shape, default=0):
            raise InputError(
                f"{name!r} has shape {list(row.shape)}; one direction [D] for each block is needed."
            )
        placed[layer] = row.reshape(-1)
    if not placed:
        raise InputError("No direction is left that llama.cpp could use: it steers blocks from 1 on.")
    return placed


def _keepable(key: str, value: Any) -> bool:
    """Whether foreign metadata fits into provenance: short plain names, single finite values."""
    if KEY.fullmatch(key) is None or len(key) > 200 or len(str(value)) > 1000:
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and value in INT64)
