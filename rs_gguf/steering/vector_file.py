"""Read, write and check control vector files, which llama.cpp loads with `--control-vector`.

In: a GGUF file or a `SteeringVector`. Out: the vector or the file, or a report of every fault. llama.cpp logs
a faulty file and goes on unsteered. The rules here follow its loader (common/common.cpp,
`common_control_vector_load_one`) and quote its messages. They also cover content that llama.cpp accepts
silently although it is useless. The format is described in docs/control-vectors.md.
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
MODE_KEY = "glp.mode"
"""What to do with the directions, in files of weightless: `add`, as llama.cpp does, or `project`."""
NORM_RATIO = 100.0
"""`check` warns if the largest norm exceeds the smallest by this factor; few models span so much."""


def read(path: str | Path) -> SteeringVector:
    """Read a control vector that llama.cpp accepts, with its provenance.

    Metadata of other tools is left out. Raise `InputError` with every error that `check` reports.
    """
    report = check(path)
    if report.content is None:
        raise InputError(
            f"{path} is not a usable control vector:\n" + "\n".join(f"- {e}" for e in report.errors)
        )
    return report.content


def write(vector: SteeringVector, path: str | Path) -> None:
    """Write `vector` for `--control-vector` completely or not at all; read it back and compare.

    The same vector gives the same bytes.

    Raises:
        InputError: the vector is zero everywhere, or `path` cannot be written.
        VerificationError: the content that was read back differs.
    """
    path = Path(path)
    if not any(row.any() for row in vector.directions.values()):
        raise InputError(f"every direction is zero: {path} would do nothing. Choose other weights or layers.")
    write_verified(path, lambda draft: _serialise(vector, draft), lambda draft: read(draft) == vector)


def check(path: str | Path) -> CheckReport[SteeringVector]:
    """Check a file against the rules of llama.cpp's loader and for useless content; report every reason.

    A bad vector raises nothing.
    """
    try:
        reader = open_gguf(path)
    except InputError as error:
        refused_by_llama_cpp = not isinstance(error, StricterThanLlamaCpp)
        loader_says = f"failed to load control vector file from {path}" if refused_by_llama_cpp else ""
        return CheckReport(str(path), errors=(str(error),), warnings=(), loader_says=loader_says)
    survey = _Survey(reader)
    vector = survey.vector()
    # llama.cpp's loader stops at its first complaint.
    loader_says = survey.complaints[0].replace("%s", str(path)) if survey.complaints else ""
    return CheckReport(str(path), tuple(survey.errors), tuple(survey.warnings), loader_says, vector)


def loader_layer(name: str) -> int | None:
    """Return the layer that llama.cpp reads in a tensor name with std::stoi; None if it finds none."""
    match = re.match(r"direction\.[ \t\n\v\f\r]*([+-]?[0-9]+)", name)
    value = int(match[1]) if match else None
    return value if value is not None and -(2**31) <= value < 2**31 else None


class _Survey:
    """One pass over an open file that collects all errors and warnings."""

    def __init__(self, reader: GGUFReader) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.complaints: list[str] = []  # the lines that llama.cpp's loader would log
        self.rows: dict[int, np.ndarray[Any, np.dtype[np.float32]]] = {}
        self.values = metadata(reader)
        self.tensors(reader)
        self.numbers()
        self.header(reader)

    def vector(self) -> SteeringVector | None:
        """Return the content, or None if there is an error; provenance that cannot be kept is one."""
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
            self.complaints += [complaint for complaint, _ in faults]
            self.errors += [f"{tensor.name!r}: {reason}" for _, reason in faults]
            layer = loader_layer(tensor.name)
            if faults or layer is None:
                continue
            width = width or int(tensor.n_elements)
            names[layer].append(tensor.name)
            self.rows[layer] = np.array(tensor.data, dtype=np.float32).reshape(-1)
            if tensor.name != f"direction.{layer}":
                self.warnings.append(
                    f"{tensor.name!r}: llama.cpp reads direction.{layer}, other programs may not."
                )
        if not reader.tensors:
            self.complaints.append("no direction tensors found in %s")
            self.errors.append("the file holds no tensor: there is nothing to add.")
        for layer, duplicates in names.items():
            if len(duplicates) > 1:
                self.errors.append(f"{duplicates} all name layer {layer}; llama.cpp adds them up. Keep one.")
        too_high = [layer for layer in names if layer >= MAX_LAYERS]
        if too_high:
            self.errors.append(
                f"{len(too_high)} directions, first direction.{too_high[0]}, are for layers that no model "
                f"has: llama.cpp supports layers up to {MAX_LAYERS - 1}."
            )

    def numbers(self) -> None:
        norms: dict[int, float] = {}
        for layer, row in self.rows.items():
            bad = int((~np.isfinite(row)).sum())
            if bad:
                self.errors.append(
                    f"direction.{layer}: {bad} of {len(row)} values are NaN or Inf; llama.cpp adds them "
                    "silently and every answer becomes nonsense."
                )
            else:
                norms[layer] = float(np.linalg.norm(row.astype(np.float64)))
        zero = [layer for layer, norm in norms.items() if norm == 0.0]
        if zero and len(zero) == len(self.rows):
            self.errors.append("every direction is zero: the file would do nothing.")
        elif zero:
            self.warnings.append(f"the directions of layers {zero} are zero: they do nothing.")
        positive = {layer: norm for layer, norm in norms.items() if norm > 0.0}
        if positive:
            low, high = min(positive, key=positive.__getitem__), max(positive, key=positive.__getitem__)
            if positive[high] > NORM_RATIO * positive[low]:
                self.warnings.append(
                    f"the norms differ by a factor above {NORM_RATIO:g}: {positive[low]:.3g} at layer {low}, "
                    f"{positive[high]:.3g} at layer {high}. One scale cannot suit both."
                )

    def header(self, reader: GGUFReader) -> None:
        self.errors += schema_faults(self.values)
        mode = self.values.get(MODE_KEY, "add")
        if mode != "add":
            self.errors.append(
                f"{MODE_KEY} is {mode!r:.80}: the directions are not to be added, but llama.cpp would add "
                "them without a message. If they are to be projected out ('project'), convert the file into "
                "an adapter: rs-export convert FILE --from glp --model MODEL --output F."
            )
        kind = self.values.get("general.architecture")
        if kind != ARCHITECTURE:
            self.warnings.append(
                f"general.architecture is {kind!r:.80}; by convention it is {ARCHITECTURE!r}."
            )
        if not isinstance(self.values.get(f"{ARCHITECTURE}.model_hint"), str):
            self.warnings.append(f"{ARCHITECTURE}.model_hint is missing: the file does not name its model.")
        self.layer_shift(reader, written_here=SCHEMA_KEY in self.values)

    def layer_shift(self, reader: GGUFReader, written_here: bool) -> None:
        """Warn if the header shows one of the two source tools that store layer N as direction.N+1."""
        key = f"{ARCHITECTURE}.layer_count"
        count, field = self.values.get(key), reader.fields.get(key)
        if written_here or field is None or not isinstance(count, int) or not self.rows:
            return
        origin = ""
        # Only llama-cvector-generator writes a signed count, and every layer from 1 on (its export_gguf).
        if field.types == [GGUFValueType.INT32] and list(self.rows) == list(range(1, count + 1)):
            origin = "cvector-generator"
        # jukofyork/control-vectors writes the model's layer count, other tools the number of directions.
        elif count > len(self.rows) and max(self.rows) <= count:
            origin = "jukofyork"
        if origin:
            self.warnings.append(
                f"the file looks like one of {origin}, which stores the direction of layer N as "
                f"direction.N+1, one layer late. If so: rs-export convert FILE --from {origin} --output F."
            )


def _faults(tensor: Any, width: int | None) -> Iterator[tuple[str, str]]:
    """Yield (the loader's message, our message) for each reason why llama.cpp rejects the file here.

    `width` is the width of the directions before it; None for the first one.
    """
    layer = loader_layer(tensor.name)
    if layer is None or layer < 0:
        yield (
            "invalid/unparsable direction tensor layer index in %s",
            "only tensors named direction.N, N from 1, are accepted.",
        )
    elif layer == 0:
        yield (
            "invalid (zero) direction tensor layer index in %s",
            "layer 0 cannot be steered, and this tensor makes llama.cpp reject the whole file.",
        )
    if tensor.tensor_type != GGMLQuantizationType.F32:
        yield (
            "invalid (non-F32) direction tensor type in %s",
            f"the type is {tensor.tensor_type.name}; F32 is needed.",
        )
    # `shape` is in ggml's order, and ggml_n_dims does not count trailing dimensions of 1.
    shape = [int(size) for size in tensor.shape]
    if max(shape[1:], default=1) > 1:
        yield (
            "invalid (non-1D) direction tensor shape in %s",
            f"the shape is {shape}; one dimension is needed.",
        )
    elif width is not None and tensor.n_elements != width:
        yield (
            "direction tensor in %s does not match previous dimensions",
            f"the width is {tensor.n_elements}, but the directions before it have {width}.",
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
