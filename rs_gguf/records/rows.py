"""Read and write the JSON and JSON Lines files of a run, and append rows that survive a kill (`RowLog`)."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.records.files import write_text

Row = dict[str, Any]  # one line of a JSON Lines file


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Keys keep their order."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON. A lone surrogate, as in a non-UTF-8 file name, is escaped: UTF-8 has none."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def json_lines(text: str) -> list[Row]:
    """Return the rows of a JSON Lines text.

    Raises:
        ValueError: a line is not JSON.
    """
    # Not splitlines(): answers may contain U+2028 and similar characters, at which it would cut.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def finite(value: float | None) -> float | None:
    """Return `value`, or None for NaN and infinities: JSON has no numbers for them."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """Return the value in a JSON file that this package wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}). Run again with --fresh.") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON Lines file that this package wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return json_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}). Run again with --fresh.") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON Lines file, atomically."""
    write_text(path, "".join(map(_line, rows)))


class RowLog:
    """A log of rows under a key: rows are appended one by one, then written in order to the final file."""

    def __init__(self, final: Path, key: str, finished: Callable[[Path], None] = lambda path: None) -> None:
        """Open the log and continue with the rows that an earlier process left under the same `key`.

        `final`: the file that `finish` writes. `finish` then calls `finished` with the path of the log; the
        log may be deleted once the stage is marked as done.
        """
        self._final, self._finished, self._key = final, finished, key
        self._path = final.with_name(f"{final.name}.part")
        self.rows: dict[str, Row] = {}
        for path in (final, self._path):
            # A kill may have torn the last line, even within a character.
            data = path.read_bytes() if path.is_file() else b""
            header, *lines = data.decode("utf-8", "replace").split("\n")
            if header == json.dumps({"key": key}):
                for line in lines:
                    with contextlib.suppress(json.JSONDecodeError):
                        row = json.loads(line)
                        self.rows[row["id"]] = row
        # The log is rewritten, so that a torn line cannot merge with the next row.
        write_rows(self._path, self._keyed())

    def append(self, row: Row) -> None:
        """Append a row and pass it to the operating system: a later kill of this process does not lose it.

        Raises:
            InputError: the disk is full.
        """
        self.rows[row["id"]] = row
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror}. Free space and start again; no row is lost."
            ) from error

    def finish(self, ids: Sequence[str]) -> None:
        """Write the rows to the final file in the order of `ids`.

        The log stays until the stage is marked as done: otherwise a kill in between would lose all rows.
        """
        write_rows(self._final, [self.rows[i] for i in ids])
        self._finished(self._path)

    def keep(self) -> None:
        """Write the rows to the final file, under their key: a later log of that key begins with them."""
        write_rows(self._final, self._keyed())
        self._finished(self._path)

    def _keyed(self) -> list[Row]:
        return [{"key": self._key}, *self.rows.values()]

    def delete(self) -> None:
        """Delete the log, of which everything is kept elsewhere by now."""
        self._path.unlink(missing_ok=True)


def _line(row: Row) -> str:
    return json_text(row) + "\n"
