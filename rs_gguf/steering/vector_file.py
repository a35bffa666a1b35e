"""llama.cpp control vector files: read, write, and judge whether they will do anything.

In: a GGUF file, or a `SteeringVector`. Out: the other, or a report of every fault. llama.cpp logs a faulty
file and runs on unsteered, so the rules here are those of its loader (common/common.cpp,
`common_control_vector_load_one`), each with its own words, plus what it accepts in silence although no user
wants it. The format is described in docs/control-vectors.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from rs_gguf.errors import InputError
from rs_gguf.models.architecture import MAX_LAYERS
from rs_gguf.steering.container import (
    SCHEMA_KEY,
    add_provenance,
    finish,
    metadata,
    provenance_of,
    schema_faults,
    write_verified,
)
from rs_gguf.steering.guard import StricterThanLlamaCpp, open_gguf
from rs_gguf.steering.report import CheckReport
from rs_gguf.steering.vector import SteeringVector

ARCHITECTURE = "controlvector"
NORM_RATIO = 100.0
"""Longest over shortest direction from which `check` warns; the residual stream of one model seldom spans as
much.
"""


def read(path: str | Path) -> SteeringVector:
    """Read a control vector that llama.cpp accepts, with its provenance.

    Metadata of other tools is left out. Raises `InputError` with every reason when `check` would find an
    error.
    """
    report = check(path)
    if report.found is None:
        raise InputError(
            f"{path} is no usable control vector:\n" + "\n".join(f"- {e}" for e in report.errors)
        )
    return report.found


def write(vector: SteeringVector, path: str | Path) -> None:
    """Write `vector` for `--control-vector`, whole or not at all; the same vector gives the same bytes.

    The file is read back and compared, before it takes its place and after. Raises `InputError` when the
    vector is zero everywhere or the place cannot be written, `VerificationError` when what was read differs from what
    was meant.
    """
    path = Path(path)
    if not any(row.any() for row in vector.directions.values()):
        raise InputError(f"Every direction is zero: {path} would do nothing. Choose other weights or blocks.")
    write_verified(path, lambda draft: _serialise(vector, draft), lambda draft: read(draft) == vector)


def check(path: str | Path) -> CheckReport[SteeringVector]:
    """Judge a file by the rules of llama.cpp's loader and of common sense, collecting every reason.

    Never raises for a bad vector.
    """
    try:
        reader = open_gguf(path)
    except InputError as error:
        known = not isinstance(error, StricterThanLlamaCpp)
        says = f"failed to load control vector file from {path}" if known else ""
        return CheckReport(str(path), errors=(str(error),), warnings=(), loader_says=says)
    survey = _Survey(reader)
    vector = survey.vector()
    says = survey.complaints[0].replace("%s", str(path)) if survey.complaints else ""
    return CheckReport(str(path), tuple(survey.errors), tuple(survey.warnings), says, vector)


def loader_layer(name: str) -> int | None:
    """The number that llama.cpp reads in a tensor name: `direction.` and what std::stoi makes of the rest."""
    match = re.match(r"direction\.[ \t\n\v\f\r]*([+-]?[0-9]+)", name)
    value = int(match[1]) if match else None
    return value if value is not None and -(2**31) <= value < 2**31 else None


class _Survey:
    """One pass over an opened file that notes everything worth saying."""

    def __init__(self, reader: GGUFReader) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.complaints: list[str] = []  # of llama.cpp's loader, which stops at the first
        self.rows: dict[int, np.ndarray[Any, np.dtype[np.float32]]] = {}
        self.values = metadata(reader)
        self.tensors(reader)
        self.numbers()
        self.header(reader)

    def vector(self) -> SteeringVector | None:
        """The content, as far as it makes a vector; notes provenance that cannot be kept."""
        if self.errors:
            return None
        provenance = provenance_of(self.values)
        hint = self.values.get(f"{ARCHITECTURE}.model_hint", "")
        try:
            return SteeringVector(self.rows, provenance, hint if isinstance(hint, str) else "")
        except InputError as error:
            self.errors.append(str(error))
            return None

    def tensors(self, reader: GGUFReader) -> None:
        width: int | None = None
        names: defaultdict[int, list[str]] = defaultdict(list)
        for tensor in reader.tensors:
            faults = list(_faults(tensor, width))
            self.complaints += [says for says, _ in faults]
            self.errors += [f"{tensor.name!r}: {reason}" for _, reason in faults]
            layer = loader_layer(tensor.name)
            if faults or layer is None:
                continue
            width = width or int(tensor.n_elements)
            names[layer].append(tensor.name)
            self.rows[layer] = np.array(tensor.data, dtype=np.float32).reshape(-1)
            if tensor.name != f"direction.{layer}":
                self.warnings.append(f"{tensor.name!r}: llama.cpp reads direction.{layer}, others may not.")
        if not reader.tensors:
            self.complaints.append("no direction tensors found in %s")
            self.errors.append("The file holds no tensor: there is nothing to add.")
        for layer, same in names.items():
            if len(same) > 1:
                self.errors.append(f"{same} all mean block {layer}; llama.cpp adds them up. Keep one.")
        beyond = [layer for layer in names if layer >= MAX_LAYERS]
        if beyond:
            self.errors.append(
                f"{len(beyond)} directions, first direction.{beyond[0]}, are for blocks that no model has: "
                f"llama.cpp ends before block {MAX_LAYERS}."
            )

    def numbers(self) -> None:
        norms: dict[int, float] = {}
        for layer, row in self.rows.items():
            bad = int((~np.isfinite(row)).sum())
            if bad:
                self.errors.append(
                    f"direction.{layer}: {bad} of {len(row)} values are NaN or Inf; llama.cpp adds them in "
                    "silence and every answer becomes nonsense."
                )
            else:
                norms[layer] = float(np.linalg.norm(row.astype(np.float64)))
        zero = [layer for layer, norm in norms.items() if norm == 0.0]
        if zero and len(zero) == len(self.rows):
            self.errors.append("Every direction is zero: the file would do nothing.")
        elif zero:
            self.warnings.append(f"The directions of blocks {zero} are zero: they do nothing.")
        positive = {layer: norm for layer, norm in norms.items() if norm > 0.0}
        if positive:
            low, high = min(positive, key=positive.__getitem__), max(positive, key=positive.__getitem__)
            if positive[high] > NORM_RATIO * positive[low]:
                self.warnings.append(
                    f"The norms differ wildly: {positive[low]:.3g} at block {low}, {positive[high]:.3g} at "
                    f"block {high}. One scale cannot suit both."
                )

    def header(self, reader: GGUFReader) -> None:
        self.errors += schema_faults(self.values)
        kind = self.values.get("general.architecture")
        if kind != ARCHITECTURE:
            self.warnings.append(f"general.architecture is {kind!r:.80}, by convention {ARCHITECTURE!r}.")
        if not isinstance(self.values.get(f"{ARCHITECTURE}.model_hint"), str):
            self.warnings.append(f"{ARCHITECTURE}.model_hint is missing: nothing says which model it is for.")
        self.shift(reader, written_here=SCHEMA_KEY in self.values)

    def shift(self, reader: GGUFReader, written_here: bool) -> None:
        """Recognise the two writers that store block N as direction.N+1, by the traces they leave in the
        header.
        """
        key = f"{ARCHITECTURE}.layer_count"
        count, field = self.values.get(key), reader.fields.get(key)
        if written_here or field is None or not isinstance(count, int) or not self.rows:
            return
        origin = ""
        # llama-cvector-generator alone writes a signed count, with every block from 1 on (export_gguf there).
        if field.types == [GGUFValueType.INT32] and list(self.rows) == list(range(1, count + 1)):
            origin = "cvector-generator"
        # jukofyork/control-vectors writes the model's block count, others the number of directions.
        elif count > len(self.rows) and max(self.rows) <= count:
            origin = "jukofyork"
        if origin:
            self.warnings.append(
                f"It looks like the work of {origin}, which stores what it measured at block N as "
                f"direction.N+1, one block late. If so: rs-export convert FILE --from {origin} --output F."
            )


def _faults(tensor: Any, width: int | None) -> Iterator[tuple[str, str]]:
    """(the loader's words, ours) for each reason why llama.cpp rejects the whole file at this tensor."""
    layer = loader_layer(tensor.name)
    if layer is None or layer < 0:
        yield (
            "invalid/unparsable direction tensor layer index in %s",
            "only tensors named direction.N, N from 1, are accepted.",
        )
    elif layer == 0:
        yield (
            "invalid (zero) direction tensor layer index in %s",
            "block 0 cannot be steered, and this tensor makes llama.cpp reject the whole file.",
        )
    if tensor.tensor_type != GGMLQuantizationType.F32:
        yield (
            "invalid (non-F32) direction tensor type in %s",
            f"the type is {tensor.tensor_type.name}; F32 is needed.",
        )
    # Trailing dimensions of 1 do not count for ggml_n_dims, and `shape` is in ggml's order.
    shape = [int(size) for size in tensor.shape]
    if max(shape[1:], default=1) > 1:
        yield (
            "invalid (non-1D) direction tensor shape in %s",
            f"the shape is {shape}; one dimension is needed.",
        )
    elif width is not None and tensor.n_elements != width:
        yield (
            "direction tensor in %s does not match previous dimensions",
            f"it is {tensor.n_elements} wide, the directions before it {width}.",
        )


def _serialise(vector: SteeringVector, path: Path) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    if vector.architecture:
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.architecture)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.directions))
    add_provenance(writer, vector.provenance)
    for layer, row in vector.directions.items():
        writer.add_tensor(f"direction.{layer}", row)
    finish(writer)
