"""Files are complete or absent, whatever step of writing fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from rs_gguf.errors import InputError
from rs_gguf.records.files import check_writable, from_home, remove_drafts, sha256, write_atomic, write_text
from rs_gguf.records.rows import json_lines, read_json, write_json

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_it_creates_folders_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.bin"
    write_atomic(path, lambda file: file.write(b"one"))
    write_atomic(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), ValueError("bad")])
def test_a_writer_that_raises_midway_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def half(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise failure

    with pytest.raises(type(failure)):
        write_atomic(path, half)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("old", [b"old", None])
def test_a_full_disk_is_an_input_error(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def full(file: BinaryIO) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"cannot write .*file\.bin: No space left"):
        write_atomic(path, full)
    assert names(tmp_path) == ([] if old is None else ["file.bin"])
    assert old is None or path.read_bytes() == old


def test_a_disk_that_fills_up_only_at_the_flush_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_text(tmp_path / "file.txt", "text")
    assert names(tmp_path) == []


def test_the_file_is_not_in_its_place_before_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    seen = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        seen.append((path.exists(), os.fstat(handle).st_size))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    write_text(path, "text")
    assert seen == [(False, 4)]


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*options: Any) -> BinaryIO:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"cannot write .*file\.txt: Permission denied\. .* another folder"):
        write_text(tmp_path / "file.txt", "text")


@posix_only
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_input_error(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write_text(folder / "file.txt", "text")


@posix_only
def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "piped")
    assert os.read(reader, 10) == b"piped"
    os.close(reader)
    assert pipe.is_fifo()
    assert names(tmp_path) == ["link", "pipe", "target"]


@posix_only
def test_what_stdout_leads_to_may_be_a_pipe() -> None:
    """The pipe's name, pipe:[123], does not exist as a file."""
    reader, writer = os.pipe()
    link = Path(f"/dev/fd/{writer}")
    check_writable(link)
    write_text(link, "piped")
    assert os.read(reader, 10) == b"piped"
    os.close(reader)
    os.close(writer)


@posix_only
def test_names_may_be_as_long_as_names_can_be_and_links_lead_nowhere(tmp_path: Path) -> None:
    longest, loop = tmp_path / ("名" * 85), tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (longest, loop):
        check_writable(path)
        write_text(path, "text")
        assert path.read_text() == "text"
    assert names(tmp_path) == ["loop", longest.name]
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / ("n" * 256))


def test_a_place_that_cannot_hold_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "file" / "inside.txt", "text")
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["file", "folder"]


def test_a_place_is_tried_before_it_is_needed_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "deep" / "file")
    for bad in (tmp_path, tmp_path / "file" / "inside", tmp_path / "file" / "deep" / "inside"):
        with pytest.raises(InputError, match="cannot write"):
            check_writable(bad)

    def denied(**options: Any) -> BinaryIO:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match="Permission denied"):
        check_writable(tmp_path / "file")
    check_writable(Path(os.devnull))  # A device is written directly.
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_tilde_is_home_or_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # as Windows calls it
    assert from_home("~/a/b") == from_home(Path("~/a/b")) == tmp_path / "a" / "b"
    assert from_home("~draft.csv") == Path("~draft.csv")
    assert from_home("a/~") == Path("a/~")


@posix_only
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file.txt", "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_of_drafts_those_that_nobody_writes_to_any_more_are_removed(tmp_path: Path) -> None:
    old = [".a.gguf.x1y2", ".b.gguf.x1y2", ".b.json.x1y2", "a.gguf"]
    for name in [*old, ".a.gguf.new"]:
        (tmp_path / name).touch()
    for name in old:
        os.utime(tmp_path / name, (0, 0))
    remove_drafts(tmp_path, "*.gguf")
    assert names(tmp_path) == [".a.gguf.new", ".b.json.x1y2", "a.gguf"]
    remove_drafts(tmp_path / "none", "*")


def test_json_is_utf8_and_keeps_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {"z": "六四", "a": [1, None, 0.1]}
    write_json(path, value)
    assert json.loads(path.read_bytes()) == value
    text = path.read_text(encoding="utf-8")
    assert "六四" in text
    assert text.index('"z"') < text.index('"a"')
    assert text.endswith("}\n")


def test_json_of_a_name_that_is_no_text_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"file": os.fsdecode(b"a\xff.gguf"), "said": "half \ud83d, whole \U0001f600"}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert "\U0001f600" in (tmp_path / "v.json").read_text(encoding="utf-8")


def test_rows_are_cut_at_line_feeds_alone() -> None:
    rows = [{"answer": "one\u2028two\x85three"}, {"answer": "x"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n \n"
    assert json_lines(text) == rows


def test_sha256_of_more_than_one_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000  # over two MiB, not a multiple of the read size
    (tmp_path / "file.bin").write_bytes(data)
    assert sha256(tmp_path / "file.bin") == hashlib.sha256(data).hexdigest()
