"""Keep judgements in the user's cache folder, so that none is made twice.

A judge and pairs go in. Known judgements come out first, the others as the judge makes them. Each is
written at once, so a killed run loses only judgements in progress. Several processes may share the file. It
contains hashes of prompts and answers, not their text. Delete it to forget all judgements.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rs_gguf.engines.server.replies import Usage
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import Judge, Pair
from rs_gguf.records.conversation import Judgement
from rs_gguf.records.files import cache_folder

_WAIT = 60.0  # seconds that a process waits while another one writes
_SCHEMA = """CREATE TABLE IF NOT EXISTS judgements
    (key BLOB PRIMARY KEY, confidence REAL NOT NULL, mode TEXT NOT NULL, category TEXT) WITHOUT ROWID"""


def default_path() -> Path:
    """Return the path of the cache file."""
    return cache_folder() / "judgements.sqlite3"


class CachedJudge:
    """A judge with a cache. A failed judgement is not kept, so another run tries again.

    variant: how the engine runs the judge's model, if that changes judgements; else "".

    `judge` raises `InputError` if the file cannot be used.
    """

    def __init__(self, judge: Judge, path: Path | None = None, *, variant: str = "") -> None:
        self._judge, self._path, self._variant = judge, path or default_path(), variant

    @property
    def name(self) -> str:
        return self._judge.name

    @property
    def identity(self) -> str:
        identity = self._judge.identity
        return f"{identity} {self._variant}" if self._variant else identity

    @property
    def usage(self) -> Usage | None:
        return self._judge.usage

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        # A repeated pair is judged once.
        places: dict[bytes, list[int]] = {}
        for i, pair in enumerate(pairs):
            places.setdefault(_key(self.identity, pair), []).append(i)
        with self._open() as database:
            missing = []
            for key, indices in places.items():
                known = self._look_up(database, key)
                if known is None:
                    missing.append(key)
                else:
                    yield from ((i, known) for i in indices)
            for k, judgement in self._judge.judge([pairs[places[key][0]] for key in missing]):
                self._keep(database, missing[k], judgement)
                yield from ((i, judgement) for i in places[missing[k]])

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._errors_explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Each statement is a transaction of its own.
            database = sqlite3.connect(self._path, timeout=_WAIT, isolation_level=None)
        with contextlib.closing(database):
            with self._errors_explained():
                _write_ahead(database)
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute(_SCHEMA)
            yield database

    def _look_up(self, database: sqlite3.Connection, key: bytes) -> Judgement | None:
        with self._errors_explained():
            row = database.execute(
                "SELECT confidence, mode, category FROM judgements WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Judgement(*row)

    def _keep(self, database: sqlite3.Connection, key: bytes, judgement: Judgement) -> None:
        if judgement.confidence is not None:
            with self._errors_explained():
                database.execute(
                    "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?)",
                    (key, judgement.confidence, judgement.mode, judgement.category),
                )

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"cannot use the cache of judgements {self._path} ({error}). Delete the file, free space, or "
                "set XDG_CACHE_HOME to a folder that can be written."
            ) from error


def _write_ahead(database: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, which allows readers and a writer at the same time.

    SQLite does not wait if two processes switch a new file at once, since each would wait for the other. This
    function waits instead, for up to `_WAIT` seconds.
    """
    until = time.monotonic() + _WAIT
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _key(identity: str, pair: Pair) -> bytes:
    return hashlib.sha256(json.dumps([identity, *pair]).encode()).digest()
