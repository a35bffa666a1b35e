"""`sealed.json`: what a sealed set showed of the files in a folder."""

from __future__ import annotations

from pathlib import Path

from rs_gguf.records.metrics import Record, RunRecord
from rs_gguf.records.rows import Row, read_json

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
    def in_folder(cls, folder: Path, record: RunRecord) -> SealedRecord | None:
        """Return the record of a folder; None if no sealed set was opened for the files of `record`.

        A new search leaves the record of the earlier files in the folder.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / NAME
        if not path.is_file():
            return None
        found = cls.of(read_json(path), path)
        return found if _identity(found) == _identity(record) else None


def _identity(record: RunRecord) -> tuple[str, Row]:
    """Return the model's hash and what tells its files from others: new measurements change their hashes."""
    facts = {"estimator", "ridge", "layers", "strength", "benign_target"}
    files = {name: file.model_dump(include=facts) for name, file in record.files.items()}
    return record.model.sha256, files
