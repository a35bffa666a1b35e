"""JSON as files of a run hold it, and rows that are appended one by one and survive a kill."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.records.files import write_text

Row = dict[str, Any]  # of a JSON Lines file


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: half of a surrogate pair, as in a name that is no UTF-8, is spelt out."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def json_lines(text: str) -> list[Row]:
    """The rows of a JSON lines file. Answers may hold U+2028 and its kin, at which `splitlines` would cut.

    Raises:
        ValueError: a line is no JSON.
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def finite(value: float | None) -> float | None:
    """A number as JSON can hold it: None, its null, stands for NaN and infinities."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """The value in a JSON file that this package wrote. `InputError` if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON lines file that this package wrote. `InputError` if missing or damaged."""
    try:
        return json_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again with --fresh.") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON lines file atomically."""
    write_text(path, "".join(map(_line, rows)))


class RowLog:
    """Rows that are appended one by one under a key, then put in order under their final name."""

    def __init__(self, final: Path, key: str, finished: Callable[[Path], None]) -> None:
        """Go on with the rows of `key` that an earlier process left.

        `final`: the file that `finish` writes. `finished` is then called with the log's own path, which may
        go once the stage is done.
        """
        self._final, self._finished = final, finished
        self._path = final.with_name(f"{final.name}.part")
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
        write_rows(self._final, [self.rows[i] for i in ids])
        self._finished(self._path)


def _line(row: Row) -> str:
    return json_text(row) + "\n"
