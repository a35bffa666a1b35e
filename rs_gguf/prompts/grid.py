"""The project's own prompts, and what a run takes of them or of users' files.

The grid's splits hold out whole subjects and whole forms of request, so that a direction is judged on what
it has not seen (docs/prompts.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from rs_gguf.errors import InputError
from rs_gguf.prompts.user_files import load, unique
from rs_gguf.records.conversation import KINDS, SPLITS, Kind, Prompt


def grid(kinds: Sequence[Kind] = KINDS) -> list[Prompt]:
    """The project's own prompts of these kinds, all splits."""
    rows = []
    for kind in kinds:
        text = (resources.files("rs_gguf") / "data" / f"{kind}.jsonl").read_text(encoding="utf-8")
        rows += [Prompt(**json.loads(line)) for line in text.splitlines()]
    return rows


def pool(files: Mapping[Kind, Sequence[Path]]) -> dict[str, dict[str, list[Prompt]]]:
    """All prompts to choose from, by split and kind: those of the files, or the grid's where none is given.

    One that stands in several files of a kind is that of the last: it cannot be in two splits.

    Raises:
        InputError: a file or a row of it that cannot be used, or files that leave a split without a prompt.
    """
    found: dict[str, dict[str, list[Prompt]]] = {split: {} for split in SPLITS}
    for kind in KINDS:
        rows = unique(row for path in files[kind] for row in load(path, kind)) or grid([kind])
        for split in SPLITS:
            found[split][kind] = [row for row in rows if row.split == split]
            if not found[split][kind]:
                raise InputError(
                    f"{', '.join(map(str, files[kind]))}: none of {len(rows)} {kind} prompts is for {split}. "
                    "Give more (60 % go to fit, 20 % to tune, 20 % to test), or a column `split` that says "
                    "where each belongs."
                )
    return found


def stratified(prompts: Sequence[Prompt], size: int, *, seed: int) -> list[Prompt]:
    """At most `size` prompts in their order, the same for the same seed.

    Forms and subjects come out as equal in number as they can; languages keep their shares.
    """
    if size >= len(prompts):
        return list(prompts)
    order = sorted(
        range(len(prompts)), key=lambda i: hashlib.sha256(f"{seed}\0{prompts[i].id}".encode()).digest()
    )
    groups = []
    represented = np.zeros(len(order))
    for name in ("form", "subject", "language"):
        values = [getattr(prompts[i], name) for i in order]
        _, code, count = np.unique(values, return_inverse=True, return_counts=True)
        weight = len(order) / count if name == "language" else np.full(len(count), len(count))
        groups.append((code, weight))
        if name == "language":  # else every language, however rare, would come once before any comes twice
            represented += (np.random.default_rng(seed).random(len(count)) * weight)[code]
    # Take what is least represented so far, and count it as representing its groups from then on.
    chosen = []
    for _ in range(size):
        k = int(represented.argmin())
        chosen.append(order[k])
        represented[k] = np.inf
        for code, weight in groups:
            represented[code == code[k]] += weight[code[k]]
    return [prompts[i] for i in sorted(chosen)]
