"""Control vector files: the bytes written, the files refused, and every reason that `check` reports."""

# mypy: disable-error-code="dict-item"
# Some rows are lists or float64 arrays; the constructors convert them.
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from fixtures.binaries import completion
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.control_vector import check
from rs_gguf.errors import InputError, VerificationError
from rs_gguf.steering import container as gguf_file
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.guard import MAX_BYTES
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import loader_layer, read, write

FULL = SteeringVector(
    {3: [1.0, -2.0, 0.5, 1e-30], 7: [4.0, 0.0, -0.0, 3.4e38], 1: [1e-3, 5.0, 6.0, 7.0]},
    {
        "method": "wrmd",
        "empty": "",
        "text": "Grüße, 你好 \n",
        "count": -(2**63),
        "strength": 0.1,
        "centred": True,
        "fit.layers": [1, 3, 7],
        "fit.ridges": [0.1, 1e-300],
        "fit.names": ["a", ""],
        "fit.flags": [True, False],
    },
    "qwen2",
)


def foreign(
    path: Path,
    tensors: dict[str, npt.NDArray[Any]],
    *,
    architecture: str = "controlvector",
    **metadata: tuple[Any, gguf.GGUFValueType],
) -> Path:
    """Write a file as other tools do; `__` in a metadata name stands for a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, (value, kind) in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, kind)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hinted(path: Path, tensors: dict[str, npt.NDArray[Any]], **metadata: Any) -> Path:
    hint = ("qwen2", gguf.GGUFValueType.STRING)
    return foreign(path, tensors, controlvector__model_hint=hint, **metadata)


def ones(width: int = 4, dtype: Any = np.float32) -> npt.NDArray[Any]:
    return np.ones(width, dtype=dtype)


def test_round_trip_keeps_every_value_and_type(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write(FULL, path)
    assert read(path) == FULL
    report = check(path)
    # The only warning: one norm is 3e38, the others are about 10.
    assert report.errors == ()
    assert len(report.warnings) == 1
    assert "norms differ by a factor above 100: 2.29 at layer 3, 3.4e+38 at layer 7" in report.warnings[0]


def test_the_file_is_what_llama_cpp_expects(tmp_path: Path) -> None:
    """Read the file with the `gguf` package, which shares only the container code with `read`."""
    path = tmp_path / "v.gguf"
    write(FULL, path)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3", "direction.7"]
    for tensor, layer in zip(reader.tensors, (1, 3, 7), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [4]
        assert tensor.data.tobytes() == FULL.directions[layer].tobytes()
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "qwen2"
    assert values["controlvector.layer_count"] == 3
    assert values["rs_gguf.schema_version"] == 2
    assert values["rs_gguf.fit.ridges"] == [0.1, 1e-300]


def test_same_vector_same_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write(FULL, a)
    shuffled = SteeringVector(
        dict(reversed([*FULL.directions.items()])), dict(reversed([*FULL.provenance.items()])), "qwen2"
    )
    write(shuffled, b)
    assert a.read_bytes() == b.read_bytes()
    assert len(a.read_bytes()) % 32 == 0


def test_a_clean_file_has_neither_errors_nor_warnings(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write(SteeringVector({1: ones(), 2: ones()}, architecture="llama"), path)
    report = check(path)
    assert (report.valid, report.errors, report.warnings, report.loader_says) == (True, (), (), "")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.gguf"
    write(SteeringVector({1: ones()}), path)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write(FULL, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_write_compares_the_content_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(control_vector, "read", lambda _: FULL.scaled(0.5))
        with pytest.raises(VerificationError, match="round trip"):
            write(FULL, path)
    assert not path.exists()
    monkeypatch.setattr(gguf_file, "write_atomic", lambda target, _: target.write_bytes(b"GGUF"))
    with pytest.raises(VerificationError, match="other bytes"):
        write(FULL, path)


def test_write_without_room_for_the_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(control_vector, "_serialise", full_disk)
    with pytest.raises(InputError, match=r"No space left.*set TMPDIR"):
        write(FULL, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_vector_without_effect_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every direction is zero"):
        write(SteeringVector({1: [0.0, 0.0]}), tmp_path / "v.gguf")
    with pytest.raises(InputError, match="reserved by the file format"):
        write(SteeringVector({1: [1.0]}, {"schema_version": 2}), tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


UNPARSABLE = "invalid/unparsable direction tensor layer index in"


REJECTED: list[tuple[dict[str, npt.NDArray[Any]], list[str], str]] = [
    (
        {"direction.0": ones()},
        ["layer 0 cannot be steered"],
        "invalid (zero) direction tensor layer index",
    ),
    ({"direction.-1": ones()}, ["only tensors named"], UNPARSABLE),
    ({"direction.x": ones()}, ["only tensors named"], UNPARSABLE),
    ({"directions.1": ones()}, ["only tensors named"], UNPARSABLE),
    ({"direction.4294967296": ones()}, ["only tensors named"], UNPARSABLE),
    ({"direction.1": ones(), "offset": ones()}, ["'offset': only tensors named"], UNPARSABLE),
    ({"direction.1": ones(dtype=np.float64)}, ["type is F64"], "invalid (non-F32) direction tensor type"),
    ({"direction.1": ones(dtype=np.float16)}, ["type is F16"], "invalid (non-F32) direction tensor type"),
    (
        {"direction.1": np.ones((2, 4), dtype=np.float32)},
        ["shape is [4, 2]"],
        "invalid (non-1D) direction tensor shape",
    ),
    (
        {"direction.1": np.ones((4, 1), dtype=np.float32)},
        ["shape is [1, 4]"],
        "invalid (non-1D) direction tensor shape",
    ),
    (
        {"direction.1": ones(4), "direction.2": ones(5)},
        ["width is 5, but the directions before it have 4"],
        "does not match previous dimensions",
    ),
    ({"direction.1": ones(), "direction.01": ones()}, ["all name layer 1"], ""),
    ({"direction.512": ones()}, ["first direction.512"], ""),
    ({"direction.1": np.array([1, np.nan, np.inf, -np.inf], dtype=np.float32)}, ["3 of 4 values"], ""),
    ({"direction.1": 0 * ones(), "direction.2": 0 * ones()}, ["every direction is zero"], ""),
    # All faults are reported in the order of the file; the loader stops at the first.
    (
        {"direction.2": ones(dtype=np.float64), "direction.0": ones(dtype=np.float64), "b": ones()},
        [
            "'direction.2': the type is F64",
            "layer 0",
            "'direction.0': the type is F64",
            "'b': only tensors",
        ],
        "invalid (non-F32) direction tensor type",
    ),
]


@pytest.mark.parametrize(("tensors", "errors", "says"), REJECTED)
def test_reasons_to_reject(
    tmp_path: Path, tensors: dict[str, npt.NDArray[Any]], errors: list[str], says: str
) -> None:
    path = hinted(tmp_path / "v.gguf", tensors)
    report = check(path)
    assert not report.valid
    assert report.content is None
    assert len(report.errors) == len(errors)
    for reason, expected in zip(report.errors, errors, strict=True):
        assert expected in reason
    assert says in report.loader_says
    assert (str(path) in report.loader_says) == bool(says)
    with pytest.raises(InputError) as caught:
        read(path)
    assert all(reason in str(caught.value) for reason in report.errors)


@pytest.mark.real  # uses no real model, but building the program takes minutes
def test_llama_cpp_logs_the_predicted_line_and_goes_on(tmp_path: Path) -> None:
    model, path = tmp_path / "tiny.gguf", tmp_path / "v.gguf"
    write_tiny_qwen2(model)
    options = ["--model", str(model), "--control-vector", str(path), "--prompt", "a", "--predict", "1"]
    options += ["--no-conversation", "--no-warmup", "--threads", "1"]
    full = {"direction.1": ones(32), "direction.2": ones(32)}
    for tensors in [{}, *(tensors for tensors, _, _ in REJECTED), {"direction.01 x": ones(4)}, full]:
        report = check(hinted(path, tensors), model)
        lines = completion(*options)[1]
        logged = [line for line in lines if str(path) in line or "does not match model" in line]
        if report.loader_says:
            assert report.loader_says in logged[0]
        elif report.valid:
            assert not logged


def test_an_empty_file_of_the_right_kind(tmp_path: Path) -> None:
    path = hinted(tmp_path / "v.gguf", {})
    report = check(path)
    assert report.errors == ("the file holds no tensor: there is nothing to add.",)
    assert report.loader_says == f"no direction tensors found in {path}"


@pytest.mark.parametrize(
    ("tensors", "warning"),
    [
        ({"direction.01": ones()}, "llama.cpp reads direction.1"),
        ({"direction.1 of 3": ones()}, "llama.cpp reads direction.1"),
        ({"direction.1": ones(), "direction.2": 0 * ones()}, "layers [2] are zero"),
        ({"direction.1": ones(), "direction.2": 101 * ones()}, "2 at layer 1, 202 at layer 2"),
    ],
)
def test_reasons_to_warn(tmp_path: Path, tensors: dict[str, npt.NDArray[Any]], warning: str) -> None:
    report = check(hinted(tmp_path / "v.gguf", tensors))
    assert report.valid
    assert len(report.warnings) == 1
    assert warning in report.warnings[0]


def test_a_row_of_a_matrix_is_one_dimensional_to_llama_cpp(tmp_path: Path) -> None:
    path = hinted(tmp_path / "v.gguf", {"direction.1": np.ones((1, 4), dtype=np.float32)})
    assert check(path).valid
    assert read(path).directions[1].shape == (4,)


def test_missing_conventions_are_warnings(tmp_path: Path) -> None:
    report = check(foreign(tmp_path / "v.gguf", {"direction.1": ones()}, architecture="steervector"))
    assert report.valid
    assert "'steervector'" in report.warnings[0]
    assert "model_hint is missing" in report.warnings[1]


INT32, UINT32 = gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("layers", "count", "kind", "origin"),
    [
        ([1, 2, 3], 3, INT32, "cvector-generator"),
        ([1, 2, 3], 4, UINT32, "jukofyork"),
        ([1, 2, 4], 4, UINT32, "jukofyork"),
        ([3, 2, 1], 3, UINT32, None),  # repeng
        ([1, 2, 3], 3, UINT32, None),
        ([2, 3], 2, INT32, None),
    ],
)
def test_a_shift_by_one_layer_is_suspected_from_the_header(
    tmp_path: Path, layers: list[int], count: int, kind: gguf.GGUFValueType, origin: str | None
) -> None:
    tensors = {f"direction.{layer}": ones() for layer in layers}
    report = check(hinted(tmp_path / "v.gguf", tensors, controlvector__layer_count=(count, kind)))
    assert report.valid
    if origin is None:
        assert report.warnings == ()
    else:
        assert f"convert FILE --from {origin}" in report.warnings[0]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("direction.12", 12),
        ("direction.012", 12),
        ("direction.+3", 3),
        ("direction. \t4", 4),
        ("direction.5.weight", 5),
        ("direction.6abc", 6),
        ("direction.-2", -2),
        ("direction.2147483647", 2147483647),
        ("direction.2147483648", None),
        ("direction.", None),
        ("direction.x1", None),
        ("direction.１", None),  # a digit to Python, not to C
        ("direction", None),
        ("adirection.1", None),
        ("Direction.1", None),
    ],
)
def test_reads_numbers_as_std_stoi_does(name: str, number: int | None) -> None:
    assert loader_layer(name) == number


def test_a_newer_schema_is_refused_by_number(tmp_path: Path) -> None:
    version = {"rs_gguf__schema_version": (3, UINT32)}
    report = check(hinted(tmp_path / "v.gguf", {"direction.1": ones()}, **version))
    assert "rs_gguf.schema_version is 3; this release reads 1 and 2" in report.errors[0]


def test_foreign_provenance_under_our_prefix_is_checked(tmp_path: Path) -> None:
    bad = {"rs_gguf__loss": (float("nan"), gguf.GGUFValueType.FLOAT32)}
    report = check(hinted(tmp_path / "v.gguf", {"direction.1": ones()}, **bad))
    assert "provenance loss is nan" in report.errors[0]


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    big = tmp_path / "big.gguf"
    with big.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for path, reason in {
        tmp_path: "not a regular file",
        tmp_path / "absent.gguf": "cannot be read",
        tmp_path / "nul\0.gguf": "cannot be read",
        big: "Is this a model?",
    }.items():
        report = check(path)
        assert reason in report.errors[0]
        loaded = "failed to load control vector file from"
        assert report.loader_says.startswith(loaded if path != big else "")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in check(tmp_path / "pipe").errors[0]
