"""Writing a model anew keeps every byte that is not changed, and joins the parts of a split model."""

from __future__ import annotations

import io
from pathlib import Path

import gguf
import numpy as np
import pytest
from fixtures.split import write_split
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGMLQuantizationType

from rs_gguf.errors import InputError
from rs_gguf.models import rewrite
from rs_gguf.models.rewrite import Change
from rs_gguf.steering.container import metadata


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path)
    return path


def rewritten(path: Path, *entries: bytes, **changes: Change) -> bytes:
    file = io.BytesIO()
    rewrite.write(file, rewrite.parts_of(path), changes, entries)
    return file.getvalue()


def test_without_a_change_the_file_is_the_same(model: Path) -> None:
    assert rewritten(model) == model.read_bytes()


def test_the_number_of_rows_at_once_makes_no_difference(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts: list[int] = []

    def doubled(rows: bytes, first: int) -> bytes:
        firsts.append(first)
        return (2 * np.frombuffer(rows, np.float32)).tobytes()

    change = {"blk.1.ffn_down.weight": Change(GGMLQuantizationType.F32, doubled)}
    whole = rewritten(model, **change)
    assert firsts == [0]
    monkeypatch.setattr(rewrite, "_AT_ONCE", 5 * 64)  # five rows of ffn_down
    monkeypatch.setattr(rewrite, "_COPIED", 100)
    assert rewritten(model, **change) == whole
    assert firsts == [0, *range(0, 32, 5)]


def test_parts_are_joined(model: Path, tmp_path: Path) -> None:
    parts = write_split(model, tmp_path / "model.gguf", 12)
    assert len(parts) > 2
    assert [part.path for part in rewrite.parts_of(parts[1])] == parts
    (tmp_path / "joined.gguf").write_bytes(rewritten(parts[0]))
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(tmp_path / "joined.gguf")
    assert metadata(after) == metadata(before)
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (new.tensor_type, new.shape.tolist()) == (old.tensor_type, old.shape.tolist())
        assert new.data.tobytes() == old.data.tobytes()


def test_parts_that_do_not_belong_together_are_refused(model: Path, tmp_path: Path) -> None:
    first, second, *_ = write_split(model, tmp_path / "model.gguf", 12)
    second.rename(tmp_path / "second")
    with pytest.raises(InputError, match=r"model-00002-of-0000\d\.gguf is missing: the model has"):
        rewrite.parts_of(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"model-00002-of-0000\d\.gguf is not part 2 of"):
        rewrite.parts_of(first)
    with pytest.raises(InputError, match=r"its name should end in -00001-of-0000\d\.gguf"):
        rewrite.parts_of(first.rename(tmp_path / "renamed.gguf"))


def test_a_damaged_file_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-400])
    file = io.BytesIO()
    with pytest.raises(InputError, match="is not stored where it belongs"):
        rewrite.write(file, rewrite.parts_of(tmp_path / "cut.gguf"), {})
    assert file.getvalue() == b""
