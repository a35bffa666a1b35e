"""What every GGUF file of this project shares: provenance under its own prefix, and writing that is verified.

In: facts about the origin of a vector or an adapter, and how to put its tensors into a file. Out: a file that
is whole, was read back and compared, and is the same bytes for the same content.
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
    """The file's own metadata as Python values, without the reader's three header fields."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def provenance_of(values: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """Return the entries of `metadata` that this project wrote, without their prefix, as schema 2 has them."""
    keys = [key for key in values if key.startswith(PREFIX) and key != SCHEMA_KEY]
    found = {key.removeprefix(PREFIX): values[key] for key in keys}
    if values.get(SCHEMA_KEY) != 1:
        return found
    renamed = {_RENAMED_1.get(key, key): value for key, value in found.items()}
    return renamed | ({"estimator": GATED_ADAPTER} if renamed.get("estimator") == "gate" else {})


def schema_faults(values: Mapping[str, Any]) -> list[str]:
    """Why this release cannot read a file of this project; empty for files of others."""
    version = values.get(SCHEMA_KEY)
    if version is None or version in _READABLE:
        return []
    return [
        f"{SCHEMA_KEY} is {version!r:.80}; this release reads {' and '.join(map(str, _READABLE))}. Use the "
        "release that wrote the file."
    ]


def add_provenance(writer: GGUFWriter, provenance: Mapping[str, ProvenanceValue]) -> None:
    """Put `provenance` and the schema version into a file that is being written."""
    writer.add_uint32(SCHEMA_KEY, SCHEMA_VERSION)
    for key, value in provenance.items():
        if PREFIX + key == SCHEMA_KEY:
            raise InputError(f"The provenance key {key!r} is taken by the file format; rename it.")
        # Types are named, since the writer would store a list of floats as float32 and drop an empty string.
        if isinstance(value, list):
            writer.add_key_value(PREFIX + key, value, GGUFValueType.ARRAY, _VALUE_TYPES[type(value[0])])
        else:
            writer.add_key_value(PREFIX + key, value, _VALUE_TYPES[type(value)])


def finish(writer: GGUFWriter) -> None:
    """Write out what was added and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_verified(path: Path, serialise: Callable[[Path], None], same: Callable[[Path], bool]) -> None:
    """Write `path` whole or not at all; what was written is read back before it takes its place and after.

    `serialise` writes a draft, `same` says whether a file holds what was meant. Raises `InputError` when the
    place cannot be written, `VerificationError` when what was read differs from what was meant.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / "draft.gguf"
            serialise(draft)
            if not same(draft):
                raise VerificationError(
                    f"{path}: the content did not survive a round trip; nothing was written."
                )
            data = draft.read_bytes()
    except OSError as error:
        raise InputError(f"No room for a draft of {path} ({error}). Free space or set TMPDIR.") from error
    write_compared(path, data)


def write_compared(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all and compare its bytes; of a pipe there are none left to compare.

    Raises as `write_verified` does.
    """
    write_atomic(path, lambda file: file.write(data))
    if path.is_file() and path.read_bytes() != data:
        raise VerificationError(
            f"{path} holds other bytes than were written; check the disk and write it again."
        )
