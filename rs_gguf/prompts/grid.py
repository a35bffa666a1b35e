"""The project's own prompts (the grid), and the selection of a run from the grid or from users' files.

The grid's splits hold out whole subjects and whole request forms: a direction is evaluated on subjects and
forms that it was not fitted on (docs/prompts.md).
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
    """Return the project's own prompts of these kinds, from all splits."""
    rows = []
    for kind in kinds:
        text = (resources.files("rs_gguf") / "data" / f"{kind}.jsonl").read_text(encoding="utf-8")
        rows += [Prompt(**json.loads(line)) for line in text.splitlines()]
    return rows


def pool(files: Mapping[Kind, Sequence[Path]]) -> dict[str, dict[str, list[Prompt]]]:
    """Return all prompts to choose from, by split and kind. A kind without files takes the grid's prompts.

    If several files of a kind contain the same prompt, the last one counts: a prompt has only one split.

    Raises:
        InputError: a file or a row cannot be used, or the files leave a split without prompts.
    """
    prompts: dict[str, dict[str, list[Prompt]]] = {split: {} for split in SPLITS}
    for kind in KINDS:
        rows = unique(row for path in files[kind] for row in load(path, kind)) or grid([kind])
        for split in SPLITS:
            prompts[split][kind] = [row for row in rows if row.split == split]
            if not prompts[split][kind]:
                raise InputError(
                    f"{', '.join(map(str, files[kind]))}: none of the {len(rows)} {kind} prompts is in the "
                    f"split {split}; each split needs at least one. Give more prompts (60% go to fit, 20% to "
                    "tune, 20% to test), or add a column `split`."
                )
    return prompts


def of_each_kind(prompts: Sequence[Prompt], size: int, *, seed: int) -> dict[str, list[Prompt]]:
    """Return at most `size` prompts of each kind, `stratified`."""
    return {kind: stratified([p for p in prompts if p.kind == kind], size, seed=seed) for kind in KINDS}


def stratified(prompts: Sequence[Prompt], size: int, *, seed: int) -> list[Prompt]:
    """Return at most `size` prompts in their order, the same ones for the same seed.

    Forms and subjects are as equal in number as possible. Languages keep their shares.
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
        if name == "language":  # A random start: otherwise every rare language would come before any repeat.
            represented += (np.random.default_rng(seed).random(len(count)) * weight)[code]
    # Take the least represented prompt, then count it as a representative of its groups.
    indices = []
    for _ in range(size):
        k = int(represented.argmin())
        indices.append(order[k])
        represented[k] = np.inf
        for code, weight in groups:
            represented[code == code[k]] += weight[code[k]]
    return [prompts[i] for i in sorted(indices)]
