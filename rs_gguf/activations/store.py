"""The activation store: shards of captured arrays in a folder, and a manifest of what is in each.

Named arrays of some prompts enter as a safetensors file, whole or not at all, and then a line of
`manifest.jsonl`: its hash, types, layers and prompts' ids. They leave as parts of `Activations`, read from
the files a block at a time, after the bytes were found to be those that were written. Whatever ends a writer,
a kill or a full disk, the shards before it count and the next writer goes on. Several processes may write to
one store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from rs_gguf.errors import InputError
from rs_gguf.records.files import remove_drafts, save_arrays, sha256, write_text

_DTYPES = {"F16": np.float16, "F32": np.float32}


class DamagedStoreError(InputError):
    """A shard is missing or holds other bytes than were written, or the store is of another key."""


class _Part:
    """One array of a shard, read when it is indexed."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = np.dtype(_DTYPES[self._slice.get_dtype()])

    def __getitem__(self, key: Any) -> Any:
        return self._slice[key]


class ActivationStore:
    """The store in `folder`, of arrays that were captured under `key`. Making one touches no file.

    Args:
        folder: made by `begin` if need be.
        key: a hash of everything that the arrays depend on. What lies there under another counts for nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = Path(folder)
        self._manifest = self.folder / "manifest.jsonl"
        self._header = json.dumps({"key": key})

    def begin(self) -> None:
        """Make ready for `append`: what the folder holds under another key is deleted, as are old drafts.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(self.folder, "*")
            with self._locked():
                if not self._is_ours():
                    self._manifest.unlink(missing_ok=True)  # first: shards without it count for nothing
                    for shard in self.folder.glob("*.safetensors"):
                        shard.unlink()
                    write_text(self._manifest, self._header + "\n")
        except OSError as error:
            raise InputError(
                f"cannot use {self.folder} for activations: {error.strerror or error}."
            ) from error

    def _is_ours(self) -> bool:
        return self._lines()[:1] == [self._header]

    def _of_another(self) -> DamagedStoreError:
        return DamagedStoreError(
            f"{self.folder} holds the activations of another recipe or model, or of another version of this "
            "program. Start again: they are read anew."
        )

    def _locked(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    def _lines(self) -> list[str]:
        if not self._manifest.is_file():
            return []
        try:
            data = self._manifest.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self._manifest}: {error.strerror or error}.") from error
        return data.decode("utf-8", "replace").split("\n")

    def _entries(self) -> dict[str, dict[str, Any]]:
        """The manifest by shard. A shard that was written again counts as it is now."""
        found: dict[str, dict[str, Any]] = {}
        header, *lines = self._lines() or [""]
        if header != self._header:
            return found
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last one, which is empty, or a torn one
                continue
            found[entry["shard"]] = entry
        return found

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.safetensors"

    def append(self, shard: str, ids: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep arrays [n, L, W] of the prompts `ids` as one shard, then its line in the manifest.

        The store was begun.

        Raises:
            InputError: the disk is full. The store is as it was.
            DamagedStoreError: another process has begun the store under another key since.
        """
        path = self._path(shard)
        try:
            with self._locked():
                if not self._is_ours():
                    raise self._of_another()
                save_arrays(path, dict(arrays))
                entry = {
                    "shard": shard,
                    "sha256": sha256(path),
                    "layers": next((a.shape[1] for a in arrays.values()), 0),
                    "dtypes": {name: str(a.dtype) for name, a in arrays.items()},
                    "ids": list(ids),
                }
                self._enter(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {self._manifest}: {error.strerror or error}. Free space and start again: what "
                "was captured is kept."
            ) from error

    def _enter(self, line: str) -> None:
        """Write a line at the end of the manifest."""
        with self._manifest.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"  # by a kill or a full disk; its piece is a line of its own then
            file.write(("\n" + line if torn else line).encode())
            file.flush()
            os.fsync(file.fileno())

    def holds(self, shard: str, ids: Sequence[str]) -> bool:
        """Whether a shard is there with these prompts, byte for byte as it was written."""
        entry = self._entries().get(shard)
        return entry is not None and entry["ids"] == list(ids) and self._is_whole(entry)

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        path = self._path(entry["shard"])
        return path.is_file() and sha256(path) == entry["sha256"]

    def read(self, shards: Sequence[str]) -> list[dict[str, _Part]]:
        """Return the arrays of each shard by name, read when they are indexed (`Activations`).

        Raises:
            DamagedStoreError: a shard is missing, or its bytes are not those that were written; or what the
                folder holds was captured under another key.
            InputError: a shard cannot be read.
        """
        if self._manifest.is_file() and not self._is_ours():
            raise self._of_another()
        entries = self._entries()
        found = []
        for shard in shards:
            path = self._path(shard)
            if shard not in entries or not self._is_whole(entries[shard]):
                raise DamagedStoreError(
                    f"{path} is missing or was changed since it was written. Start again: it is read anew."
                )
            try:
                file = safe_open(path, framework="numpy")
                found.append({name: _Part(file, name) for name in entries[shard]["dtypes"]})
            except (OSError, SafetensorError) as error:
                raise DamagedStoreError(f"{path} cannot be read ({error}).") from error
        return found
