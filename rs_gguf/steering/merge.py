"""Merge adapters into a model: W' = W + scale · B A for each matrix that an adapter changes.

Takes adapter files with their scales, and the GGUF files of a model. Writes one GGUF file for programs that
load nothing else. Tensors that no adapter changes, and all metadata, keep their bytes. The file records what
was merged. Before it takes its place, llama.cpp runs it, and its next tokens are compared with the adapters'
(`merge_check`). docs/howto/front-ends.md says when a merge is needed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models import rewrite
from rs_gguf.models.header import TensorInfo
from rs_gguf.models.resolve import fingerprint
from rs_gguf.models.rewrite import Change, Part
from rs_gguf.records.files import check_writable, write_atomic
from rs_gguf.steering import lora_file
from rs_gguf.steering.container import PREFIX, SCHEMA_KEY, add_provenance, finish
from rs_gguf.steering.effect_check import other_model
from rs_gguf.steering.file import kind_of
from rs_gguf.steering.formats.glp import is_projection
from rs_gguf.steering.lora import Factors, LoraAdapter
from rs_gguf.steering.merge_check import EXACT, QUANTISED, MergeCheck, check_merge
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.vector import SteeringVector

if TYPE_CHECKING:
    from rs_gguf.engines.settings import EngineSettings

Type = GGMLQuantizationType
TYPES = {"q8_0": Type.Q8_0, "f16": Type.F16, "f32": Type.F32}
"""The types that changed matrices can be given, by the name that the command line takes."""
_FLOATS = (Type.F32, Type.F16, Type.BF16)
_SPARE = 2**20  # bytes for metadata and padding that the estimate of the file's size leaves out


@dataclass(frozen=True)
class Merged:
    """A merge: the old and new type of each changed matrix, by name; warnings; what the check observed.

    `check` is None if none was made.
    """

    changed: Mapping[str, tuple[GGMLQuantizationType, GGMLQuantizationType]]
    warnings: Sequence[str]
    check: MergeCheck | None


def merge(
    files: Sequence[tuple[Path, float]],
    model: Path,
    output: Path,
    *,
    type_: GGMLQuantizationType | None = None,
    check: bool = True,
    engine: EngineSettings | None = None,
) -> Merged:
    """Write `output`: the model with the adapters `files`, each with its scale, in its matrices.

    model: a GGUF file, or any part of a split model.
    type_: of the changed matrices. By default F32, F16 and BF16 stay, and quantised ones become Q8_0.
    check: compare the merged model with the model that has the adapters loaded.
    engine: how llama.cpp runs them; None for the defaults.

    Raises:
        InputError: a file cannot be merged faithfully, `output` is one of the inputs, or the disk is full.
        VerificationError: the check failed. Nothing is written then.
    """
    if check:  # Without the extra `run` this fails here, and not after the work.
        import rs_gguf.engines.llama.model  # noqa: F401
    parts = rewrite.parts_of(model)
    model = parts[0].path
    _check_paths([*(part.path for part in parts), *(path for path, _ in files)], output)
    adapters = [_adapter(path, model) for path, _ in files]
    scales = [scale for _, scale in files]
    merged = LoraAdapter.combined(list(zip(adapters, scales, strict=True)))
    norms = merged.norms
    if not any(norms.values()):
        raise InputError("every change is zero: the merged model would be the same. Give other scales.")
    # A matrix whose change is zero keeps its bytes.
    changes = {name: change for name, change in _changes(merged, parts, type_).items() if norms[name]}
    tensors = {tensor.name: tensor for part in parts for tensor in part.header.tensors}
    _check_space(parts, tensors, changes, output)
    entries = _entries(_facts(files, parts, changes), parts[0].header.values)
    types = {name: (Type(tensors[name].type), Type(change.type)) for name, change in changes.items()}
    exact = all(kind in (Type.F32, Type.F16) for pair in types.values() for kind in pair)
    checks: list[MergeCheck] = []

    def write(file: BinaryIO) -> None:
        rewrite.write(file, parts, changes, entries)
        if check:
            file.flush()
            # The draft takes its place only if the check passes.
            tolerance = EXACT if exact else QUANTISED
            checks.append(check_merge(Path(file.name), model, files, tolerance, engine))

    write_atomic(output, write)
    warnings = [
        f"{path}: {warning}"
        for (path, _), adapter in zip(files, adapters, strict=True)
        for warning in other_model(adapter.provenance, model)
    ]
    warnings += [
        f"the check says little: on its prompts, the adapters have an effect of {found.effect:.2g} nats at "
        f"most, within the tolerance of {found.tolerance:g}. Compare answers to prompts that they are for."
        for found in checks
        if found.effect <= found.tolerance
    ]
    return Merged(types, warnings, checks[0] if checks else None)


def _check_paths(inputs: Sequence[Path], output: Path) -> None:
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"the output {output} is one of the inputs. Choose another name.")
    if output.exists() and not output.is_file():
        raise InputError(f"{output} is not a regular file. Give the name of a file to write.")
    check_writable(output)


def _adapter(path: Path, model: Path) -> LoraAdapter:
    """Return the adapter in a file, for the family of `model`. Raise `InputError` with the reason if not."""
    if kind_of(path) is SteeringVector and is_projection(path):
        raise InputError(
            f"{path} is a GLP file. Make an adapter of it first: rs-export convert FILE --from glp --model "
            "MODEL --output F."
        )
    if kind_of(path) is SteeringVector:
        raise InputError(
            f"{path} cannot be merged: a control vector adds a bias to the output of a layer, and the model "
            "has no tensor for this bias. Load it at run time, with --control-vector."
        )
    adapter = lora_file.read(path)
    family = gguf_header.read(model).values.get("general.architecture")
    if adapter.architecture != family:
        raise InputError(
            f"{path} is for architecture {adapter.architecture!r}, but {model} is {family!r}: they do not "
            "belong together. Give the adapter's model."
        )
    return adapter


def _changes(
    adapter: LoraAdapter, parts: Sequence[Part], type_: GGMLQuantizationType | None
) -> dict[str, Change]:
    """Return the change of each matrix. Raise `InputError` with every reason why one cannot be changed."""
    tensors = {tensor.name: tensor for part in parts for tensor in part.header.tensors}
    reasons: list[str] = []
    changes: dict[str, Change] = {}
    for name, factors in adapter.factors.items():
        reason = _obstacle(name, factors, tensors, type_)
        if reason:
            reasons.append(f"{name} {reason}")
        else:
            old = Type(tensors[name].type)
            new = _new_type(old, type_)
            changes[name] = Change(new, partial(_merged_rows, name, factors, old, new))
    if reasons:
        raise InputError(
            "the adapter cannot be merged into this model:\n" + "\n".join(f"- {reason}" for reason in reasons)
        )
    return changes


def _new_type(old: GGMLQuantizationType, wanted: GGMLQuantizationType | None) -> GGMLQuantizationType:
    if wanted is not None:
        return wanted
    return old if old in _FLOATS else Type.Q8_0


def _obstacle(
    name: str, factors: Factors, tensors: Mapping[str, TensorInfo], wanted: GGMLQuantizationType | None
) -> str:
    """Return why a matrix cannot be changed; "" if it can."""
    if name not in tensors:
        return "does not exist in the model: the adapter belongs to another one."
    shape, (a, b) = list(tensors[name].shape), factors
    if len(shape) != 2:
        return "holds a matrix for each expert, which cannot be merged. Load the adapter with --lora."
    if shape != [a.shape[1], len(b)]:
        return (
            f"is {shape[1]} × {shape[0]} in the model but {len(b)} × {a.shape[1]} in the adapter, which "
            "belongs to another model."
        )
    if name.removesuffix("weight") + "scale" in tensors:
        return (
            "has a scale of its own, by which its change would be multiplied. Load the adapter with --lora."
        )
    try:
        old = Type(tensors[name].type)
        row = np.zeros((1, rewrite.size_of(tensors[name], old) // shape[1]), np.uint8)
        dequantize(row, old)
    except (ValueError, NotImplementedError):
        return f"has a type ({tensors[name].type}) that the gguf package cannot read. Load it with --lora."
    new = _new_type(old, wanted)
    if shape[0] % GGML_QUANT_SIZES[new][0]:
        return f"has rows of {shape[0]} numbers, which {new.name} cannot hold. Use --type f16."
    return ""


def _merged_rows(
    name: str,
    factors: Factors,
    old: GGMLQuantizationType,
    new: GGMLQuantizationType,
    rows: bytes,
    first: int,
) -> bytes:
    """Return W + B A for some rows of W, in the new type. `rows` are as stored; `first` is their number."""
    a, b = factors
    block, block_bytes = GGML_QUANT_SIZES[old]
    stored = np.frombuffer(rows, np.uint8).reshape(-1, a.shape[1] // block * block_bytes)
    changed = dequantize(stored, old) + b[first : first + len(stored)] @ a
    # Q8_0 keeps a factor of each block in half precision, F16 each number.
    limit = float(np.finfo(np.float32 if new in (Type.F32, Type.BF16) else np.float16).max)
    if not float(np.abs(changed).max()) <= limit:
        raise InputError(
            f"{name}: the sum is beyond the range of {new.name}. Use --type f32, or a smaller scale."
        )
    converted: bytes = quantize(changed, new).tobytes()
    return converted


def _check_space(
    parts: Sequence[Part],
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Change],
    output: Path,
) -> None:
    size = sum(part.path.stat().st_size for part in parts) + _SPARE
    for name, change in changes.items():
        size += rewrite.size_of(tensors[name], change.type) - rewrite.size_of(
            tensors[name], tensors[name].type
        )
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed for {output.name}. "
            "Free space or choose another folder."
        )


def _facts(
    files: Sequence[tuple[Path, float]], parts: Sequence[Part], changes: Mapping[str, Change]
) -> dict[str, ProvenanceValue]:
    """Return what was merged, under `merge.N.` with the first N that the model does not have yet."""
    known = re.compile(rf"{re.escape(PREFIX)}merge\.([0-9]{{1,9}})\..*")
    taken = [int(match[1]) for key in parts[0].header.values if (match := known.fullmatch(key))]
    start = max(taken, default=-1) + 1
    names = [_name(part.path) for part in parts]
    hashes = [fingerprint(part.path) for part in parts]
    facts: dict[str, ProvenanceValue] = {}
    for number, (path, scale) in enumerate(files, start):
        facts |= {
            f"merge.{number}.file": _name(path),
            f"merge.{number}.sha256": fingerprint(path),
            f"merge.{number}.scale": float(scale),
            f"merge.{number}.model": names,
            f"merge.{number}.model_sha256": hashes,
            f"merge.{number}.types": sorted({Type(change.type).name for change in changes.values()}),
        }
    return facts


def _name(path: Path) -> str:
    """Return a file's name as UTF-8 can hold it: Linux allows any bytes."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def _entries(facts: Mapping[str, ProvenanceValue], present: Mapping[str, object]) -> list[bytes]:
    """Return the facts as metadata entries, as they are stored in a GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.gguf"
        writer = GGUFWriter(path, "facts")
        add_provenance(writer, facts)
        finish(writer)
        data, spans = path.read_bytes(), gguf_header.read(path).spans
    keys = [key for key in spans if key.startswith(PREFIX) and not (key == SCHEMA_KEY and key in present)]
    return [data[slice(*spans[key])] for key in keys]
