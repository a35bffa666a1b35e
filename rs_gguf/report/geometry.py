"""What the fit saw, drawn: cosines between a direction's blocks, and the activations of its best block.

The arrays of a run folder go in, with the names of prompts and their confidences; marks for inline SVG come
out. Arrays that are not there, because only the results were kept, leave nothing to draw.
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
from rs_gguf.records.rows import Row, finite
from rs_gguf.report.plots import Axis, thinned

_SIDE = 400  # of the map, in its own coordinates
_SHADES = 10  # of each sign
_MARKS = 1500  # prompts that are drawn at most
_BOX = {"left": 20, "right": 480, "top": 12, "bottom": 330}


def cosine_map(folder: Path, vector: Row) -> Row | None:
    """Cosines between all blocks of the written direction, cells of the same shade in one path each.

    `near` [L]: the cosine of each block with the next, None at the last and where there is no direction;
    `band`: its mean over pairs of the blocks that are steered.
    """
    name = f"{vector['estimator']}@{vector['ridge']:g}/unit"
    found = _read(folder / "directions.safetensors", name)
    if found is None:
        return None
    rows = found.astype(np.float64)
    sizes = np.linalg.norm(rows, axis=1)
    known = np.isfinite(sizes) & (sizes > 0)
    unit = np.where(known[:, np.newaxis], rows / np.where(known, sizes, 1)[:, np.newaxis], np.nan)
    with one_thread():
        cosines = unit @ unit.T
    blocks, (first, last) = len(rows), vector["layers"]
    inside = cosines[first : last + 1, first : last + 1]
    others = inside[~np.eye(len(inside), dtype=bool) & np.isfinite(inside)]
    size = _SIDE / blocks
    return {
        "side": _SIDE,
        "blocks": blocks,
        "size": round(size, 3),
        "shades": _shades(cosines),
        "edges": (round(first * size, 2), round((last + 1) * size, 2)),
        "near": [*(finite(cosines[k, k + 1]) for k in range(blocks - 1)), None],
        "band": float(others.mean()) if len(others) else None,
    }


def _shades(cosines: NDArray[np.float64]) -> list[Row]:
    """Runs of cells of a row that round to the same shade, as one SVG path a shade, in units of a cell."""
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


def scatter(folder: Path, vector: Row, auroc: Sequence[float | None], asked: Sequence[Row]) -> Row | None:
    """The first two principal components of the fit prompts at the steered block that tells refusals best.

    `auroc` [L] of the written direction; `asked`: `kind` and `confidence` of each prompt that was answered,
    in the order of the store, where those that were only read come after them. Prompts that were not judged
    are left out, those whose verdict is unclear too.
    """
    first, last = vector["layers"]
    block = max(range(first, last + 1), key=lambda k: (auroc[k] or 0.0) if k < len(auroc) else 0.0)
    parts: list[NDArray[np.float32]] = []
    for path in sorted((folder / "activations").glob("[0-9]*.safetensors")):
        if sum(map(len, parts)) >= len(asked):
            break  # the others were only read
        part = _read(path, "activations", block)
        if part is None:
            return None
        parts.append(part)
    if sum(map(len, parts)) < len(asked):
        return None
    confidences = [0.0 if row["confidence"] is None else row["confidence"] for row in asked]
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
            if asked[i]["kind"] == kind and (confidences[i] > 0) == refused
        ]
        if places:
            groups.append({"kind": kind, "refused": refused, "n": len(places), "places": places})
    return {**_BOX, "block": block, "shares": shares.tolist(), "groups": groups, "n": len(kept)}


def _read(path: Path, name: str, block: int | None = None) -> NDArray[np.float32] | None:
    """An array of a safetensors file, or of one block of it; None where there is no such file or array."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            if name not in file.keys():  # noqa: SIM118 - the file is no mapping
                return None
            found: NDArray[np.float32] = (
                file.get_tensor(name) if block is None else file.get_slice(name)[:, block, :]
            )
            return found
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error
