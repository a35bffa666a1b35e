"""Conversion from the conventions of each source tool, sums and cosines.

The expected layer numbers come from the tools' source code. `test_tools.py` checks them against the effect
that the tools have on a model.
"""

# mypy: disable-error-code="dict-item"
# Some rows are lists or float64 arrays; the constructors convert them.
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


def test_metadata_of_the_source_do_not_replace_ours(tmp_path: Path) -> None:
    """A foreign file may use our key names; the values of the conversion must win."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for key in ("file", "sha256", "format", "note"):
        writer.add_string(key, "forged")
    writer.add_tensor("direction.1", rows(1)[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    provenance = convert(tmp_path / "v.gguf", "repeng").vector.provenance
    assert (provenance["source.file"], provenance["source.format"]) == ("v.gguf", "repeng")
    assert provenance["source.sha256"] == files.sha256(tmp_path / "v.gguf")
    assert provenance["source.note"] == "forged"


def write_directions(path: Path, directions: dict[int, npt.NDArray[Any]], **metadata: Any) -> Path:
    return write_gguf(path, {f"direction.{number}": row for number, row in directions.items()}, **metadata)


@pytest.mark.parametrize("origin", ["cvector-generator", "jukofyork"])
def test_directions_move_by_one_layer_with_a_note(tmp_path: Path, origin: str) -> None:
    source = rows(1, 2, 3)
    result = convert(write_directions(tmp_path / "v.gguf", source), origin)
    vector, notes = result.vector, result.notes
    assert vector.layers == [1, 2]
    assert np.array_equal(vector.directions[1], source[2])
    assert np.array_equal(vector.directions[2], source[3])
    assert f"Moved every direction by -1: {origin} numbers layer 0 as 1" in notes[0]
    assert "'direction.1'" in notes[1]
    assert "layer 0" in notes[1]
    assert vector.provenance["source.format"] == origin
    assert vector.provenance["source.base"] == 1
    assert vector.architecture == "qwen2"


@pytest.mark.parametrize("origin", ["easysteer", "saklas"])
def test_direction_0_is_dropped_and_others_stay(tmp_path: Path, origin: str) -> None:
    source = rows(0, 1, 2)
    path = write_directions(tmp_path / "v.gguf", source, method="diffmean", loss=float("nan"))
    result = convert(path, origin)
    assert result.vector.layers == [1, 2]
    assert all(np.array_equal(result.vector.directions[layer], source[layer]) for layer in (1, 2))
    assert len(result.notes) == 1
    assert "rejects the whole file if it holds direction.0" in result.notes[0]
    assert result.vector.provenance["source.controlvector.method"] == "diffmean"
    assert "source.controlvector.loss" not in result.vector.provenance  # NaN is left out


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_other_floats_become_float32(tmp_path: Path, dtype: Any, container: str) -> None:
    source = rows(1, 2, dtype=dtype)
    path = tmp_path / f"v.{container}"
    if container == "gguf":
        write_directions(path, source)
    else:
        save_file({str(number): torch.from_numpy(row) for number, row in source.items()}, path)
    result = convert(path, "repeng", architecture="qwen2")
    assert all(np.array_equal(result.vector.directions[k], source[k].astype(np.float32)) for k in source)
    assert result.notes == (
        f"Stored F{dtype().itemsize * 8} as F32: llama.cpp rejects a file with any other type.",
    )


def test_bfloat16_is_read_and_other_tensors_are_left_out(tmp_path: Path) -> None:
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


def test_quantised_directions_are_refused(tmp_path: Path) -> None:
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
def test_safetensors_named_by_one_number_are_read(tmp_path: Path, pattern: str) -> None:
    source = rows(0, 5, 12)
    tensors = {pattern.format(number): torch.from_numpy(row)[None, :] for number, row in source.items()}
    save_file(tensors, tmp_path / "v.safetensors")
    result = convert(tmp_path / "v.safetensors", "steering-vectors", architecture="qwen2")
    assert result.vector.layers == [5, 12]
    assert all(np.array_equal(result.vector.directions[layer], source[layer]) for layer in (5, 12))
    assert len(result.notes) == 1
    write(result.vector, tmp_path / "v.gguf")
    assert check(tmp_path / "v.gguf").warnings == ()


def test_a_matrix_indexed_like_hidden_states_is_read(tmp_path: Path) -> None:
    """Entry 0 of `hidden_states` is the embedding and entry 1 the output of layer 0, hence base 1."""
    matrix = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"directions": matrix[1:]}, tmp_path / "layers.safetensors")
    layers = convert(tmp_path / "layers.safetensors", "huggingface")
    save_file({"17": matrix[2], "18": matrix[3]}, tmp_path / "states.safetensors")
    states = convert(tmp_path / "states.safetensors", "huggingface", base=16)
    assert layers.vector.layers == states.vector.layers == [1, 2]
    assert all(np.array_equal(layers.vector.directions[k], states.vector.directions[k]) for k in (1, 2))
    assert np.array_equal(layers.vector.directions[1], matrix[2].float().numpy())


def test_tensors_without_a_usable_layer_are_refused(tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], message: str, base: int | None = None) -> None:
        save_file(tensors, tmp_path / "v.safetensors")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "v.safetensors", "huggingface", base=base)

    row = torch.ones(4)
    refused({"vector": row}, "tensor 'vector' of shape .* does not name its layer")
    for name in ("blocks.12.hook_resid_pre", "model.layers.3.input_layernorm", "blocks.2.hook_mlp_out"):
        refused({name: row}, "adds directions to layer outputs")
    refused({"layers.1.head.2": row}, "does not name its layer")
    refused({"a": torch.ones(2, 4), "b": row}, "does not name its layer")
    refused({"layer_99999999999": row}, "does not name its layer")
    refused({"layer_1": torch.ones(2, 4)}, r"shape \[2, 4\]")
    refused({"layer_1": torch.ones(4, dtype=torch.int32)}, "floats of at least 16 bits are needed")
    for name in ("-1", "layer_-3", "model.layers.-2.vector", "layer--1"):
        refused({name: row}, f"tensor '{name}' has a negative number.*counted from 0")
    refused({"layer_0": row}, "no usable direction is left")
    refused({"layer_1": row}, "would be layer -1", base=2)
    refused({"layer_1": row, "block_1": row.clone()}, "second direction for layer 1")
    refused({"layer_1": torch.full((4,), 1e300, dtype=torch.float64)}, "beyond float32")
    refused({"layer_1": row, "layer_2": torch.ones(5)}, r"widths \[4, 5\]")


def test_pickles_other_formats_and_own_files_are_refused(tmp_path: Path) -> None:
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
def test_a_converted_file_passes_the_check(tmp_path: Path, origin: str) -> None:
    directions = rows(*range(FORMATS[origin], FORMATS[origin] + 4), dtype=np.float64)
    result = convert(write_directions(tmp_path / "v.gguf", directions), origin)
    write(result.vector, tmp_path / "out.gguf")
    assert (check(tmp_path / "out.gguf").errors, check(tmp_path / "out.gguf").warnings) == ((), ())
    assert read(tmp_path / "out.gguf") == result.vector


def test_combine_sums_like_llama_cpp_loading_several_files() -> None:
    """The reference is the loader's loop: a buffer from layer 1 on, `dst += src * strength` in float32."""
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


def test_impossible_sums_are_refused() -> None:
    a = SteeringVector({1: [1.0, 2.0]})
    with pytest.raises(InputError, match="nothing to combine"):
        SteeringVector.combined([])
    with pytest.raises(InputError, match="widths 2 and 3"):
        SteeringVector.combined([(a, 1.0), (SteeringVector({2: [1.0, 2.0, 3.0]}), 1.0)])
    with pytest.raises(InputError, match="finite number"):
        SteeringVector.combined([(a, float("nan"))])
    huge = SteeringVector({1: [3e38, 0.0]})
    with pytest.raises(InputError, match="beyond float32"):
        SteeringVector.combined([(huge, 1.0), (huge, 1.0)])


def test_cosines_of_shared_layers() -> None:
    a = SteeringVector({1: [1.0, 0.0], 2: [3e38, 3e38], 3: [1.0, 0.0], 4: [0.0, 0.0], 5: [1.0, 1.0]})
    b = SteeringVector({1: [0.0, 2.0], 2: [-1e-38, -1e-38], 3: [1.0, 1.0], 4: [1.0, 1.0], 6: [1.0, 1.0]})
    # The direction of layer 4 is zero in `a`; 5 and 6 are not shared.
    assert SteeringVector.cosines(a, b) == pytest.approx({1: 0.0, 2: -1.0, 3: 2**-0.5})
    with pytest.raises(InputError, match="widths 2 and 1"):
        SteeringVector.cosines(a, SteeringVector({1: [1.0]}))
