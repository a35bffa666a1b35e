"""A merged model computes what the model with the adapters does, and all other bytes stay as they were."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from fixtures.adapters import factors
from fixtures.architectures import llama, llama_logits
from fixtures.families import write_gguf
from fixtures.full_disk import largest_file
from fixtures.split import write_quantised, write_split
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize

from rs_gguf.engines.engine import Steering
from rs_gguf.errors import InputError, VerificationError
from rs_gguf.models import header as gguf_header
from rs_gguf.models import rewrite
from rs_gguf.models.architecture import is_output_matrix
from rs_gguf.records.files import sha256
from rs_gguf.steering import lora_file, merge_check, vector_file
from rs_gguf.steering.container import finish, metadata
from rs_gguf.steering.formats import glp
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.merge import TYPES, merge
from rs_gguf.steering.vector import SteeringVector

# Rounding of a number in each type, relative to the largest one of its block.
STEP = {Type.F32: 1e-6, Type.F16: 2.0**-11, Type.BF16: 2.0**-8, Type.Q8_0: 0.5 / 127 + 2.0**-11}
# Largest difference of a logit, merged against loaded, relative to the standard deviation of the logits.
LOGITS = {None: 1e-3, "f16": 0.02, "q8_0": 0.5}
FAMILIES = ["Llama", "Qwen2", "Gemma 2", "Phi-3", "Granite", "Falcon", "GPT-2", "OLMo 2", "Qwen2-MoE"]
OUT, DOWN = "blk.1.attn_output.weight", "blk.2.ffn_down.weight"


def adapter_for(model: Path, seed: int = 0, facts: Mapping[str, str] | None = None) -> LoraAdapter:
    """Return a random adapter for every output matrix of a model, with a clear effect."""
    pairs = {
        tensor.name: factors(2, int(tensor.shape[0]), int(tensor.shape[1]), seed + number)
        for number, tensor in enumerate(GGUFReader(model).tensors)
        if is_output_matrix(tensor.name)
    }
    spread = {name: np.float32(0.3 / a.shape[1] ** 0.5) for name, (a, _) in pairs.items()}
    family = str(gguf_header.read(model).values["general.architecture"])
    return LoraAdapter({name: (a, b * spread[name]) for name, (a, b) in pairs.items()}, family, facts or {})


def written(adapter: LoraAdapter, path: Path) -> Path:
    lora_file.write(adapter, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model in F32. Its width is 64: with AMX tiles, llama.cpp misreads Q8_0 rows of 32 numbers."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_embd=64)
    return path


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return written(adapter_for(model), model.with_name("adapter.gguf"))


def assert_rest_is_unchanged(before: Sequence[Path], after: Path, changed: set[str]) -> None:
    """Compare all bytes of metadata and of other tensors; only the entries of the merge are new."""
    new = gguf_header.read(after)
    data = after.read_bytes()
    old = gguf_header.read(before[0])
    source = before[0].read_bytes()
    kept = {key: span for key, span in old.spans.items() if not key.startswith("split.") or len(before) == 1}
    assert list(new.spans)[: len(kept)] == list(kept)
    for key, (start, end) in kept.items():
        assert data[slice(*new.spans[key])] == source[start:end], key
    assert all(key.startswith("rs_gguf.") for key in list(new.spans)[len(kept) :])
    assert new.alignment == old.alignment
    tensors = [tensor for path in before for tensor in GGUFReader(path).tensors]
    merged = GGUFReader(after).tensors
    assert [tensor.name for tensor in merged] == [tensor.name for tensor in tensors]
    for one, other in zip(tensors, merged, strict=True):
        assert other.shape.tolist() == one.shape.tolist()
        assert other.data_offset % new.alignment == 0
        if one.name not in changed:
            assert other.tensor_type == one.tensor_type
            assert other.data.tobytes() == one.data.tobytes(), one.name


def weights(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", [None, "f16", "q8_0", "f32"])
def test_matrices_change_by_the_adapter_and_nothing_else_does(
    model: Path, adapter: Path, tmp_path: Path, name: str | None
) -> None:
    type_ = None if name is None else TYPES[name]
    merged = merge([(adapter, -0.5)], model, tmp_path / "merged.gguf", type_=type_, check=False)
    pairs = lora_file.read(adapter).factors
    assert merged.changed == dict.fromkeys(pairs, (Type.F32, type_ or Type.F32))
    assert (merged.warnings, merged.check) == ([], None)
    assert_rest_is_unchanged([model], tmp_path / "merged.gguf", set(pairs))
    before, after = weights(model), weights(tmp_path / "merged.gguf")
    for matrix, (a, b) in pairs.items():
        expected = before[matrix] - 0.5 * b @ a
        error = np.abs(after[matrix] - expected).max() / np.abs(expected).max()
        assert error <= STEP[type_ or Type.F32]
        assert np.abs(after[matrix] - before[matrix]).max() > 0.01


@pytest.mark.parametrize(
    ("old", "new"),
    [(Type.Q4_0, Type.Q8_0), (Type.Q5_1, Type.Q8_0), (Type.Q8_0, Type.Q8_0), (Type.BF16, Type.BF16)],
)
def test_quantised_matrices_become_q8_0_and_floats_stay(
    model: Path, adapter: Path, tmp_path: Path, old: Type, new: Type
) -> None:
    source = write_quantised(
        model, tmp_path / "q.gguf", {"attn_output": old, "ffn": old, "attn_q.w": Type.F16}
    )
    merged = merge([(adapter, 1.0)], source, tmp_path / "merged.gguf", check=False)
    pairs = lora_file.read(adapter).factors
    assert merged.changed == dict.fromkeys(pairs, (old, new))
    assert_rest_is_unchanged([source], tmp_path / "merged.gguf", set(pairs))
    before, after = weights(source), weights(tmp_path / "merged.gguf")
    for matrix, (a, b) in pairs.items():
        expected = before[matrix] + b @ a
        assert np.abs(after[matrix] - expected).max() <= STEP[new] * np.abs(expected).max()


def test_parts_become_one_file(model: Path, adapter: Path, tmp_path: Path) -> None:
    parts = write_split(model, tmp_path / "model.gguf", 12)
    merged = merge([(adapter, 1.0)], parts[1], tmp_path / "merged.gguf")
    assert merged.check is not None
    assert merged.check.kl <= merge_check.EXACT < merged.check.effect
    assert_rest_is_unchanged(parts, tmp_path / "merged.gguf", set(merged.changed))
    merge([(adapter, 1.0)], model, tmp_path / "whole.gguf", check=False)
    after = GGUFReader(tmp_path / "whole.gguf").tensors
    assert [t.data.tobytes() for t in GGUFReader(tmp_path / "merged.gguf").tensors] == [
        t.data.tobytes() for t in after
    ]
    values = metadata(GGUFReader(tmp_path / "merged.gguf"))
    assert values["rs_gguf.merge.0.model"] == [part.name for part in parts]
    assert values["rs_gguf.merge.0.model_sha256"] == [sha256(part) for part in parts]


def test_the_file_says_what_was_merged(model: Path, adapter: Path, tmp_path: Path) -> None:
    other = written(adapter_for(model, 9), tmp_path / "other.gguf")
    merge([(adapter, 1.0), (other, 0.25)], model, tmp_path / "one.gguf", check=False)
    merge([(other, -0.5)], tmp_path / "one.gguf", tmp_path / "two.gguf", type_=Type.F16, check=False)
    values = metadata(GGUFReader(tmp_path / "two.gguf"))
    assert {key: value for key, value in values.items() if key.startswith("rs_gguf.")} == {
        "rs_gguf.schema_version": 2,
        **{
            f"rs_gguf.merge.{number}.{key}": value
            for number, (file, scale, base, types) in enumerate(
                [
                    (adapter, 1.0, model, ["F32"]),
                    (other, 0.25, model, ["F32"]),
                    (other, -0.5, tmp_path / "one.gguf", ["F16"]),
                ]
            )
            for key, value in {
                "file": file.name,
                "sha256": sha256(file),
                "scale": scale,
                "model": [base.name],
                "model_sha256": [sha256(base)],
                "types": types,
            }.items()
        },
    }
    expected: npt.NDArray[Any] = weights(model)[OUT]
    for path, scale in ((adapter, 1.0), (other, 0.25)):
        a, b = lora_file.read(path).factors[OUT]
        expected = expected + scale * b @ a
    np.testing.assert_allclose(weights(tmp_path / "one.gguf")[OUT], expected, atol=1e-5)


def test_a_model_with_another_entry_of_a_merge_gets_the_next_number(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    key = "rs_gguf.merge.0.sha256"
    writer = gguf.GGUFWriter(tmp_path / "facts.gguf", "qwen2")
    writer.add_string(key, "of another tool")
    finish(writer)
    start, end = gguf_header.read(tmp_path / "facts.gguf").spans[key]
    with (tmp_path / "model.gguf").open("wb") as file:
        entry = (tmp_path / "facts.gguf").read_bytes()[start:end]
        rewrite.write(file, rewrite.parts_of(model), {}, [entry])
    merge([(adapter, 1.0)], tmp_path / "model.gguf", tmp_path / "merged.gguf", check=False)
    assert gguf_header.read(tmp_path / "merged.gguf").values["rs_gguf.merge.1.file"] == adapter.name


def test_names_that_are_not_utf_8_are_recorded(model: Path, adapter: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.gguf")
    try:
        shutil.copy(adapter, odd)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    merge([(odd, 1.0)], model, tmp_path / "merged.gguf", check=False)
    assert gguf_header.read(tmp_path / "merged.gguf").values["rs_gguf.merge.0.file"] == "\\udcff.gguf"


def test_matrices_with_a_zero_change_keep_their_bytes(model: Path, tmp_path: Path) -> None:
    source = write_quantised(model, tmp_path / "q.gguf", {"attn_output": Type.Q4_0, "ffn_down": Type.Q4_0})
    one = written(LoraAdapter({OUT: factors(1, 64, 64)}, "qwen2"), tmp_path / "one.gguf")
    other = written(LoraAdapter({DOWN: factors(1, 128, 64)}, "qwen2"), tmp_path / "other.gguf")
    merged = merge([(one, 1.0), (other, 0.0)], source, tmp_path / "merged.gguf", check=False)
    assert merged.changed == {OUT: (Type.Q4_0, Type.Q8_0)}
    assert_rest_is_unchanged([source], tmp_path / "merged.gguf", {OUT})


def test_the_same_inputs_give_the_same_bytes(model: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        merge([(adapter, 1.0)], model, tmp_path / name, type_=Type.Q8_0, check=False)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_rows_are_merged_a_few_at_a_time(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge([(adapter, 1.0)], model, tmp_path / "one.gguf", type_=Type.Q8_0, check=False)
    monkeypatch.setattr(rewrite, "_AT_ONCE", 200)
    merge([(adapter, 1.0)], model, tmp_path / "two.gguf", type_=Type.Q8_0, check=False)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_large_model_needs_little_memory(tmp_path: Path) -> None:
    """The largest matrix has 64 MiB as the float32 numbers that are added up; no tensor is held whole."""
    rows, columns = 4096, 4096
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "qwen2")
    for name in ("token_embd.weight", DOWN):
        writer.add_tensor(name, np.full((rows, columns), 0.5, np.float16))
    finish(writer)
    file = written(LoraAdapter({DOWN: factors(1, columns, rows)}, "qwen2"), tmp_path / "a.gguf")
    tracemalloc.start()
    try:
        merge([(file, 1.0)], tmp_path / "large.gguf", tmp_path / "m.gguf", type_=Type.Q8_0, check=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 * 2**20
    assert_rest_is_unchanged([tmp_path / "large.gguf"], tmp_path / "m.gguf", {DOWN})


# ---- in llama.cpp --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_gguf(FAMILIES, tmp_path_factory.mktemp("families"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "f16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_it_does_with_lora(
    families: dict[str, Path], family: str, name: str | None, tmp_path: Path
) -> None:
    adapter = written(adapter_for(families[family]), tmp_path / "adapter.gguf")
    type_ = None if name is None else TYPES[name]
    merge([(adapter, 0.8)], families[family], tmp_path / "merged.gguf", type_=type_, check=False)
    with llama(families[family]) as loaded:
        plain = llama_logits(loaded)
        with loaded.steered(Steering(adapters=[(adapter, 0.8)])):
            adapted = llama_logits(loaded)
    with llama(tmp_path / "merged.gguf") as loaded:
        merged = llama_logits(loaded)
    apart = np.abs(merged - adapted).max(axis=1)
    # After Q8_0 has rounded a matrix, a token may choose another expert, so that its logits are others.
    furthest = np.median(apart) if family == "Qwen2-MoE" else apart.max()
    assert furthest <= LOGITS[name] * adapted.std()
    assert np.abs(adapted - plain).max() > max(5 * furthest, 0.5 * adapted.std())


@pytest.mark.parametrize(("name", "tolerance"), [(None, 1e-3), ("f32", 1e-3), ("f16", 1e-3), ("q8_0", 0.05)])
def test_the_merged_model_is_run(
    model: Path, adapter: Path, tmp_path: Path, name: str | None, tolerance: float
) -> None:
    type_ = None if name is None else TYPES[name]
    check = merge([(adapter, 1.0)], model, tmp_path / "merged.gguf", type_=type_).check
    assert check is not None
    assert check.tolerance == tolerance
    assert check.kl <= tolerance < check.effect
    assert check.positions == 4 * 8


def test_an_effect_that_the_check_cannot_see_gives_a_warning(model: Path, tmp_path: Path) -> None:
    """Within the tolerance, also a merge that leaves the effect out would pass."""
    source = write_quantised(model, tmp_path / "q.gguf", {"attn_output": Type.Q4_0})
    a, b = factors(1, 64, 64)
    file = written(LoraAdapter({OUT: (a, b * np.float32(1e-3))}, "qwen2"), tmp_path / "a.gguf")
    merged = merge([(file, 1.0)], source, tmp_path / "merged.gguf")
    assert merged.check is not None
    assert merged.check.effect <= merged.check.tolerance
    (warning,) = merged.warnings
    assert "the check says little" in warning


def test_a_merge_that_does_something_else_is_not_written(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rs_gguf.steering.merge.quantize", lambda rows, kind: rows * np.float32(1.1))
    with pytest.raises(VerificationError, match=r"the merged model differs .* Nothing was written") as error:
        merge([(adapter, 1.0)], model, tmp_path / "merged.gguf")
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# ---- refusals ------------------------------------------------------------------------------------


def refused(files: Sequence[Path], model: Path, output: Path, match: str, **options: Any) -> None:
    before = output.read_bytes() if output.is_file() else None
    with pytest.raises(InputError, match=match):
        merge([(path, 1.0) for path in files], model, output, check=False, **options)
    assert (output.read_bytes() if output.is_file() else None) == before
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_a_control_vector_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    vector_file.write(SteeringVector({1: np.ones(64, np.float32)}), tmp_path / "v.gguf")
    why = r"v\.gguf cannot be merged: a control vector adds a bias .* --control-vector"
    refused([adapter, tmp_path / "v.gguf"], model, tmp_path / "merged.gguf", why)


def test_a_projection_is_refused_with_other_advice(model: Path, tmp_path: Path) -> None:
    direction = SteeringVector({1: np.ones(64, np.float32)})
    glp.write(glp.Projection(direction, 1.0, next(iter(glp.HOOKS))), tmp_path / "v.gguf")
    refused([tmp_path / "v.gguf"], model, tmp_path / "merged.gguf", r"is a GLP file\. .*--from glp")


def test_an_adapter_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    for name, pair, why in [
        (
            "blk.7.ffn_down.weight",
            factors(1, 128, 64),
            r"blk\.7\.ffn_down\.weight does not exist in the model",
        ),
        (OUT, factors(1, 64, 32), r"attn_output\.weight is 64 × 64 in the model but 32 × 64 in the adapter"),
        (DOWN, factors(1, 64, 64), r"ffn_down\.weight is 64 × 128 in the model but 64 × 64"),
    ]:
        file = written(LoraAdapter({name: pair}, "qwen2"), tmp_path / "a.gguf")
        refused([file], model, out, why)
    file = written(LoraAdapter({OUT: factors(1, 64, 64)}, "llama"), tmp_path / "a.gguf")
    refused([file], model, out, "is for architecture 'llama', but .* is 'qwen2'")


def test_adapters_fitted_on_another_file_give_a_warning(model: Path, tmp_path: Path) -> None:
    facts = {"model.sha256": "ab" * 32, "model.name": "other"}
    file = written(adapter_for(model, facts=facts), tmp_path / "a.gguf")
    (warning,) = merge([(file, 1.0)], model, tmp_path / "merged.gguf", check=False).warnings
    assert "a.gguf: the file was fitted on another model file, 'other'" in warning
    file = written(adapter_for(model, facts=facts | {"model.sha256": sha256(model)}), tmp_path / "a.gguf")
    assert merge([(file, 1.0)], model, tmp_path / "merged.gguf", check=False).warnings == []


def foreign(path: Path, **tensors: npt.NDArray[np.float32]) -> Path:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def test_adapters_of_experts_are_refused(model: Path, tmp_path: Path) -> None:
    experts = "blk.1.ffn_down_exps.weight"
    three = {
        f"{experts}.lora_a": np.ones((4, 1, 64), np.float32),
        f"{experts}.lora_b": np.ones((4, 64, 1), np.float32),
    }
    file = foreign(tmp_path / "a.gguf", **three)
    refused([file], model, tmp_path / "merged.gguf", "does not exist in the model")
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "qwen2")
    writer.add_tensor(experts, np.zeros((4, 64, 64), np.float32))
    finish(writer)
    refused([file], tmp_path / "experts.gguf", tmp_path / "merged.gguf", "holds a matrix for each expert")


def test_matrices_with_a_scale_of_their_own_are_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "qwen2")
    for tensor in GGUFReader(model).tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor("blk.1.attn_output.scale", np.ones(1, np.float32))
    finish(writer)
    refused([adapter], tmp_path / "scaled.gguf", tmp_path / "merged.gguf", r"attn_output\.weight has a scale")


def test_the_output_is_not_an_input(model: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "model.gguf"
    shutil.copy(model, own)
    (tmp_path / "link.gguf").symlink_to(own)
    parts = write_split(model, tmp_path / "split.gguf", 12)
    for source, output in ((own, own), (own, tmp_path / "link.gguf"), (model, adapter), (parts[0], parts[1])):
        refused([adapter], source, output, "is one of the inputs")


def test_types_that_cannot_hold_the_sum_are_refused(model: Path, tmp_path: Path) -> None:
    a, b = factors(1, 64, 64)
    file = written(LoraAdapter({OUT: (a, 1e6 * b)}, "qwen2"), tmp_path / "a.gguf")
    refused([file], model, tmp_path / "out" / "m.gguf", "beyond the range of F16", type_=Type.F16)
    narrow = tmp_path / "narrow.gguf"
    write_tiny_qwen2(narrow, n_embd=16)
    file = written(LoraAdapter({OUT: factors(1, 16, 16)}, "qwen2"), tmp_path / "a.gguf")
    why = "has rows of 16 numbers, which Q8_0 cannot hold"
    refused([file], narrow, tmp_path / "m.gguf", why, type_=Type.Q8_0)


def test_scales_that_cancel_are_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every change is zero"):
        merge([(adapter, 0.0)], model, tmp_path / "merged.gguf", check=False)


def test_a_disk_without_room_is_noticed(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with largest_file(200_000):
        refused([adapter], model, tmp_path / "merged.gguf", "cannot write .*merged")
    free = model.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(InputError, match=r"needed for merged\.gguf"):
        merge([(adapter, 1.0)], model, tmp_path / "new" / "merged.gguf", check=False)
    assert list(tmp_path.iterdir()) == []
