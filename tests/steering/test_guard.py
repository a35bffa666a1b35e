"""The checks before the `gguf` package reads a file: one broken file per rule."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rs_gguf.errors import InputError
from rs_gguf.steering.guard import MAX_ENTRIES, open_gguf

HUGE = 2**63


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int = 0, values: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values)


def value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str | bytes, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def with_data(head: bytes, size: int, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + bytes(size)


ALIGNMENT = "general.alignment"
BROKEN = {
    "nothing": (b"", "ends inside the magic"),
    "other magic": (header(magic=b"GGML"), "does not begin with 'GGUF'"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "cut counts": (header()[:-1], "ends inside the metadata count"),
    "tensors without end": (header(tensors=2**64 - 1), f"at most {MAX_ENTRIES} entries"),
    "values without end": (header(values=HUGE), f"at most {MAX_ENTRIES} entries"),
    "counts beyond the file": (header(values=100), "ends inside the length of a metadata key"),
    "key length": (header(values=1) + struct.pack("<Q", HUGE), "at most 65535 are accepted"),
    "key of kilobytes": (header(values=1) + text("k" * 65_536), "at most 65535 are accepted"),
    "empty key": (header(values=1) + value("", 0, b"\0"), "empty, reserved or used twice"),
    "reader's own key": (header(values=1) + value("GGUF.version", 0, b"\0"), "reserved"),
    "key twice": (header(values=2) + 2 * value("a", 0, b"\0"), "used twice"),
    "key not text": (header(values=1) + value(b"\xff", 0, b"\0"), "not UTF-8"),
    "value type": (header(values=1) + value("a", 13, b"\0"), "unknown value type 13"),
    "cut value": (header(values=1) + value("a", 10, b"\0" * 7), "ends inside 'a'"),
    "string length": (header(values=1) + value("a", 8, struct.pack("<Q", 2**64 - 1)), "bytes long"),
    "string beyond the file": (
        header(values=1) + value("a", 8, struct.pack("<Q", 9) + b"x"),
        "ends inside 'a'",
    ),
    "string not text": (header(values=1) + value("a", 8, text(b"\xc3\x28")), "not UTF-8"),
    "list without end": (
        header(values=1) + value("a", 9, struct.pack("<IQ", 4, 2**64 - 1)),
        "list elements in 'a'",
    ),
    "list of lists": (header(values=1) + value("a", 9, struct.pack("<IQ", 9, 1)), "list of lists"),
    "list type": (header(values=1) + value("a", 9, struct.pack("<IQ", 99, 1)), "unknown value type 99"),
    "cut list": (header(values=1) + value("a", 9, struct.pack("<IQ", 4, 3) + bytes(11)), "ends inside 'a'"),
    "lists that add up": (
        header(values=2)
        + b"".join(
            value(k, 9, struct.pack("<IQ", 0, MAX_ENTRIES // 2) + bytes(MAX_ENTRIES // 2)) for k in "ab"
        ),
        "list elements in 'b'",
    ),
    "alignment 0": (header(values=1) + value(ALIGNMENT, 4, struct.pack("<I", 0)), "power of two"),
    "alignment 24": (header(values=1) + value(ALIGNMENT, 4, struct.pack("<I", 24)), "power of two"),
    "alignment type": (header(values=1) + value(ALIGNMENT, 10, struct.pack("<Q", 32)), "UINT32 is needed"),
    "name length": (header(1) + tensor("n" * 64, 4), "at most 63 are accepted"),
    "name with NUL": (header(1) + tensor("direction.1\0", 4), "holds a NUL"),
    "name twice": (header(2) + 2 * tensor("direction.1", 4), "used twice"),
    "no dimension": (header(1) + tensor("t"), "has 0 dimensions"),
    "five dimensions": (header(1) + tensor("t", 1, 1, 1, 1, 1), "has 5 dimensions"),
    "dimensions without end": (header(1) + text("t") + struct.pack("<I", 2**32 - 1), "4294967295 dimensions"),
    "dimension 0": (with_data(header(1) + tensor("t", 0), 32), "no dimension may be 0"),
    "dimension overflow": (with_data(header(1) + tensor("t", 2**62, 4), 32), "ends at byte"),
    "wrapping to a small size": (with_data(header(1) + tensor("t", 2**32, 2**32, 2), 32), "ends at byte"),
    "tensor type": (with_data(header(1) + tensor("t", 4, kind=4), 32), "unknown tensor type 4"),
    "part of a quantisation block": (with_data(header(1) + tensor("t", 33, kind=8), 64), "divide by 32"),
    "data missing": (header(1) + tensor("t", 4), "ends at byte"),
    "data cut by a byte": (with_data(header(1) + tensor("t", 8), 31), "ends at byte"),
    "padding missing": (with_data(header(1) + tensor("t", 4), 16), "ends at byte"),
    "offset outside": (with_data(header(1) + tensor("t", 8, offset=2**63), 32), "offset 9223372036854775808"),
    "overlap": (with_data(header(2) + tensor("a", 8) + tensor("b", 8), 64), "'b' has offset 0 where 32"),
    "gap": (with_data(header(2) + tensor("a", 8) + tensor("b", 8, offset=64), 96), "offset 64 where 32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN[name]
    (tmp_path / "f.gguf").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_gguf(tmp_path / "f.gguf")
    assert reason in str(caught.value)


def test_names_in_messages_are_escaped_and_short(tmp_path: Path) -> None:
    """Untrusted names must neither control a terminal nor fill a screen."""
    key = "\x1b[2J" + "k" * 60_000
    (tmp_path / "f.gguf").write_bytes(header(values=1) + value(key, 99, b""))
    with pytest.raises(InputError, match="unknown value type") as caught:
        open_gguf(tmp_path / "f.gguf")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_sound_file_is_opened(tmp_path: Path) -> None:
    """It has every value type, an empty list, a list of texts, another alignment, and three tensor types."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    values = [value(f"k.{kind}", kind, bytes(size)) for kind, size in sizes.items()]
    values += [
        value("list", 9, struct.pack("<IQ", 8, 2) + text("ä") + text("")),
        value("none", 9, struct.pack("<IQ", 4, 0)),
        value(ALIGNMENT, 4, struct.pack("<I", 8)),
    ]
    tensors = [tensor("a", 3), tensor("b", 2, 2, kind=1, offset=16), tensor("c", 32, kind=8, offset=24)]
    head = header(3, len(values), version=2) + b"".join(values) + b"".join(tensors)
    (tmp_path / "f.gguf").write_bytes(with_data(head, 16 + 8 + 40, alignment=8))
    reader = open_gguf(tmp_path / "f.gguf")
    assert reader.fields["list"].contents() == ["ä", ""]
    assert [(t.name, t.shape.tolist(), t.n_bytes) for t in reader.tensors] == [
        ("a", [3], 12),
        ("b", [2, 2], 8),
        ("c", [32], 34),
    ]
