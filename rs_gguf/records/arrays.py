"""Named arrays in safetensors files: written whole or not at all, read without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.errors import InputError
from rs_gguf.records.files import write_atomic


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
    write_atomic(path, lambda file: file.write(data))


def load_arrays(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error
