"""Write files atomically: a file is complete or absent. Also paths, hashes and arrays.

A draft is written beside the target and then renamed. Arrays are stored as safetensors, which need no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs

from rs_gguf.errors import InputError

_DRAFT_NAME_CHARS = 50  # characters of the file's name that its draft's name repeats
_DRAFT_MAX_AGE = 24 * 3600  # seconds; a draft that nobody wrote to for longer is a killed process's


def from_home(path: str | Path) -> Path:
    """Return the path with `~` or `~user` expanded; unchanged if there is no such user, as in a shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser() raises for an unknown user


def cache_folder() -> Path:
    """Return the user's cache folder for this package.

    Raises:
        InputError: the user has no home folder.
    """
    try:
        return platformdirs.user_cache_path("rs-gguf")
    except RuntimeError as error:
        raise InputError(
            "cannot find a cache folder: this user has no home folder. Set XDG_CACHE_HOME to a folder that "
            "can be written."
        ) from error


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` atomically; `write` gets the binary file to fill.

    A link stays a link, and its target is replaced. Devices and pipes are written directly.

    Raises:
        InputError: the folder cannot be written or the disk is full. An old file stays unchanged.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():  # a device or a pipe; open() refuses a folder
            with path.open("wb") as file:
                write(file)
            return
        # Resolve the link only here: if /dev/stdout is a pipe, it resolves to a name without a file.
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is cut: a name of the longest length allowed would leave no room for the suffix.
        draft = path.with_name(f".{path.name[:_DRAFT_NAME_CHARS]}.{secrets.token_hex(8)}")
        with draft.open("xb") as file:
            temporary = draft
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check before hours of work that `write_atomic` can write `path`. Leave nothing behind.

    Raises:
        InputError: `path` is a folder, or cannot be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.is_file() or not path.exists():
            path = Path(os.path.realpath(path))
            folder = next((parent for parent in path.parents if parent.exists()), path.parent)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}. Free space or choose another folder.")


def remove_drafts(folder: Path, names: str) -> None:
    """Remove drafts that killed processes left in `folder`: at least a day old, with names like `names`."""
    for draft in folder.glob(f".{names}.*"):
        with contextlib.suppress(OSError):  # another process removed it, or another user owns it
            if time.time() - draft.stat().st_mtime > _DRAFT_MAX_AGE:
                draft.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays by name to a safetensors file, atomically."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
    write_atomic(path, lambda file: file.write(data))


def load_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a safetensors file by name.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}). Run again with --fresh.") from error
