"""The activation store: shards of captured arrays in a folder, and a manifest that describes each shard.

A shard holds named arrays of some prompts as a safetensors file, written atomically. Then a line of
`manifest.jsonl` records its hash, types, layers and prompt ids. `read` checks the hashes and returns parts of
`Activations`, which read one layer at a time. If a kill or a full disk stops a writer, the complete shards
count and the next writer continues. Several processes may write to one store.
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
    """A shard is missing or was changed, or the store has another key."""


class _Part:
    """One array of a shard, read when it is indexed."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = np.dtype(_DTYPES[self._slice.get_dtype()])

    def __getitem__(self, key: Any) -> Any:
        return self._slice[key]


class ActivationStore:
    """The store in `folder` of arrays that were captured under `key`. The constructor touches no file.

    Args:
        folder: `begin` creates it if necessary.
        key: a hash of everything that the arrays depend on. Shards under another key are ignored.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = Path(folder)
        self._manifest = self.folder / "manifest.jsonl"
        self._header = json.dumps({"key": key})

    def begin(self) -> None:
        """Prepare the folder for `append`: delete shards of another key, and old drafts.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(self.folder, "*")
            with self._locked():
                if not self._has_key():
                    # The manifest goes first: shards without it are ignored.
                    self._manifest.unlink(missing_ok=True)
                    for shard in self.folder.glob("*.safetensors"):
                        shard.unlink()
                    write_text(self._manifest, self._header + "\n")
        except OSError as error:
            raise InputError(
                f"cannot store activations in {self.folder}: {error.strerror or error}. Free space or use "
                "another folder."
            ) from error

    def _has_key(self) -> bool:
        return self._lines()[:1] == [self._header]

    def _wrong_key_error(self) -> DamagedStoreError:
        return DamagedStoreError(
            f"{self.folder} holds the activations of another recipe or model, or of another version of this "
            "program. Start again: the activations are then read again."
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
        """Return the manifest's entries by shard. The last entry of a shard counts."""
        entries: dict[str, dict[str, Any]] = {}
        header, *lines = self._lines() or [""]
        if header != self._header:
            return entries
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the empty last line, or a torn line
                continue
            entries[entry["shard"]] = entry
        return entries

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.safetensors"

    def append(self, shard: str, ids: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write arrays [n, L, W] of the prompts `ids` as one shard, then its line in the manifest.

        Call `begin` first.

        Raises:
            InputError: the disk is full. The store stays unchanged.
            DamagedStoreError: another process has begun the store under another key meanwhile.
        """
        path = self._path(shard)
        try:
            with self._locked():
                if not self._has_key():
                    raise self._wrong_key_error()
                save_arrays(path, dict(arrays))
                entry = {
                    "shard": shard,
                    "sha256": sha256(path),
                    "layers": next((a.shape[1] for a in arrays.values()), 0),
                    "dtypes": {name: str(a.dtype) for name, a in arrays.items()},
                    "ids": list(ids),
                }
                self._append_line(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {self._manifest}: {error.strerror or error}. Free space and start again; "
                "complete shards are kept."
            ) from error

    def _append_line(self, line: str) -> None:
        """Write a line at the end of the manifest."""
        with self._manifest.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            # A kill or a full disk may have torn the last line. Its remains then become a separate line.
            torn = file.read(1) != b"\n"
            file.write(("\n" + line if torn else line).encode())
            file.flush()
            os.fsync(file.fileno())

    def holds(self, shard: str, ids: Sequence[str]) -> bool:
        """Return whether a shard of these prompts exists, byte for byte as it was written."""
        entry = self._entries().get(shard)
        return entry is not None and entry["ids"] == list(ids) and self._is_whole(entry)

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        path = self._path(entry["shard"])
        return path.is_file() and sha256(path) == entry["sha256"]

    def read(self, shards: Sequence[str]) -> list[dict[str, _Part]]:
        """Return the arrays of each shard by name. They are read when they are indexed (`Activations`).

        Raises:
            DamagedStoreError: a shard is missing, was changed or cannot be read; or the folder holds
                activations of another key.
            InputError: the manifest cannot be read.
        """
        if self._manifest.is_file() and not self._has_key():
            raise self._wrong_key_error()
        entries = self._entries()
        arrays = []
        for shard in shards:
            path = self._path(shard)
            if shard not in entries or not self._is_whole(entries[shard]):
                raise DamagedStoreError(
                    f"{path} is missing or was changed since it was written. Start again: its activations "
                    "are then read again."
                )
            try:
                file = safe_open(path, framework="numpy")
                arrays.append({name: _Part(file, name) for name in entries[shard]["dtypes"]})
            except (OSError, SafetensorError) as error:
                raise DamagedStoreError(f"cannot read {path} ({error}). Start again.") from error
        return arrays
