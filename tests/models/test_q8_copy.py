"""The Q8_0 copy has the same weights as the model; if it cannot be made, the model is loaded."""

from __future__ import annotations

import os
import shutil
import struct
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from fixtures.architectures import llama
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from rs_gguf.engines.llama.file import LlamaFile
from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy
from rs_gguf.steering.container import finish, metadata

Q5_0, Q8_0, F32 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny model with Q5_0 matrices. The machine multiplies Q8_0 faster; the cache is empty."""
    monkeypatch.setattr(q8_copy, "_copy_helps", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny_qwen2(tmp_path / "f32.gguf")
    return written(tmp_path / "f32.gguf", tmp_path / "model.gguf")


def written(source: Path, path: Path, *, without: str = "", **values: int) -> Path:
    """Write `source` with its matrices in Q5_0, without the tensor `without`, with more metadata."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in values.items():
        writer.add_uint16(key.replace("_", "."), value)
    for tensor in reader.tensors:
        kind = Q5_0 if len(tensor.shape) == 2 else F32
        if tensor.name != without:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    finish(writer)
    return path


def test_the_copy_has_the_same_weights_and_metadata(model: Path) -> None:
    expected = q8_copy.size_to_load(model, gguf_header.read(model))
    assert not (model.parent / "cache").exists(), "a plan makes nothing"
    copy = q8_copy.file_to_load(model)
    assert copy != model
    assert copy.stat().st_size == pytest.approx(expected, abs=1000)  # padding
    assert expected > model.stat().st_size + 10_000
    before, after = GGUFReader(model), GGUFReader(copy)
    assert metadata(after) == metadata(before)
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        multiplied = old.tensor_type == Q5_0 and old.name != "token_embd.weight"
        assert new.tensor_type == (Q8_0 if multiplied else old.tensor_type)
        values = [gguf.quants.dequantize(t.data, t.tensor_type) for t in (old, new)]
        np.testing.assert_array_equal(*values)


def test_llama_cpp_computes_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_tiles(defaults: Any = llama_cpp.llama_model_default_params) -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp, "llama_model_default_params", without_tiles)
    pairs = [([5, 6, 7], [8, 9, 10, 11]), ([200, 3], [40, 41])]
    with llama(model) as wide:
        logprobs = wide.token_logprobs(pairs)
    assert len(list((model.parent / "cache").rglob("*.gguf"))) == 1, "it should load the copy"
    monkeypatch.setattr(q8_copy, "_copy_helps", lambda: False)
    with llama(model) as narrow:
        expected = narrow.token_logprobs(pairs)
    for (a, _), (b, _) in zip(logprobs, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # nats; 0 if both sum in the same order


def test_a_copy_is_made_once(model: Path) -> None:
    copy = q8_copy.file_to_load(model)
    made = copy.stat().st_mtime_ns
    assert q8_copy.file_to_load(model) == copy
    assert copy.stat().st_mtime_ns == made


def test_an_embedding_that_is_the_output_too_is_multiplied(model: Path) -> None:
    tied = written(model.with_name("f32.gguf"), model.with_name("tied.gguf"), without="output.weight")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(q8_copy.file_to_load(tied)).tensors}
    assert kinds["token_embd.weight"] == Q8_0


def test_the_model_itself_where_no_copy_helps(model: Path) -> None:
    without_q5 = model.with_name("f32.gguf")
    assert q8_copy.file_to_load(without_q5) == without_q5
    assert q8_copy.size_to_load(without_q5, gguf_header.read(without_q5)) == without_q5.stat().st_size


def test_a_part_of_a_model_is_refused_and_a_merged_one_is_copied(model: Path) -> None:
    """llama.cpp would find the other parts by their names, but the copy would hold only the first part."""
    part, merged = (
        written(model.with_name("f32.gguf"), model.with_name(f"split{count}.gguf"), split_count=count)
        for count in (2, 0)
    )
    with pytest.raises(InputError, match="one of 2 files"):
        LlamaFile(part)
    assert q8_copy.file_to_load(merged) != merged


def test_a_small_share_is_not_worth_a_copy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8_copy, "_MIN_SHARE", 0.9)
    assert q8_copy.file_to_load(model) == model
    assert q8_copy.size_to_load(model, gguf_header.read(model)) == model.stat().st_size


def test_no_copy_on_a_disk_without_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2 * model.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    assert q8_copy.file_to_load(model) == model
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert q8_copy.file_to_load(model) != model


def test_drafts_of_killed_processes_go(model: Path) -> None:
    draft = q8_copy.file_to_load(model).with_name(".0123.gguf.x1y2")
    draft.touch()
    os.utime(draft, (0, 0))
    q8_copy.file_to_load(model)
    assert not draft.exists()


Tensor = tuple[str, list[int], int, int]  # name, shape, type, offset in the data
WIDE: Tensor = ("blk.0.attn_q.weight", [32, 40], Q5_0, 0)  # 880 bytes, 896 with padding


def by_hand(path: Path, *tensors: Tensor, alignment: int = 32) -> Path:
    """Write a file with these tensors in its header and 1,024 bytes of data."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    data += text("general.alignment") + struct.pack("<II", GGUFValueType.UINT32, alignment)
    for name, shape, kind, offset in tensors:
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    path.write_bytes(data + bytes(-len(data) % 32 + 1024))
    return path


@pytest.mark.parametrize(
    ("tensors", "alignment"),
    [
        ([WIDE], 2**28),
        ([WIDE, ("again", [32, 40], Q5_0, 0)], 32),
        ([WIDE, ("beyond", [2**40], F32, 896)], 32),
        ([WIDE, ("unknown", [1], 999, 896)], 32),
    ],
    ids=["padding", "the same bytes twice", "more than there is", "a type of tomorrow"],
)
def test_of_a_header_that_is_not_sound_no_byte_is_written(
    model: Path, tensors: list[Tensor], alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []

    class Watched(BytesIO):
        def write(self, data: Any) -> int:
            written.append(data)
            return len(data)

    monkeypatch.setattr(q8_copy, "write_atomic", lambda path, write: write(Watched()))
    path = by_hand(model.with_name("stranger.gguf"), *tensors, alignment=alignment)
    assert q8_copy.file_to_load(path) == path
    assert written == []


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([WIDE, (WIDE[0], [3, 3], F32, 896)], "there twice"),
        ([("", [], F32, 0)], "empty"),
        ([("deep", [1] * 5, F32, 0)], "5 dimensions"),
    ],
)
def test_a_header_that_llama_cpp_refuses_is_not_read_on(
    model: Path, tensors: list[Tensor], said: str
) -> None:
    path = by_hand(model.with_name("stranger.gguf"), *tensors)
    with pytest.raises(InputError, match=said):
        gguf_header.read(path)


@pytest.mark.parametrize("numbers", ["<IQQ", "<IQQQ"], ids=["keys of zeros", "a key that never ends"])
def test_a_header_is_not_believed_beyond_the_file(numbers: str, tmp_path: Path) -> None:
    values = (3, 0, 2**60, 2**62)
    path = tmp_path / "zeros.gguf"
    path.write_bytes(b"GGUF" + struct.pack(numbers, *values[: len(numbers) - 1]) + bytes(4096))
    with pytest.raises(InputError, match=r"empty|ends too early"):
        gguf_header.read(path)


def test_the_model_itself_where_none_can_be_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0, 100, model.stat().st_size // 2):
        cut = model.with_name("cut.gguf")
        cut.write_bytes(model.read_bytes()[:size])
        assert q8_copy.file_to_load(cut) == cut
    assert not [path for path in (model.parent / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(q8_copy, "_MAX_BYTES_ADDED", 1000)
    assert q8_copy.file_to_load(model) == model
    monkeypatch.undo()
    monkeypatch.setattr(q8_copy, "_copy_helps", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model))  # A file, so no folder can be made in it.
    assert q8_copy.file_to_load(model) == model
