"""Files that are either whole or absent: written beside their place and renamed into it.

Arrays are kept in safetensors files, which are read without pickle.
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

_NAMED = 50  # characters of a file's name in that of its draft
_ABANDONED = 24 * 3600  # seconds since a draft was last written to


def from_home(path: str | Path) -> Path:
    """The path with `~` or `~user` expanded, or as it is where there is no such user, as in a shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser() raises for an unknown user


def cache_folder() -> Path:
    """The user's cache folder for this package. `InputError` where the user has no home to keep one in."""
    try:
        return platformdirs.user_cache_path("rs-gguf")
    except RuntimeError as error:
        raise InputError(
            "there is no home folder to keep a cache in. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` with what `write` puts into a binary file, all or nothing.

    A link stays one, and its target is replaced. Devices and pipes are written to as they are.

    Raises:
        InputError: the folder cannot be written or the disk is full. The old file, if any, is untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():  # a folder is an error of open
            with path.open("wb") as file:
                write(file)
            return
        # Only now: what /dev/stdout leads to has a name of no file where it is a pipe.
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name may be as long as names can be, and a draft's is longer.
        draft = path.with_name(f".{path.name[:_NAMED]}.{secrets.token_hex(8)}")
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
    """Find out before hours of work whether `write_atomic` could write `path`. Nothing is left behind.

    Raises:
        InputError: a folder, or a place that cannot be written.
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
    """Remove what killed processes left in `folder` of files whose names match: drafts a day old."""
    for draft in folder.glob(f".{names}.*"):
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - draft.stat().st_mtime > _ABANDONED:
                draft.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. `InputError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


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
