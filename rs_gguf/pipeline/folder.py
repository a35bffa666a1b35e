"""Keep a run folder: which stages are done, from which inputs, and rows that survive a kill.

A folder and the keys of stages go in; the state of the stages and their rows come out. A stage is done when
`state.json` holds its key, a hash of all its inputs. Row files grow line by line in a `.part` file and take
their final name when they are complete. An interrupted stage therefore continues where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rs_gguf.errors import InputError
from rs_gguf.records.artefacts import RESULTS, STAGES
from rs_gguf.records.files import from_home
from rs_gguf.records.rows import Row, RowLog, read_json, read_rows, write_json


def key_of(*parts: Any) -> str:
    """Return a hash of JSON values, as 16 hexadecimal digits: equal inputs give equal keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def moved_file(folder: Path, name: str | Path) -> Path:
    """Return the file that the recipe of a folder names; it may have been moved together with the folder."""
    named = from_home(name)
    places = (named, folder / named, folder / named.name)
    return next((place for place in places if place.is_file()), named)


class RunFolder:
    """The files of one run.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._finished: list[Path] = []  # logs whose rows are in the final file, of stages not yet done
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {path} as a run folder: {error.strerror}.") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder.

        Raises:
            InputError: another process holds it, or the folder is not writable.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{self.path} is in use by another rs-export. Wait for it or choose --out."
            ) from error
        except OSError as error:
            raise InputError(
                f"cannot write in {self.path}: {error.strerror or error}. Choose another --out."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def forget_all(self) -> None:
        """Delete the files of all stages, except the results, which stay until they are replaced."""
        names = [name for info in STAGES.values() for name in info.artefacts if name not in RESULTS]
        for name in ("state.json", *names):
            path = self / name.rstrip("/")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
                (self / f"{name}.part").unlink(missing_ok=True)

    def is_done(self, stage: str, key: str) -> bool:
        """Return whether `stage` was finished with exactly these inputs."""
        return bool(self._state().get(stage, {}).get("key") == key)

    def was_done(self, stage: str) -> bool:
        """Return whether `stage` was finished, with these inputs or others."""
        return stage in self._state()

    def mark_done(self, stage: str, key: str, seconds: float) -> None:
        """Mark `stage` as done, and delete the logs of its finished row files."""
        write_json(self / "state.json", {**self._state(), stage: {"key": key, "seconds": round(seconds, 2)}})
        while self._finished:
            self._finished.pop().unlink(missing_ok=True)

    def forget(self, *stages: str) -> None:
        """Mark these stages as not done."""
        state = self._state()
        if state.keys() & set(stages):
            write_json(self / "state.json", {k: v for k, v in state.items() if k not in stages})

    def seconds(self) -> dict[str, float]:
        """Return the seconds that each stage took when it was last run."""
        return {stage: entry["seconds"] for stage, entry in self._state().items()}

    def _state(self) -> dict[str, Any]:
        path = self / "state.json"
        state: dict[str, Any] = read_json(path) if path.is_file() else {}
        return state

    def read_rows(self, name: str) -> list[Row]:
        """Return the rows of a finished file."""
        return read_rows(self / name)

    def log(self, name: str, key: str) -> RowLog:
        """Return the log of a file's rows, as `RowLog` has it; `mark_done` deletes it."""
        return RowLog(self / name, key, self._finished.append)
