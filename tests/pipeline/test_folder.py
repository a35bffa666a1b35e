"""Test that rows survive a kill at any byte, and that keys decide which stages are done."""

import json
from pathlib import Path

import pytest

from rs_gguf.errors import InputError
from rs_gguf.pipeline.folder import RunFolder, key_of


def test_rows_survive_a_kill_at_any_byte(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "whole")
    log = folder.log("answers.jsonl", "k")
    rows = [{"id": str(i), "answer": f"line\u2028{i} “ü” 答"} for i in range(4)]
    for row in rows:
        log.append(row)
    data = (folder / "answers.jsonl.part").read_bytes()
    for size in range(len(data) + 1):
        torn = RunFolder(tmp_path / str(size))
        (torn / "answers.jsonl.part").write_bytes(data[:size])
        resumed = torn.log("answers.jsonl", "k")
        kept = list(resumed.rows.values())
        assert kept == rows[: len(kept)]
        assert len(kept) >= max(0, data[:size].count(b"\n") - 1)
        for row in rows[len(kept) :]:
            resumed.append(row)
        resumed.finish([row["id"] for row in rows])
        assert torn.read_rows("answers.jsonl") == rows


def test_rows_are_kept_until_their_stage_is_done(tmp_path: Path) -> None:
    """After a kill between the final file and the mark, the rows of the stage are not lost."""
    folder = RunFolder(tmp_path)
    log = folder.log("answers.jsonl", "k")
    log.append({"id": "1", "answer": "yes"})
    log.finish(["1"])
    assert RunFolder(tmp_path).log("answers.jsonl", "k").rows == log.rows
    folder.mark_done("answer", "k", 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "state.json"]


def test_a_log_begins_with_what_was_kept_under_its_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = folder.log("measured.jsonl", "k")
    for number in "12":
        log.append({"id": number, "answer": "yes"})
    log.keep()
    folder.mark_done("measure", "k", 1.0)
    assert not list(tmp_path.glob("*.part"))
    assert folder.log("measured.jsonl", "other").rows == {}
    again = folder.log("measured.jsonl", "k")
    assert again.rows == log.rows
    again.append({"id": "3", "answer": "no"})
    assert list(folder.log("measured.jsonl", "k").rows) == ["1", "2", "3"]


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    row = {"id": "1", "answer": "half \ud83d, whole 😀"}
    log = folder.log("answers.jsonl", "k")
    log.append(row)
    assert folder.log("answers.jsonl", "k").rows == {"1": row}
    log.finish(["1"])
    assert folder.read_rows("answers.jsonl") == [row]


def test_rows_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("judgements.jsonl", "old").append({"id": "1"})
    assert folder.log("judgements.jsonl", "new").rows == {}


def test_a_stage_is_done_for_its_own_inputs_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    key = key_of("answer", {"seed": 0})
    assert not folder.is_done("answer", key)
    folder.mark_done("answer", key, 1.5)
    assert folder.is_done("answer", key)
    assert not folder.is_done("answer", key_of("answer", {"seed": 1}))
    assert RunFolder(tmp_path).seconds() == {"answer": 1.5}
    folder.mark_done("score", key, 2.5)
    folder.forget("answer", "write")
    assert RunFolder(tmp_path).seconds() == {"score": 2.5}


def test_only_files_of_stages_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_done("answer", "key", 1.5)
    folder.log("judgements.jsonl", "key").append({"id": "1"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.path.joinpath("activations").symlink_to(elsewhere)
    (tmp_path / "adapters").mkdir()
    kept = [tmp_path / "own.jsonl", tmp_path / "model.safetensors", tmp_path / "remove.gguf"]
    for path in kept:
        path.touch()
    folder.forget_all()
    assert folder.seconds() == {}
    assert sorted(tmp_path.iterdir()) == sorted([*kept, elsewhere])


@pytest.mark.parametrize("text", [None, '{"id": "1"}\n{"id"\n'], ids=["missing", "damaged"])
def test_a_file_that_cannot_be_read_names_the_remedy(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"answers\.jsonl .*--fresh"):
        RunFolder(tmp_path).read_rows("answers.jsonl")


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.locked(), pytest.raises(InputError, match="in use"), second.locked():
        pass


def test_an_error_of_the_run_passes_the_lock_unchanged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(PermissionError, match="elsewhere"), folder.locked():
        raise PermissionError(13, "Permission denied", "elsewhere")
    with folder.locked():  # the lock is free again
        pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"cannot write in .*--out"), RunFolder(tmp_path).locked():
        pass


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(InputError, match="cannot use"):
        RunFolder(tmp_path / "file")
