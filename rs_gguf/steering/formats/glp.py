"""Read and write GLP files: projections h ← h − α (h·d) d of the residual stream, one direction a layer.

A GLP file (github.com/msuiche/weightless, spec/GLP.md) looks like a control vector and says
`glp.mode = project`. llama.cpp does not read this key and would add the directions. So a projection becomes
an adapter of the output matrices, as in directional ablation, and such an adapter becomes a GLP file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models.architecture import is_experts_output, is_output_matrix, split_name
from rs_gguf.models.resolve import fingerprint
from rs_gguf.records.files import sha256
from rs_gguf.steering.ablation import ablated, outputs_along
from rs_gguf.steering.container import add_provenance, finish, metadata, write_verified
from rs_gguf.steering.formats.vectors import keepable
from rs_gguf.steering.guard import open_gguf
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import ARCHITECTURE, MODE_KEY

# The points at which a file may ask for its projection, with the output matrices that add there.
_RESIDUAL = "residual_stream_post_layer"
HOOKS = {
    _RESIDUAL: ("attn_output", "ffn_down"),
    "attn_out_pre_residual": ("attn_output",),
    "ffn_out_pre_residual": ("ffn_down",),
}
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]*)")
_TOLERANCE = 1e-3  # relative, of what is compared in float32
_UNIT = 1e-2  # by how much the length of a direction may differ from 1


@dataclass(frozen=True, eq=False)
class Projection:
    """The content of a GLP file. `vector`: its directions. `alpha`: 1 removes the component along them.

    `hook` is one of `HOOKS`. `provenance`: the file's own facts, or the adapter's.
    """

    kind: ClassVar[str] = "GLP projection"
    part: ClassVar[str] = "layer"

    vector: SteeringVector
    alpha: float
    hook: str
    provenance: Mapping[str, ProvenanceValue] = field(default_factory=dict)

    @property
    def contents(self) -> dict[str, ProvenanceValue]:
        """The kind of file and what it projects out, for display."""
        return {**self.vector.contents, "kind": self.kind, "alpha": self.alpha, "hook_point": self.hook}

    @property
    def norms(self) -> dict[int, float]:
        """The Euclidean norm of each direction; 1 by the specification."""
        return self.vector.norms

    def cosines(self, other: Projection) -> dict[int, float]:
        """Return the cosine at each layer of both. Raise `InputError` if their widths differ."""
        return self.vector.cosines(other.vector)


def is_projection(path: Path) -> bool:
    """Return whether a GGUF file says that its directions are not to be added."""
    return bool(metadata(open_gguf(path)).get(MODE_KEY, "add") != "add")


def read(path: Path) -> Projection:
    """Read a GLP file with one direction a layer. Raise `InputError` with the reason if it is not one."""
    reader = open_gguf(path)
    values = metadata(reader)
    fault = _fault(values)
    directions: dict[int, Any] = {}
    for tensor in reader.tensors:
        number = _TENSOR.fullmatch(tensor.name)
        if number is None or tensor.tensor_type != GGMLQuantizationType.F32:
            fault = fault or f"tensor {tensor.name!r} is not an F32 tensor direction.N"
        else:
            directions[int(number[1])] = np.array(tensor.data)
    layers = ",".join(map(str, sorted(directions)))
    if values.get("glp.layer_ids_zero_based", layers) != layers:
        fault = fault or f"its layers are {layers}, but glp.layer_ids_zero_based says otherwise"
    if fault:
        raise InputError(
            f"{path} cannot be read as a GLP file: {fault}. Get a file with one direction a layer."
        )
    hint = values.get(f"{ARCHITECTURE}.model_hint", "")
    facts = {key: value for key, value in values.items() if keepable(key, value)}
    vector = SteeringVector(directions, {}, hint if isinstance(hint, str) else "")
    alpha, hook = float(values.get("glp.alpha_default", 1.0)), values.get("glp.hook_point", _RESIDUAL)
    return Projection(vector, alpha, hook, facts)


def _fault(values: Mapping[str, Any]) -> str:
    """Return why this release cannot apply a file with this metadata; "" if it can."""
    mode, version = values.get(MODE_KEY), values.get("glp.spec_version", 1)
    hook, alpha = values.get("glp.hook_point", _RESIDUAL), values.get("glp.alpha_default", 1.0)
    if mode != "project":
        return f"{MODE_KEY} is {mode!r:.80}; 'project' is accepted"
    if version not in (1, 2):
        return f"glp.spec_version is {version!r:.80}; 1 and 2 are accepted"
    if values.get("glp.rank", 1) != 1 or "glp.dir_scales" in values or "glp.layer_scales" in values:
        return "it has several directions a layer, or a scale for each layer"
    if not isinstance(hook, str) or hook not in HOOKS:
        return f"glp.hook_point is {hook!r:.80}; accepted are {', '.join(HOOKS)}"
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return f"glp.alpha_default is {alpha!r:.80}; a finite number is needed"
    return ""


def write(projection: Projection, path: Path) -> None:
    """Write a GLP file completely or not at all; read it back and compare. The same content, the same bytes.

    Raises:
        InputError: `path` cannot be written.
        VerificationError: the content that was read back differs.
    """

    def same(draft: Path) -> bool:
        found = read(draft)
        return (found.vector, found.hook) == (projection.vector, projection.hook) and math.isclose(
            found.alpha, projection.alpha, rel_tol=1e-6
        )

    write_verified(path, lambda draft: _serialise(projection, draft), same)


def _serialise(projection: Projection, path: Path) -> None:
    directions = projection.vector.directions
    writer = GGUFWriter(path, ARCHITECTURE)
    if projection.vector.architecture:
        writer.add_string(f"{ARCHITECTURE}.model_hint", projection.vector.architecture)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    writer.add_string(MODE_KEY, "project")
    writer.add_uint32("glp.spec_version", 1)
    writer.add_float32("glp.alpha_default", projection.alpha)
    writer.add_uint32("glp.rank", 1)
    writer.add_string("glp.hook_point", projection.hook)
    writer.add_string("glp.layer_ids_zero_based", ",".join(map(str, directions)))
    rows = b"".join(row.tobytes() for row in directions.values())
    writer.add_string("glp.content_sha256", hashlib.sha256(rows).hexdigest())
    add_provenance(writer, projection.provenance)
    for layer, row in directions.items():
        writer.add_tensor(f"direction.{layer}", row)
    finish(writer)


def to_adapter(path: Path, model: Path) -> tuple[LoraAdapter, tuple[str, ...]]:
    """Return the GLP file at `path` as an adapter of a GGUF model, with a sentence for each difference.

    Each output matrix W of a layer becomes W − α d dᵀW. So the layer adds nothing along d, if α is 1.

    Raises:
        InputError: the file is not a GLP file that can be read, or the model does not fit it.
    """
    projection = read(path)
    header = gguf_header.read(model)
    family = header.values.get("general.architecture", "")
    width = header.values.get(f"{family}.embedding_length")
    n_layer = header.values.get(f"{family}.block_count", 0)
    vector = projection.vector
    if vector.width != width or vector.layers[-1] >= n_layer:
        raise InputError(
            f"{path} has width {vector.width} and layers up to {vector.layers[-1]}, but {model} has width "
            f"{width} and {n_layer} layers. Give the model of the file."
        )
    others = [tensor.name for tensor in header.tensors if _is_other(tensor.name, vector)]
    if others:
        raise InputError(
            f"{model} also adds to the residual stream through {others[0]}, which an adapter of single "
            "matrices cannot change. Use a program that reads GLP files."
        )
    matrices = HOOKS[projection.hook]
    factors = {
        name: ablated(vector.directions[split_name(name)[0]], along, projection.alpha)
        for name, along in outputs_along(model, vector.directions)
        if split_name(name)[1] in matrices
    }
    provenance: dict[str, ProvenanceValue] = {
        **{f"source.{key}": value for key, value in projection.provenance.items()},
        "source.format": "glp", "source.file": path.name, "source.sha256": sha256(path),
        "model.name": model.stem, "model.sha256": fingerprint(model),
    }  # fmt: skip
    notes = ["The adapter changes what each matrix adds. Biases and earlier layers keep their part."]
    if projection.hook == _RESIDUAL and projection.alpha != 1:
        notes.append(
            f"The file's strength, {projection.alpha:g}, is meant for the whole residual stream. For what "
            "matrices add, another one may be needed: sweep it with `rs-export eval --scales`."
        )
    if any(abs(norm - 1) > _UNIT for norm in projection.norms.values()):
        notes.append("The directions do not have length 1, as the format's specification demands.")
    if any(
        tensor.name.endswith(("post_attention_norm.weight", "post_ffw_norm.weight"))
        for tensor in header.tensors
    ):
        notes.append(
            "This model scales the products of these matrices afterwards, so some of the component returns."
        )
    return LoraAdapter(factors, family, provenance), tuple(notes)


def _is_other(tensor: str, vector: SteeringVector) -> bool:
    """Return whether a tensor adds to a layer of the file in a way that no hook names: experts, a state."""
    if not (is_output_matrix(tensor) or is_experts_output(tensor)):
        return False
    layer, matrix = split_name(tensor)
    return layer in vector.layers and matrix not in HOOKS[_RESIDUAL]


def of_adapter(adapter: LoraAdapter, model: Path) -> tuple[Projection, tuple[str, ...]]:
    """Return a directional ablation of a GGUF model as a projection, with a sentence for each difference.

    Raises:
        InputError: the adapter is not a directional ablation of this model, or changes only layer 0.
    """
    kinds = adapter.matrices
    hook = next((hook for hook, matrices in HOOKS.items() if sorted(matrices) == kinds), None)
    if hook is None or adapter.rank != 1:
        raise _not_ablation(f"it changes {', '.join(kinds)} with rank {adapter.rank}")
    directions: dict[int, NDArray[np.float32]] = {}
    for name, (_, b) in adapter.factors.items():
        directions.setdefault(split_name(name)[0], -b[:, 0] / np.linalg.norm(b[:, 0]))
    alphas: dict[str, float] = {}
    for name, along in outputs_along(model, directions):
        layer, matrix = split_name(name)
        if matrix in kinds:
            alphas[name] = _alpha(name, adapter, directions[layer], along)
    if missing := adapter.factors.keys() - alphas.keys():
        raise _not_ablation(f"{min(missing)} is not in {model}")
    alpha = float(np.median(list(alphas.values())))
    odd = [name for name, value in alphas.items() if not math.isclose(value, alpha, rel_tol=_TOLERANCE)]
    if odd:
        raise _not_ablation(f"its strength is {alpha:.4g}, but {alphas[odd[0]]:.4g} at {odd[0]}")
    notes = ["A projection removes the whole component, also what the embedding and biases added."]
    if hook == _RESIDUAL and not math.isclose(alpha, 1, rel_tol=_TOLERANCE):
        notes.append(
            f"The strength, {alpha:.4g}, is of single matrices. A projection repeats it at each layer, so "
            "another one may be needed."
        )
    if directions.pop(0, None) is not None:
        notes.append("Left out layer 0, which the format cannot hold.")
    vector = SteeringVector(directions, {}, adapter.architecture)
    return Projection(vector, alpha, hook, adapter.provenance), tuple(notes)


def _alpha(
    name: str, adapter: LoraAdapter, direction: NDArray[np.float32], along: NDArray[np.float32]
) -> float:
    """Return α if the change of a matrix is −α d dᵀW; `along` is dᵀW. Raise `InputError` if it is not."""
    if name not in adapter.factors:
        raise _not_ablation(f"it leaves {name} as it is")
    a, b = adapter.factors[name]
    removed = -(direction @ b) @ a  # dᵀ(−B A), α dᵀW in an ablation
    alpha = float(removed @ along / (along @ along))
    change = float(np.linalg.norm(b) * np.linalg.norm(a))
    rest = np.linalg.norm(b[:, 0] - (direction @ b) * direction) * np.linalg.norm(a)
    if not max(float(np.linalg.norm(removed - alpha * along)), float(rest)) <= _TOLERANCE * change:
        raise _not_ablation(f"{name} does not lose what it adds along a direction")
    return alpha


def _not_ablation(why: str) -> InputError:
    return InputError(
        f"the adapter is not a directional ablation of this model: {why}. Only one that changes "
        f"{' and '.join(HOOKS[_RESIDUAL])} of each of its layers by −α d dᵀW becomes a GLP file."
    )
