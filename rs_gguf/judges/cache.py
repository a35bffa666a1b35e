"""Judgements that are kept in the user's cache folder and never made twice.

A judge and pairs go in; the judgements it gave before come out at once, the others as they are made. Each is
written when it is made, so a killed run loses only what the judge had under way, and several processes may
share the file. It holds hashes of prompts and answers, not their text. Delete it to forget everything.
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

_WAIT = 60.0  # seconds that a process waits for another one's write
_SCHEMA = """CREATE TABLE IF NOT EXISTS judgements
    (key BLOB PRIMARY KEY, confidence REAL NOT NULL, mode TEXT NOT NULL, category TEXT) WITHOUT ROWID"""


def default_path() -> Path:
    return cache_folder() / "judgements.sqlite3"


class CachedJudge:
    """A judge that remembers. What could not be judged is not remembered, so that another run tries again.

    Raises:
        InputError: (when judging) the file cannot be used.
    """

    def __init__(self, judge: Judge, path: Path | None = None) -> None:
        self._judge, self._path = judge, path or default_path()

    @property
    def name(self) -> str:
        return self._judge.name

    @property
    def identity(self) -> str:
        return self._judge.identity

    @property
    def usage(self) -> Usage | None:
        return self._judge.usage

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        # A pair that is there several times is judged once.
        places: dict[bytes, list[int]] = {}
        for i, pair in enumerate(pairs):
            places.setdefault(_key(self.identity, pair), []).append(i)
        with self._open() as database:
            missing = []
            for key, indices in places.items():
                kept = self._look_up(database, key)
                if kept is None:
                    missing.append(key)
                else:
                    yield from ((i, kept) for i in indices)
            for k, judgement in self._judge.judge([pairs[places[key][0]] for key in missing]):
                self._keep(database, missing[k], judgement)
                yield from ((i, judgement) for i in places[missing[k]])

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Each statement is a transaction of its own.
            database = sqlite3.connect(self._path, timeout=_WAIT, isolation_level=None)
        with contextlib.closing(database):
            with self._explained():
                _write_ahead(database)
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute(_SCHEMA)
            yield database

    def _look_up(self, database: sqlite3.Connection, key: bytes) -> Judgement | None:
        with self._explained():
            row = database.execute(
                "SELECT confidence, mode, category FROM judgements WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Judgement(*row)

    def _keep(self, database: sqlite3.Connection, key: bytes, judgement: Judgement) -> None:
        if judgement.confidence is not None:
            with self._explained():
                database.execute(
                    "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?)",
                    (key, judgement.confidence, judgement.mode, judgement.category),
                )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{self._path}: the judgements that are kept here cannot be used ({error}). Delete the file, "
                "free space, or set XDG_CACHE_HOME to a folder that can be written."
            ) from error


def _write_ahead(database: sqlite3.Connection) -> None:
    """Let readers and a writer in at the same time.

    SQLite does not wait where two processes change a new file to this at once: each would wait for the other.
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
