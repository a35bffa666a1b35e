"""Write what all GGUF files of this project share: provenance under one prefix, and a verified file.

In: facts about the origin of a vector or an adapter, and a function that writes its tensors. Out: a complete
file that was read back and compared. The same content gives the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from rs_gguf.errors import InputError, VerificationError
from rs_gguf.records.files import write_atomic
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering.provenance import ProvenanceValue

PREFIX = "rs_gguf."
SCHEMA_KEY = f"{PREFIX}schema_version"
SCHEMA_VERSION = 2
_READABLE = (1, SCHEMA_VERSION)
_RENAMED_1 = {"gate.passed": "acceptance.passed", "margin": "benign_target"}  # keys of schema 1

_VALUE_TYPES = {
    str: GGUFValueType.STRING,
    int: GGUFValueType.INT64,
    float: GGUFValueType.FLOAT64,
    bool: GGUFValueType.BOOL,
}


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """Return the file's own metadata as Python values, without the reader's three header fields."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def provenance_of(values: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """Return the entries of `metadata` that this project wrote, without the prefix, with schema 2 keys."""
    keys = [key for key in values if key.startswith(PREFIX) and key != SCHEMA_KEY]
    facts = {key.removeprefix(PREFIX): values[key] for key in keys}
    if values.get(SCHEMA_KEY) != 1:
        return facts
    renamed = {_RENAMED_1.get(key, key): value for key, value in facts.items()}
    return renamed | ({"estimator": GATED_ADAPTER} if renamed.get("estimator") == "gate" else {})


def schema_faults(values: Mapping[str, Any]) -> list[str]:
    """Return why this release cannot read a file of this project; an empty list for files of other tools."""
    version = values.get(SCHEMA_KEY)
    if version is None or version in _READABLE:
        return []
    return [
        f"{SCHEMA_KEY} is {version!r:.80}; this release reads {' and '.join(map(str, _READABLE))}. Use the "
        "release that wrote the file."
    ]


def add_provenance(writer: GGUFWriter, provenance: Mapping[str, ProvenanceValue]) -> None:
    """Add `provenance` and the schema version to an open file. Raise `InputError` for a reserved key."""
    writer.add_uint32(SCHEMA_KEY, SCHEMA_VERSION)
    for key, value in provenance.items():
        if PREFIX + key == SCHEMA_KEY:
            raise InputError(
                f"the provenance key {key!r} is reserved by the file format; choose another name."
            )
        # Name the types: the writer would otherwise store a list of floats as float32 and drop empty strings.
        if isinstance(value, list):
            writer.add_key_value(PREFIX + key, value, GGUFValueType.ARRAY, _VALUE_TYPES[type(value[0])])
        else:
            writer.add_key_value(PREFIX + key, value, _VALUE_TYPES[type(value)])


def finish(writer: GGUFWriter) -> None:
    """Write everything that was added and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_verified(path: Path, serialise: Callable[[Path], None], same: Callable[[Path], bool]) -> None:
    """Write `path` completely or not at all; read the content back before and after it is moved there.

    `serialise` writes a draft. `same` returns whether a file holds the intended content.

    Raises:
        InputError: `path` or the folder for drafts cannot be written.
        VerificationError: the content that was read back differs from the intended content.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / "draft.gguf"
            serialise(draft)
            if not same(draft):
                raise VerificationError(
                    f"{path}: the content did not survive a round trip through a draft; nothing was written. "
                    "Check the disk of TMPDIR."
                )
            data = draft.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot write a draft of {path} ({error}). Free disk space or set TMPDIR."
        ) from error
    write_compared(path, data)


def write_compared(path: Path, data: bytes) -> None:
    """Write `path` completely or not at all and compare its bytes. A pipe cannot be read back for that.

    Raises:
        InputError: `path` cannot be written.
        VerificationError: the bytes that were read back differ.
    """
    write_atomic(path, lambda file: file.write(data))
    if path.is_file() and path.read_bytes() != data:
        raise VerificationError(
            f"{path} holds other bytes than were written. Check the disk and write the file again."
        )
