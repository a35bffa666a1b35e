"""Drawings of the fit: cosines between the layers of a direction, and activations at its best layer.

The arrays of a run folder go in, with the kinds of prompts and their confidences. Marks for inline SVG come
out. Arrays that were not kept leave nothing to draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from rs_gguf.activations.scores import principal_components
from rs_gguf.errors import InputError
from rs_gguf.machine import one_thread
from rs_gguf.records.conversation import KINDS, NEUTRAL
from rs_gguf.records.metrics import FileRecord
from rs_gguf.records.rows import Row, finite
from rs_gguf.report.plots import Axis, thinned

_SIDE = 400  # of the map, in its own coordinates
_SHADES = 10  # of each sign
_MARKS = 1500  # prompts that are drawn at most
_BOX = {"left": 20, "right": 480, "top": 12, "bottom": 330}


def cosine_map(folder: Path, file: FileRecord) -> Row | None:
    """Return cosines between all layers of the written direction, equal shades in one path each.

    `near` [L]: the cosine of each layer with the next, None at the last and where there is no direction.
    `band`: its mean over pairs of the steered layers.
    """
    directions = _read(folder / "directions.safetensors", f"{file.estimator}@{file.ridge:g}/unit")
    if directions is None:
        return None
    rows = directions.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    known = np.isfinite(norms) & (norms > 0)
    unit = np.where(known[:, np.newaxis], rows / np.where(known, norms, 1)[:, np.newaxis], np.nan)
    with one_thread():
        cosines = unit @ unit.T
    layers, (first, last) = len(rows), file.layers
    inside = cosines[first : last + 1, first : last + 1]
    others = inside[~np.eye(len(inside), dtype=bool) & np.isfinite(inside)]
    size = _SIDE / layers
    return {
        "side": _SIDE,
        "layers": layers,
        "size": round(size, 3),
        "shades": _shades(cosines),
        "edges": (round(first * size, 2), round((last + 1) * size, 2)),
        "near": [*(finite(cosines[k, k + 1]) for k in range(layers - 1)), None],
        "band": float(others.mean()) if len(others) else None,
    }


def _shades(cosines: NDArray[np.float64]) -> list[Row]:
    """Return one SVG path a shade: runs of layer pairs of a row that round to it, in units of a pair."""
    paths: dict[int, list[str]] = {}
    shades = np.where(np.isfinite(cosines), np.rint(np.nan_to_num(cosines) * _SHADES), 0).astype(int)
    for y, row in enumerate(shades):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, end in itertools.pairwise(edges):
            paths.setdefault(int(row[start]), []).append(f"M{start} {y}h{end - start}v1h{start - end}z")
    return [
        {"sign": "plus" if shade > 0 else "minus", "share": abs(shade) / _SHADES, "path": "".join(path)}
        for shade, path in sorted(paths.items())
        if shade
    ]


def scatter(
    folder: Path, file: FileRecord, auroc: Sequence[float | None], prompts: Sequence[Row]
) -> Row | None:
    """Return two principal components of the fit prompts at the steered layer that separates refusals best.

    Prompts that are unjudged or within the neutral band are left out.

    Args:
        file: the control vector.
        auroc: [L], of the written direction.
        prompts: `kind` and `confidence` of each answered prompt, in the order of the store. Gate-only prompts
            come after them there.
    """
    first, last = file.layers
    layer = max(range(first, last + 1), key=lambda k: (auroc[k] or 0.0) if k < len(auroc) else 0.0)
    parts: list[NDArray[np.float32]] = []
    for path in sorted((folder / "activations").glob("[0-9]*.safetensors")):
        if sum(map(len, parts)) >= len(prompts):
            break  # the others are gate-only prompts
        part = _read(path, "activations", layer)
        if part is None:
            return None
        parts.append(part)
    if sum(map(len, parts)) < len(prompts):
        return None
    confidences = [0.0 if row["confidence"] is None else row["confidence"] for row in prompts]
    clear = [i for i, confidence in enumerate(confidences) if abs(confidence) > NEUTRAL]
    kept = thinned(clear, _MARKS)
    if len(kept) < 3:
        return None
    rows = np.concatenate(parts)[kept].astype(np.float64)
    try:
        with one_thread():
            scores, shares = principal_components(rows)
    except InputError:  # they do not vary
        return None
    across = Axis.over(scores[:, 0].tolist(), _BOX["left"], _BOX["right"])
    upward = Axis.over(scores[:, 1].tolist(), _BOX["bottom"], _BOX["top"])
    groups = []
    for kind, refused in itertools.product(KINDS, (False, True)):
        places = [
            (across.at(x), upward.at(y))
            for i, (x, y) in zip(kept, scores.tolist(), strict=True)
            if prompts[i]["kind"] == kind and (confidences[i] > 0) == refused
        ]
        if places:
            groups.append({"kind": kind, "refused": refused, "n": len(places), "places": places})
    return {**_BOX, "layer": layer, "shares": shares.tolist(), "groups": groups, "n": len(kept)}


def _read(path: Path, name: str, layer: int | None = None) -> NDArray[np.float32] | None:
    """Return an array of a safetensors file, or one layer of it; None if the file or the array is missing."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            if name not in file.keys():  # noqa: SIM118 - the file is not a mapping
                return None
            array: NDArray[np.float32] = (
                file.get_tensor(name) if layer is None else file.get_slice(name)[:, layer, :]
            )
            return array
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error
