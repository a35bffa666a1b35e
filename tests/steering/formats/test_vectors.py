"""Conversion from each writer's conventions, sums, cosines.

The expectations on block numbers are stated by hand from the writers' sources; `test_convert_tools` checks
them against what the tools themselves do to a model.
"""

# mypy: disable-error-code="dict-item"
# Rows are given as lists and in float64, too, which the constructors convert.
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from rs_gguf.errors import InputError
from rs_gguf.records import files
from rs_gguf.steering.formats.tools import FORMATS
from rs_gguf.steering.formats.vectors import convert
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import check, read, write

WIDTH = 32


def rows(*numbers: int, dtype: Any = np.float32) -> dict[int, npt.NDArray[Any]]:
    rng = np.random.default_rng(3)
    return {number: rng.standard_normal(WIDTH).astype(dtype) for number in numbers}


def write_gguf(path: Path, tensors: dict[str, npt.NDArray[Any]], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for key, value in metadata.items():
        getattr(writer, "add_string" if isinstance(value, str) else "add_float32")(
            f"controlvector.{key}", value
        )
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_the_source_do_not_pass_for_ours(tmp_path: Path) -> None:
    """A key of one of our names is a stranger's word, not what was found."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for key in ("file", "sha256", "format", "note"):
        writer.add_string(key, "forged")
    writer.add_tensor("direction.1", rows(1)[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = convert(tmp_path / "v.gguf", "repeng").vector.provenance
    assert (found["source.file"], found["source.format"]) == ("v.gguf", "repeng")
    assert found["source.sha256"] == files.sha256(tmp_path / "v.gguf")
    assert found["source.note"] == "forged"


def write_directions(path: Path, directions: dict[int, npt.NDArray[Any]], **metadata: Any) -> Path:
    return write_gguf(path, {f"direction.{number}": row for number, row in directions.items()}, **metadata)


@pytest.mark.parametrize("origin", ["cvector-generator", "jukofyork"])
def test_shifts_by_one_block_and_says_why(tmp_path: Path, origin: str) -> None:
    given = rows(1, 2, 3)
    vector, notes = (
        (result := convert(write_directions(tmp_path / "v.gguf", given), origin)).vector,
        result.notes,
    )
    assert vector.layers == [1, 2]
    assert np.array_equal(vector.directions[1], given[2])
    assert np.array_equal(vector.directions[2], given[3])
    assert f"Moved every direction by -1: {origin} numbers block 0 as 1" in notes[0]
    assert "'direction.1'" in notes[1]
    assert "block 0" in notes[1]
    assert vector.provenance["source.format"] == origin
    assert vector.provenance["source.base"] == 1
    assert vector.architecture == "qwen2"


@pytest.mark.parametrize("origin", ["easysteer", "saklas"])
def test_drops_direction_0_and_moves_nothing(tmp_path: Path, origin: str) -> None:
    given = rows(0, 1, 2)
    path = write_directions(tmp_path / "v.gguf", given, method="diffmean", loss=float("nan"))
    result = convert(path, origin)
    assert result.vector.layers == [1, 2]
    assert all(np.array_equal(result.vector.directions[layer], given[layer]) for layer in (1, 2))
    assert len(result.notes) == 1
    assert "direction.0 is rejected whole" in result.notes[0]
    assert result.vector.provenance["source.controlvector.method"] == "diffmean"
    assert "source.controlvector.loss" not in result.vector.provenance  # NaN says nothing


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_makes_float32_of_other_floats(tmp_path: Path, dtype: Any, container: str) -> None:
    given = rows(1, 2, dtype=dtype)
    path = tmp_path / f"v.{container}"
    if container == "gguf":
        write_directions(path, given)
    else:
        save_file({str(number): torch.from_numpy(row) for number, row in given.items()}, path)
    result = convert(path, "repeng", architecture="qwen2")
    assert all(np.array_equal(result.vector.directions[k], given[k].astype(np.float32)) for k in given)
    assert result.notes == (
        f"Stored F{dtype().itemsize * 8} as F32: llama.cpp rejects a file with any other type.",
    )


def test_reads_bfloat16_and_leaves_out_strange_tensors(tmp_path: Path) -> None:
    truth = rows(1)[1]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    packed = gguf.quants.quantize(truth, gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("direction.1", packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("offset", truth)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = convert(tmp_path / "v.gguf", "repeng", architecture="llama")
    expected = torch.from_numpy(truth).to(torch.bfloat16).float().numpy()
    assert np.array_equal(result.vector.directions[1], expected)
    assert "'offset'" in result.notes[0]
    assert "Stored BF16" in result.notes[1]
    assert result.vector.architecture == "llama"


def test_refuses_quantised_directions(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    packed = gguf.quants.quantize(rows(1)[1], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("direction.1", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="Q8_0"):
        convert(tmp_path / "v.gguf", "repeng")


@pytest.mark.parametrize(
    "pattern", ["{}", "layer_{}", "layer-{}", "model.layers.{}", "direction.{}", "layers.{}.vector"]
)
def test_reads_safetensors_named_by_one_number(tmp_path: Path, pattern: str) -> None:
    given = rows(0, 5, 12)
    tensors = {pattern.format(number): torch.from_numpy(row)[None, :] for number, row in given.items()}
    save_file(tensors, tmp_path / "v.safetensors")
    result = convert(tmp_path / "v.safetensors", "steering-vectors", architecture="qwen2")
    assert result.vector.layers == [5, 12]
    assert all(np.array_equal(result.vector.directions[layer], given[layer]) for layer in (5, 12))
    assert len(result.notes) == 1
    write(result.vector, tmp_path / "v.gguf")
    assert check(tmp_path / "v.gguf").warnings == ()


def test_reads_a_matrix_indexed_like_hidden_states(tmp_path: Path) -> None:
    """Entry 0 of `hidden_states` is the embedding, entry 1 the output of block 0: base 1 counts that away."""
    matrix = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"directions": matrix[1:]}, tmp_path / "blocks.safetensors")
    blocks = convert(tmp_path / "blocks.safetensors", "huggingface")
    save_file({"17": matrix[2], "18": matrix[3]}, tmp_path / "states.safetensors")
    states = convert(tmp_path / "states.safetensors", "huggingface", base=16)
    assert blocks.vector.layers == states.vector.layers == [1, 2]
    assert all(np.array_equal(blocks.vector.directions[k], states.vector.directions[k]) for k in (1, 2))
    assert np.array_equal(blocks.vector.directions[1], matrix[2].float().numpy())


def test_refuses_what_it_cannot_place(tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], message: str, base: int | None = None) -> None:
        save_file(tensors, tmp_path / "v.safetensors")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "v.safetensors", "huggingface", base=base)

    row = torch.ones(4)
    refused({"vector": row}, "which block is tensor 'vector'")
    for name in ("blocks.12.hook_resid_pre", "model.layers.3.input_layernorm", "blocks.2.hook_mlp_out"):
        refused({name: row}, "no block's output")
    refused({"layers.1.head.2": row}, "which block")
    refused({"a": torch.ones(2, 4), "b": row}, "which block")
    refused({"layer_99999999999": row}, "which block")
    refused({"layer_1": torch.ones(2, 4)}, r"shape \[2, 4\]")
    refused({"layer_1": torch.ones(4, dtype=torch.int32)}, "floats are needed")
    for name in ("-1", "layer_-3", "model.layers.-2.vector", "layer--1"):
        refused({name: row}, f"tensor '{name}' has a negative number.*counted from 0")
    refused({"layer_0": row}, "No direction is left")
    refused({"layer_1": row}, "would be block -1", base=2)
    refused({"layer_1": row, "block_1": row.clone()}, "second direction for block 1")
    refused({"layer_1": torch.full((4,), 1e300, dtype=torch.float64)}, "beyond float32")
    refused({"layer_1": row, "layer_2": torch.ones(5)}, r"widths \[4, 5\]")


def test_refuses_pickles_strangers_and_its_own(tmp_path: Path) -> None:
    torch.save({1: torch.ones(4)}, tmp_path / "v.pt")
    (tmp_path / "v.pkl").write_bytes(pickle.dumps({1: [1.0]}))
    for name in ("v.pt", "v.pkl"):
        with pytest.raises(InputError, match="would run code"):
            convert(tmp_path / name, "steering-vectors")
    long_header = (2**40).to_bytes(8, "little") + b"{}"
    for content in (b"", b"1234567", b"hello, world", long_header, bytes(8) + b"{}"):
        (tmp_path / "v.txt").write_bytes(content)
        with pytest.raises(InputError, match="safetensors"):
            convert(tmp_path / "v.txt", "huggingface")
    write(SteeringVector(rows(1)), tmp_path / "own.gguf")
    with pytest.raises(InputError, match="needs no conversion"):
        convert(tmp_path / "own.gguf", "cvector-generator")
    with pytest.raises(InputError, match="choose one of cvector-generator, jukofyork"):
        convert(tmp_path / "own.gguf", "gguf")


@pytest.mark.parametrize("origin", FORMATS)
def test_what_was_converted_passes_the_check(tmp_path: Path, origin: str) -> None:
    directions = rows(*range(FORMATS[origin], FORMATS[origin] + 4), dtype=np.float64)
    result = convert(write_directions(tmp_path / "v.gguf", directions), origin)
    write(result.vector, tmp_path / "out.gguf")
    assert (check(tmp_path / "out.gguf").errors, check(tmp_path / "out.gguf").warnings) == ((), ())
    assert read(tmp_path / "out.gguf") == result.vector


def test_combine_sums_like_llama_cpp_loading_several_files() -> None:
    """The reference is the loader's loop: a buffer from block 1 on, `dst += src * strength` in float32."""
    a = SteeringVector(rows(1, 2), {"method": "md"}, "qwen2")
    b = SteeringVector({2: rows(7)[7], 4: rows(8)[8]}, {"method": "rmd"}, "qwen2")
    buffer = np.zeros((4, WIDTH), dtype=np.float32)
    for vector, strength in ((a, np.float32(0.3)), (b, np.float32(-1.7))):
        for layer, row in vector.directions.items():
            buffer[layer - 1] += row * strength
    both = SteeringVector.combined([(a, 0.3), (b, -1.7)])
    assert both.layers == [1, 2, 4]
    assert all(np.array_equal(both.directions[layer], buffer[layer - 1]) for layer in both.layers)
    assert both.architecture == "qwen2"
    forged = SteeringVector(rows(1), {"weight": 7.0, "architecture": "llama"}, "qwen2")
    assert SteeringVector.combined([(forged, 0.3)]).provenance == {
        "combine.0.architecture": "qwen2",
        "combine.0.weight": 0.3,
    }
    assert both.provenance == {
        "combine.0.architecture": "qwen2",
        "combine.0.method": "md",
        "combine.0.weight": 0.3,
        "combine.1.architecture": "qwen2",
        "combine.1.method": "rmd",
        "combine.1.weight": -1.7,
    }


def test_combine_keeps_provenance_of_sums_of_sums_in_a_file(tmp_path: Path) -> None:
    a = SteeringVector(rows(1), {"method": "md"}, "qwen2")
    deep = SteeringVector.combined(
        [(SteeringVector.combined([(a, 1.0), (a, 2)]), 0.5), (SteeringVector(rows(1)), 1.0)]
    )
    write(deep, tmp_path / "v.gguf")
    assert read(tmp_path / "v.gguf").provenance["combine.0.combine.1.weight"] == 2.0
    assert deep.architecture == ""


def test_combine_refuses() -> None:
    a = SteeringVector({1: [1.0, 2.0]})
    with pytest.raises(InputError, match="nothing to combine"):
        SteeringVector.combined([])
    with pytest.raises(InputError, match="2 and 3 wide"):
        SteeringVector.combined([(a, 1.0), (SteeringVector({2: [1.0, 2.0, 3.0]}), 1.0)])
    with pytest.raises(InputError, match="finite number"):
        SteeringVector.combined([(a, float("nan"))])
    huge = SteeringVector({1: [3e38, 0.0]})
    with pytest.raises(InputError, match="beyond float32"):
        SteeringVector.combined([(huge, 1.0), (huge, 1.0)])


def test_cosines_of_shared_blocks() -> None:
    a = SteeringVector({1: [1.0, 0.0], 2: [3e38, 3e38], 3: [1.0, 0.0], 4: [0.0, 0.0], 5: [1.0, 1.0]})
    b = SteeringVector({1: [0.0, 2.0], 2: [-1e-38, -1e-38], 3: [1.0, 1.0], 4: [1.0, 1.0], 6: [1.0, 1.0]})
    # Block 4 has no direction in `a`, 5 and 6 are not shared.
    assert SteeringVector.cosines(a, b) == pytest.approx({1: 0.0, 2: -1.0, 3: 2**-0.5})
    with pytest.raises(InputError, match="2 and 1 wide"):
        SteeringVector.cosines(a, SteeringVector({1: [1.0]}))
