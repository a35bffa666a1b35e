"""Read users' prompt files: detect the format and the columns, and return `Prompt` rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.records.conversation import KINDS, SPLITS, Kind, Prompt, Split
from rs_gguf.records.files import from_home

# Column names of the prompt in well-known prompt files, most specific first.
_PROMPT_COLUMNS = (
    "prompt", "goal", "behavior", "behaviour", "forbidden_prompt", "instruction", "question", "text",
    "vanilla", "turns", "messages",
)  # fmt: skip
# Keys of the list of rows in a JSON object that holds several lists.
_ROW_LISTS = ("data", "rows", "prompts", "examples", "train")
_MAX_BYTES = 16 << 20  # of a file, which takes about ten times its size in memory
_MAX_UNPACKED = 256 << 20  # bytes of a parquet file's columns
_BATCH = 1024  # rows of a parquet file
# Columns that complete the prompt in another column: prompt column → context column.
_CONTEXT_COLUMNS = {"behavior": "contextstring", "behaviour": "contextstring", "instruction": "input"}
_USED_COLUMNS = {*_PROMPT_COLUMNS, *_CONTEXT_COLUMNS.values()}
_SPLIT_NAMES = {"test": "validation"}  # as earlier versions called it
_USED_COLUMNS |= {"subject", "topic", "category", "form", "language", "split", "kind", "pair"}


def load(path: Path, kind: Kind) -> list[Prompt]:
    """Return the prompts of a user's file, all of one kind; see `load_own_kinds`."""
    return unique(replace(prompt, kind=kind) for prompt in load_own_kinds(path)[0])


def load_own_kinds(path: Path) -> tuple[list[Prompt], bool]:
    """Read a user's prompt file: txt (one prompt per line), csv, tsv, json, jsonl or parquet.

    Return the prompts, and whether a column `kind` names the kind of each. Without it, all are `sensitive`.

    The prompt's column is detected. The column `split` counts only if all its values are fit, tune and
    validation (or test): a data set's own `train` means something else. Other prompts get a split by their
    hash: 60% fit, 20% tune, 20% validation.

    Raises:
        InputError: the file is missing, empty or too large, has an unknown format or no column of prompts; or
            a row is invalid. The message names file and line.
    """
    path = from_home(path)
    rows, kinds = [], []
    for line, columns in columns_of(path):
        kinds.append(_text_of(columns, "kind").strip().lower())
        rows.append(
            Prompt(
                prompt=prompt_text(columns, f"{path}:{line}"),
                kind="sensitive",
                subject=_text_of(columns, "subject"),
                topic=_text_of(columns, "topic") or _text_of(columns, "category"),
                form=_text_of(columns, "form"),
                language=_text_of(columns, "language"),
                split=cast(Split, _SPLIT_NAMES.get(name := _text_of(columns, "split").strip().lower(), name)),
                pair=_text_of(columns, "pair"),
            )
        )
    if not rows:
        raise InputError(f"{path} contains no prompts. Give at least one row.")
    has_splits = {row.split for row in rows} <= {*SPLITS, ""}
    rows = [row if has_splits and row.split else replace(row, split=_hash_split(row.prompt)) for row in rows]
    known = set(kinds) <= set(KINDS)
    if known:
        rows = [replace(row, kind=cast(Kind, kind)) for row, kind in zip(rows, kinds, strict=True)]
    return unique(rows), known


def columns_of(path: Path, max_bytes: int = _MAX_BYTES) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line or row number, and the columns by lower-case name, of each row of a prompt file.

    Raises:
        InputError: the file is missing, unreadable or larger than `max_bytes`, or a row is invalid.
    """
    if not path.is_file():
        raise InputError(f"prompt file not found: {path}. Give an existing file.")
    if path.stat().st_size > max_bytes:
        raise InputError(
            f"{path} has {path.stat().st_size >> 20} MiB; prompt files up to {max_bytes >> 20} MiB are "
            "accepted. Split it, or keep only the rows that you need."
        )
    for line, row in _rows(path):
        yield line, _columns(row, f"{path}:{line}")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield (line or row number, row) of a file. The row is a string if the format has no columns."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    if suffix in (".csv", ".tsv"):
        yield from _table_rows(text, path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        yield from _json_rows(_parse_json(text, str(path)), path)
    elif suffix in (".jsonl", ".txt", ""):
        # Not splitlines(): a JSON text may contain U+2028 and similar characters.
        for line, content in enumerate(text.split("\n"), start=1):
            if content.strip():
                yield line, _parse_json(content, f"{path}:{line}") if suffix == ".jsonl" else content.strip()
    else:
        raise InputError(f"{path}: unknown format {suffix!r}; use txt, csv, tsv, json, jsonl or parquet.")


def _table_rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(row.get(None) or ()):  # DictReader stores surplus cells under the key None.
                raise InputError(
                    f"{path}:{reader.line_num}: more cells than columns. Put quotes around a prompt that "
                    "contains a comma or a tab."
                )
            if any((cell or "").strip() for name, cell in row.items() if name is not None):
                yield reader.line_num, row
    except csv.Error as error:
        reason = escape_control_chars(str(error))
        raise InputError(f"{path}:{reader.line_num}: not valid CSV ({reason}).") from error


def _json_rows(value: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a list, of {"data": [...]}, or of an object of columns, each a list."""
    if isinstance(value, dict):
        columns = {str(key): column for key, column in value.items() if isinstance(column, list)}
        if any(name.strip().lower() in _PROMPT_COLUMNS for name in columns):
            # Thousands of columns times thousands of rows would fill the memory, so unused columns are
            # dropped. The longest column stays, because it sets the number of rows.
            names = {name for name in columns if name.strip().lower() in _USED_COLUMNS}
            names.add(max(columns, key=lambda name: len(columns[name])))
            columns = {name: cells for name, cells in columns.items() if name in names}
            value = [dict(zip(columns, cells, strict=True)) for cells in zip_longest(*columns.values())]
        else:
            row_lists = [name for name in columns if name.strip().lower() in _ROW_LISTS]
            if len(columns) > 1 and len(row_lists) != 1:
                raise InputError(
                    f"{path}: unclear which of the lists {_printable(columns)} holds the prompts. Name this "
                    f"one {', '.join(_ROW_LISTS[:-1])} or {_ROW_LISTS[-1]}, and no other."
                )
            value = next((columns[name] for name in row_lists or columns), None)
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a JSON list of prompts or of rows.")
    yield from enumerate(value, start=1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow. Run `pip install pyarrow`.") from error
    try:
        with parquet.ParquetFile(path) as file:
            # A compressed file may hold a thousand times its size.
            rows: list[dict[str, Any]] = []
            size = 0
            for batch in file.iter_batches(_BATCH):
                size += batch.nbytes
                if size > _MAX_UNPACKED:
                    raise InputError(
                        f"{path} holds more than {_MAX_UNPACKED >> 20} MiB when unpacked. Split it, or keep "
                        "only the rows that you need."
                    )
                rows += batch.to_pylist()
    # Text that is not UTF-8 raises ValueError.
    except (ArrowException, MemoryError, OSError, ValueError) as error:
        reason = escape_control_chars(" ".join(str(error).split())[:200])
        raise InputError(f"{path}: not a readable parquet file ({reason}).") from error
    yield from enumerate(rows, start=1)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}).") from error


def _columns(row: object, where: str) -> dict[str, Any]:
    """Return a row by its lower-case column names. A row that is text is a prompt."""
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Mapping):
        return {str(key).strip().lower(): value for key, value in row.items() if key is not None}
    raise InputError(f"{where}: a row must be text or an object, not {type(row).__name__}.")


def prompt_text(columns: Mapping[str, Any], where: str) -> str:
    """Return the prompt of a row, with the context column that completes it.

    Raises:
        InputError: no column of prompts has a text. `where` names the row.
    """
    name = next((c for c in _PROMPT_COLUMNS if columns.get(c)), None)
    if name is None:
        raise InputError(
            f"{where}: no prompt in columns {_printable(columns)}; "
            f"one of {', '.join(_PROMPT_COLUMNS)} is expected."
        )
    text = _flatten(columns[name], where)
    context = columns.get(_CONTEXT_COLUMNS.get(name, ""))
    if isinstance(context, str) and context.strip():
        text = f"{context.strip()}\n\n{text}" if name != "instruction" else f"{text}\n\n{context.strip()}"
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty.")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(
            f"{where}: the prompt contains half of a character pair (a lone surrogate). Remove it."
        )
    return text.strip()


def _printable(names: Iterable[str]) -> str:
    """Return untrusted names as a list to print: 12 at most, shortened, without control characters."""
    shown = ", ".join(escape_control_chars(name[:40]) for name in sorted(names)[:12])
    return shown or "(none)"


def _flatten(value: Any, where: str) -> str:
    """Return the text itself, or the first user turn of a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        turn = next((t for t in value if isinstance(t, Mapping) and t.get("role") == "user"), value[0])
        content = turn.get("content") if isinstance(turn, Mapping) else turn
        if isinstance(content, str):
            return content
    raise InputError(f"{where}: the prompt is neither text nor a list of turns; one of them is expected.")


def unique(rows: Iterable[Prompt]) -> list[Prompt]:
    """Return each prompt once, as its last row has it."""
    return list({row.id: row for row in rows}.values())


def _hash_split(text: str) -> Split:
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
    return "fit" if share < 0.6 else "tune" if share < 0.8 else "validation"


def _text_of(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name)
    # JSON can spell a lone surrogate, which cannot be written as UTF-8.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
