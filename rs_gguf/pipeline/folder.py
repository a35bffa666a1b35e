"""The run folder: what is done, from which inputs, and rows that survive a kill.

A stage is done when `state.json` holds its key, a hash of everything it depends on. Row files grow line by
line in a `.part` file and take their final name when complete, so an interrupted stage goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rs_gguf.errors import InputError
from rs_gguf.records.files import Row, json_lines, json_text, read_json, write_json, write_text

STAGES = ("answer", "score", "capture", "fit", "tune", "write", "measure", "report")
# What the stages leave for one another.
_FILES = (
    "state.json", "answers.jsonl", "scores.jsonl", "directions.safetensors", "gates.safetensors", "fit.json",
    "trials.jsonl", "tune.json", "proof.json", "measured.jsonl", "evaluation.jsonl", "metrics.json",
)  # fmt: skip
_FOLDERS = ("activations", "adapters", "baselines", "figures")


def key_of(*parts: Any) -> str:
    """A hash of JSON values: the same inputs give the same key."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._finished: list[Path] = []  # logs of rows that are in their final file, their stage not yet done
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {path} as a run folder: {error.strerror}.") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out. Raises `InputError` if one is at work."""
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
        """Forget what the stages of an earlier run left. Vectors and report stay until replaced."""
        for name in _FILES:
            (self / name).unlink(missing_ok=True)
            (self / f"{name}.part").unlink(missing_ok=True)
        for name in _FOLDERS:
            folder = self / name
            if folder.is_symlink():
                folder.unlink()
            elif folder.exists():
                shutil.rmtree(folder)

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` ended with exactly these inputs."""
        return bool(self._state().get(stage, {}).get("key") == key)

    def mark_done(self, stage: str, key: str, seconds: float) -> None:
        """From here on `stage` is done; the logs of the rows that it finished are not needed any more."""
        write_json(self / "state.json", {**self._state(), stage: {"key": key, "seconds": round(seconds, 2)}})
        while self._finished:
            self._finished.pop().unlink(missing_ok=True)

    def forget(self, *stages: str) -> None:
        """Have these stages done again, whatever their inputs."""
        state = self._state()
        if state.keys() & set(stages):
            write_json(self / "state.json", {k: v for k, v in state.items() if k not in stages})

    def seconds(self) -> dict[str, float]:
        """How long each stage took when it was last run."""
        return {stage: entry["seconds"] for stage, entry in self._state().items()}

    def _state(self) -> dict[str, Any]:
        path = self / "state.json"
        state: dict[str, Any] = read_json(path) if path.is_file() else {}
        return state

    def read_rows(self, name: str) -> list[Row]:
        """Rows of a finished file."""
        path = self / name
        try:
            return json_lines(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error

    def finished(self, log: Path) -> None:
        """This log of rows may go once its stage is done."""
        self._finished.append(log)

    def write_rows(self, name: str, rows: Sequence[Row]) -> None:
        write_text(self / name, "".join(map(_line, rows)))


class RowLog:
    """Rows that are appended one by one under a key, then put in order under their final name."""

    def __init__(self, folder: RunFolder, name: str, key: str) -> None:
        self._folder, self._name = folder, name
        self._path = folder / f"{name}.part"
        self.rows: dict[str, Row] = {}
        # The last line may be torn, within a character even.
        data = self._path.read_bytes() if self._path.is_file() else b""
        lines = data.decode("utf-8", "replace").split("\n")
        header = json.dumps({"key": key})
        if lines[0] == header:
            for line in lines[1:]:
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    self.rows[row["id"]] = row
        # Rewritten whole, so that a torn line cannot swallow the next one.
        write_text(self._path, header + "\n" + "".join(map(_line, self.rows.values())))

    def append(self, row: Row) -> None:
        """Keep a row. It is with the system when this returns: a kill of this process does not lose it."""
        self.rows[row["id"]] = row
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror}. Free space and start again: nothing is lost."
            ) from error

    def finish(self, ids: Sequence[str]) -> None:
        """Write the rows in the order of `ids` under the final name.

        The log itself stays until the stage is marked as done: a kill in between would lose all of it.
        """
        self._folder.write_rows(self._name, [self.rows[i] for i in ids])
        self._folder.finished(self._path)


def _line(row: Row) -> str:
    return json_text(row) + "\n"
