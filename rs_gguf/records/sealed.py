"""`sealed.json`: what a sealed set showed of the files in a folder."""

from __future__ import annotations

from pathlib import Path

from rs_gguf.records.metrics import Record, RunRecord
from rs_gguf.records.rows import read_json

NAME = "sealed.json"


class SealedSet(Record):
    """Which sealed set was opened, and when."""

    set: str
    set_sha256: str
    opened: str


class SealedRecord(RunRecord):
    """The whole file: a `RunRecord` of the sealed set, and which set that is."""

    sealed: SealedSet

    @classmethod
    def in_folder(cls, folder: Path) -> SealedRecord | None:
        """Return the record of a folder; None if no sealed set was opened for its files.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / NAME
        return cls.of(read_json(path), path) if path.is_file() else None
