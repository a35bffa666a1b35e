"""LoRA adapter files: the bytes written, the files refused, sums, and the effect in llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import transformers
from fixtures.adapters import factors, llama_logits, random_adapter, torch_logits
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGUFValueType

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError, VerificationError
from rs_gguf.steering import file as steering_file
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.formats import peft as peft_export
from rs_gguf.steering.lora import LoraAdapter

DOWN, OUT = "blk.2.ffn_down.weight", "blk.1.attn_output.weight"


FULL = LoraAdapter(
    {DOWN: factors(2, 6, 4), OUT: factors(1, 4, 4, seed=1), "blk.10.ffn_down.weight": factors(1, 6, 4)},
    "qwen2",
    {"method": "gate", "empty": "", "text": "Grüße, 你好 \n", "strength": 0.1, "layers": [1, 10], "ok": True},
)


def foreign(
    path: Path,
    tensors: dict[str, npt.NDArray[Any]] | None = None,
    *,
    architecture: str = "qwen2",
    **metadata: tuple[Any, *tuple[GGUFValueType, ...]] | None,
) -> Path:
    """Write a sound adapter with other tensors or metadata; `__` in a name stands for a dot."""
    a, b = factors(1, 6, 4)
    values = {
        "general.type": ("adapter", GGUFValueType.STRING),
        "adapter.type": ("lora", GGUFValueType.STRING),
        **{key.replace("__", "."): value for key, value in metadata.items()},
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            writer.add_key_value(key, *value)
    for name, data in (tensors or {f"{DOWN}.lora_a": a, f"{DOWN}.lora_b": b}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_keeps_every_value_and_type(tmp_path: Path) -> None:
    lora.write(FULL, tmp_path / "a.gguf")
    found = lora.read(tmp_path / "a.gguf")
    assert found == FULL
    assert list(found.factors) == [OUT, DOWN, "blk.10.ffn_down.weight"]  # by block number
    assert (found.layers, found.matrices, found.rank) == ([1, 2, 10], ["attn_output", "ffn_down"], 2)
    assert steering_file.kind_of(tmp_path / "a.gguf") is LoraAdapter
    report = lora.check(tmp_path / "a.gguf")
    assert (report.valid, report.errors, report.warnings) == (True, (), ())


EXPERTS = "blk.1.ffn_down_exps.weight"
SHAPES = {"a": (3, 2, 6), "b": (3, 4, 2)}  # three experts, rank 2


def of_experts(seed: int = 0) -> LoraAdapter:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values())
    return LoraAdapter({EXPERTS: (a, b), DOWN: factors(1, 6, 4)}, "qwen3moe")


def test_experts_have_a_pair_each(tmp_path: Path) -> None:
    adapter = of_experts()
    lora.write(adapter, tmp_path / "a.gguf")
    assert lora.read(tmp_path / "a.gguf") == adapter
    a, b = adapter.factors[EXPERTS]
    assert adapter.rank == 2
    assert adapter.norms[EXPERTS] == pytest.approx(np.linalg.norm(b @ a))
    other = of_experts(1)
    total = LoraAdapter.combined([(adapter, 0.5), (other, -2.0)])
    expected = 0.5 * b @ a - 2.0 * other.factors[EXPERTS][1] @ other.factors[EXPERTS][0]
    np.testing.assert_allclose(total.factors[EXPERTS][1] @ total.factors[EXPERTS][0], expected, rtol=1e-5)
    c, d = other.factors[EXPERTS]
    cosine = np.sum((b @ a) * (d @ c)) / np.linalg.norm(b @ a) / np.linalg.norm(d @ c)
    assert adapter.cosines(other)[EXPERTS] == pytest.approx(cosine)


def test_the_file_is_what_llama_cpp_expects(tmp_path: Path) -> None:
    """Read the file with the `gguf` package, which shares only the container code with `read`."""
    lora.write(FULL, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "qwen2"
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    # 0 leaves the user's scale unchanged; another number would multiply it by alpha / rank.
    assert values["adapter.lora.alpha"] == 0.0
    assert reader.fields["adapter.lora.alpha"].types == [GGUFValueType.FLOAT32]
    assert values["rs_gguf.schema_version"] == 2
    assert values["rs_gguf.strength"] == 0.1
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 6
    for name, (a, b) in FULL.factors.items():
        for half, factor in (("lora_a", a), ("lora_b", b)):
            tensor = tensors[f"{name}.{half}"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            assert tensor.shape.tolist() == list(reversed(factor.shape))  # ggml's order
            assert tensor.data.tobytes() == factor.tobytes()


def test_same_content_same_bytes(tmp_path: Path) -> None:
    shuffled = LoraAdapter(
        dict(reversed([*FULL.factors.items()])), "qwen2", dict(reversed([*FULL.provenance.items()]))
    )
    lora.write(FULL, tmp_path / "a.gguf")
    lora.write(shuffled, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_content_of_an_adapter_cannot_change() -> None:
    a, b = factors(1, 3, 2)
    adapter = LoraAdapter({DOWN: (a, b)}, "qwen2")
    a[:] = 9
    kept = adapter.factors[DOWN][0]
    assert not (kept == 9).any()
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 1


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    lora.write(LoraAdapter({DOWN: factors(1, 3, 2)}, "qwen2"), path)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="No space left"):
            lora.write(FULL, path)
    with monkeypatch.context() as patch:
        # 1 == True in Python, but not in a file.
        other = LoraAdapter(FULL.factors, "qwen2", {**FULL.provenance, "ok": 1})
        patch.setattr(lora, "read", lambda _: other)
        with pytest.raises(VerificationError, match="round trip"):
            lora.write(FULL, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_adapter_without_effect_is_not_written(tmp_path: Path) -> None:
    a, b = factors(1, 3, 2)
    with pytest.raises(InputError, match="every change is zero"):
        lora.write(LoraAdapter({DOWN: (a, 0 * b)}, "qwen2"), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def nan(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    return np.full(shape, np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("matrices", "architecture", "message"),
    [
        ({}, "qwen2", "changes no matrix"),
        ({DOWN: factors(1, 3, 2)}, "", "architecture is missing"),
        (
            {"token_embd.weight": factors(1, 3, 2)},
            "qwen2",
            "'token_embd.weight' is not the weight of a layer",
        ),
        ({"output.weight": factors(1, 3, 2)}, "qwen2", "'output.weight' is not the weight of a layer"),
        ({"blk.１.ffn_down.weight": factors(1, 3, 2)}, "qwen2", "not the weight of a layer"),
        ({DOWN: (factors(1, 3, 2)[0], factors(2, 3, 2)[1])}, "qwen2", r"A \(1, 3\) and B \(2, 2\)"),
        ({DOWN: (np.zeros((0, 3)), np.zeros((2, 0)))}, "qwen2", "do not multiply"),
        ({DOWN: (np.zeros(3), np.zeros((2, 1)))}, "qwen2", "do not multiply"),
        ({DOWN: (nan((1, 3)), factors(1, 3, 2)[1])}, "qwen2", rf"{DOWN}: NaN or Inf"),
        ({DOWN: (np.full((1, 3), 1e300), factors(1, 3, 2)[1])}, "qwen2", rf"{DOWN}: NaN or Inf"),
    ],
)
def test_a_faulty_adapter_cannot_be_made(matrices: dict[str, Any], architecture: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraAdapter(matrices, architecture)


F32, F16, STRING = GGUFValueType.FLOAT32, np.float16, GGUFValueType.STRING
A, B = factors(1, 6, 4)
BAD: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "a control vector": (
        lambda p: foreign(p, {"direction.1": A[0]}, general__type=None, adapter__type=None),
        ["general.type is None", "adapter.type is None", "'direction.1': only blk.N"],
    ),
    "another kind of adapter": (
        lambda p: foreign(p, adapter__type=("dora", STRING)),
        ["adapter.type is 'dora'; llama.cpp needs 'lora'"],
    ),
    "a type that is not a string": (
        lambda p: foreign(p, general__type=(3, GGUFValueType.UINT32)),
        ["general.type is 3"],
    ),
    "alpha of a type that aborts llama.cpp": (
        lambda p: foreign(p, adapter__lora__alpha=("16", STRING)),
        ["adapter.lora.alpha is not a 32-bit float"],
    ),
    "alpha that is NaN": (
        lambda p: foreign(p, adapter__lora__alpha=(float("nan"), F32)),
        ["adapter.lora.alpha is nan"],
    ),
    "alpha that overflows": (
        lambda p: foreign(
            p, {f"{DOWN}.lora_a": A, f"{DOWN}.lora_b": B * 1e30}, adapter__lora__alpha=(1e38, F32)
        ),
        ["NaN or Inf"],
    ),
    "the embedding": (
        lambda p: foreign(p, {"token_embd.weight.lora_a": A, "token_embd.weight.lora_b": B}),
        ["'token_embd.weight.lora_a': only blk.N", "'token_embd.weight.lora_b': only blk.N"],
    ),
    "half a pair": (lambda p: foreign(p, {f"{DOWN}.lora_a": A}), ["both lora_a and lora_b are needed"]),
    "unequal ranks": (
        lambda p: foreign(p, {f"{DOWN}.lora_a": A, f"{DOWN}.lora_b": np.ones((4, 2), np.float32)}),
        ["do not multiply"],
    ),
    "three dimensions": (
        lambda p: foreign(p, {f"{DOWN}.lora_a": np.ones((2, 1, 6), np.float32), f"{DOWN}.lora_b": B}),
        ["shape [6, 1, 2]; 2-D needed"],
    ),
    "experts with one pair": (
        lambda p: foreign(p, {f"{EXPERTS}.lora_a": A, f"{EXPERTS}.lora_b": B}),
        ["shape [6, 1]; 3-D needed"],
    ),
    "other numbers of experts": (
        lambda p: foreign(
            p,
            {
                f"{EXPERTS}.lora_a": np.ones((3, 1, 6), np.float32),
                f"{EXPERTS}.lora_b": np.ones((2, 4, 1), np.float32),
            },
        ),
        ["A must be [E, r, in], B [E, out, r]"],
    ),
    "doubles": (
        lambda p: foreign(p, {f"{DOWN}.lora_a": A.astype(np.float64), f"{DOWN}.lora_b": B}),
        ["is F64"],
    ),
    "NaN": (
        lambda p: foreign(p, {f"{DOWN}.lora_a": A, f"{DOWN}.lora_b": nan((4, 1))}),
        [f"{DOWN}: NaN or Inf"],
    ),
    "zeros": (
        lambda p: foreign(p, {f"{DOWN}.lora_a": A, f"{DOWN}.lora_b": 0 * B}),
        ["every change is zero"],
    ),
    "a newer schema": (
        lambda p: foreign(p, rs_gguf__schema_version=(3, GGUFValueType.UINT32)),
        ["rs_gguf.schema_version is 3; this release reads 1 and 2"],
    ),
    "provenance that cannot be kept": (
        lambda p: foreign(p, rs_gguf__loss=(float("inf"), F32)),
        ["provenance loss is inf"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_every_reason_is_reported(tmp_path: Path, name: str) -> None:
    write, reasons = BAD[name]
    path = write(tmp_path / "a.gguf")
    report = lora.check(path)
    assert not report.valid
    errors = "\n".join(report.errors)
    for reason in reasons:
        assert reason in errors
    if name != "zeros":  # `read` accepts an adapter without effect
        with pytest.raises(InputError) as caught:
            lora.read(path)
        assert all(error in str(caught.value) for error in report.errors)


def test_a_file_cut_short_or_absent_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    lora.write(FULL, path)
    whole = path.read_bytes()
    for size in (0, 3, 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        report = lora.check(path)
        assert len(report.errors) == 1
        assert "not a sound GGUF file" in report.errors[0]
        for use in (lora.read, steering_file.kind_of):
            with pytest.raises(InputError, match="not a sound GGUF file"):
                use(path)
    assert "cannot be read" in lora.check(tmp_path / "absent.gguf").errors[0]


def test_zero_matrices_are_a_warning(tmp_path: Path) -> None:
    a, b = factors(1, 6, 4)
    lora.write(LoraAdapter({DOWN: (a, b), OUT: (a, 0 * b)}, "qwen2"), tmp_path / "a.gguf")
    report = lora.check(tmp_path / "a.gguf")
    assert report.valid
    assert report.warnings == (f"['{OUT}'] do nothing: their changes are zero.",)


def test_half_floats_and_alpha_of_other_tools_are_read(tmp_path: Path) -> None:
    a, b = factors(2, 6, 4)
    halves = {f"{DOWN}.lora_a": a.astype(F16), f"{DOWN}.lora_b": b.astype(F16)}
    found = lora.read(foreign(tmp_path / "a.gguf", halves, adapter__lora__alpha=(16.0, F32)))
    np.testing.assert_array_equal(found.factors[DOWN][0], a.astype(F16).astype(np.float32))
    # llama.cpp multiplies by alpha / rank; the reader includes that factor in B.
    np.testing.assert_array_equal(found.factors[DOWN][1], 8 * b.astype(F16).astype(np.float32))


def test_an_alora_is_not_written_as_an_adapter_for_every_token(tmp_path: Path) -> None:
    tokens = ([5, 6], GGUFValueType.ARRAY, GGUFValueType.UINT32)
    path = foreign(tmp_path / "a.gguf", adapter__alora__invocation_tokens=tokens)
    report = lora.check(path)
    assert report.valid
    assert "is an aLoRA" in report.warnings[0]
    found = lora.read(path)
    for call in (
        lambda: lora.write(found, tmp_path / "b.gguf"),
        lambda: LoraAdapter.combined([(found, 1.0)]),
        lambda: peft_export.export(found, "none", tmp_path / "peft"),
    ):
        with pytest.raises(InputError, match="is an aLoRA"):
            call()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "tokens", [([5, 6], GGUFValueType.ARRAY, GGUFValueType.INT32), (5, GGUFValueType.UINT32)]
)
def test_invocation_tokens_are_a_list_of_unsigned_numbers(tmp_path: Path, tokens: Any) -> None:
    report = lora.check(foreign(tmp_path / "a.gguf", adapter__alora__invocation_tokens=tokens))
    assert not report.valid
    assert "invocation_tokens is not a list of 32-bit unsigned numbers" in report.errors[0]


def test_norms_are_ignored_as_in_llama_cpp(tmp_path: Path) -> None:
    """mergekit writes norms when it turns an abliterated model into an adapter."""
    path, (a, b) = tmp_path / "a.gguf", factors(1, 6, 4)
    norm = {"blk.1.attn_norm.weight": np.ones(4, np.float32)}
    foreign(path, {f"{DOWN}.lora_a": a, f"{DOWN}.lora_b": b, **norm})
    report = lora.check(path)
    assert report.valid
    assert "ignores 'blk.1.attn_norm.weight'" in report.warnings[0]
    assert list(lora.read(path).factors) == [DOWN]


def test_an_adapter_too_large_to_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "MAX_ADAPTER_BYTES", 100)
    with pytest.raises(InputError, match=r"a\.gguf would have 0 MiB; at most 0 MiB can be read again"):
        lora.write(FULL, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_adapters_far_larger_than_vectors_are_read(tmp_path: Path) -> None:
    """Adapters of other tools change every matrix of a large model at rank 16."""
    a, b = np.zeros((64, 65536), np.float32), np.ones((131072, 64), np.float16)
    a[:, 0] = 1
    path = foreign(tmp_path / "a.gguf", {f"{DOWN}.lora_a": a, f"{DOWN}.lora_b": b})
    assert path.stat().st_size > 32 * 2**20
    assert steering_file.kind_of(path) is LoraAdapter
    assert lora.read(path).norms[DOWN] == pytest.approx(64 * 131072**0.5)
    with path.open("r+b") as file:
        file.truncate(2**30 + 2**20 + 1)
    with pytest.raises(InputError, match="a steering file has at most 1074790400"):
        steering_file.kind_of(path)


def test_norms_and_cosines_equal_those_of_the_products() -> None:
    other = LoraAdapter({DOWN: factors(3, 6, 4, seed=5), "blk.7.ffn_up.weight": factors(1, 4, 6)}, "qwen2")

    def product(adapter: LoraAdapter, name: str) -> npt.NDArray[np.float64]:
        a, b = (factor.astype(np.float64) for factor in adapter.factors[name])
        return b @ a

    for name, norm in FULL.norms.items():
        assert norm == pytest.approx(np.linalg.norm(product(FULL, name)), rel=1e-12)
    x, y = product(FULL, DOWN), product(other, DOWN)
    expected = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert FULL.cosines(other) == {DOWN: pytest.approx(expected, rel=1e-12)}
    assert FULL.cosines(FULL)[OUT] == pytest.approx(1.0)


def test_a_sum_adds_products_and_keeps_provenance() -> None:
    other = LoraAdapter(
        {DOWN: factors(1, 6, 4, seed=9), "blk.7.ffn_up.weight": factors(1, 4, 6)},
        "qwen2",
        {"k": 1, "weight": 7},
    )
    total = LoraAdapter.combined([(FULL, 0.5), (other, -2.0)])
    assert set(total.factors) == set(FULL.factors) | set(other.factors)
    assert total.rank == 3
    for name, (a, b) in total.factors.items():
        expected = np.zeros(())
        for part, weight in ((FULL, 0.5), (other, -2.0)):
            if name in part.factors:
                expected = expected + weight * part.factors[name][1] @ part.factors[name][0]
        np.testing.assert_allclose(b @ a, expected, atol=1e-5)
    assert total.provenance["combine.0.weight"] == 0.5
    assert total.provenance["combine.0.method"] == "gate"
    assert total.provenance["combine.1.k"] == 1
    assert total.provenance["combine.1.weight"] == -2.0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "nothing to combine"),
        ([(FULL, float("nan"))], "weight nan of adapter 0"),
        ([(FULL, 1.0), (LoraAdapter(FULL.factors, "llama"), 1.0)], "llama and qwen2.*different models"),
        ([(FULL, 1.0), (LoraAdapter({DOWN: factors(1, 6, 8)}, "qwen2"), 1.0)], r"\(4, 6\).*\(8, 6\)"),
        ([(FULL, 1e39)], "NaN or Inf"),
    ],
)
def test_impossible_sums_are_refused(parts: list[tuple[LoraAdapter, float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraAdapter.combined(parts)


# ---- the effect in llama.cpp ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.Qwen2ForCausalLM]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return path, write_tiny_qwen2(path)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_llama_cpp_adds_scale_times_the_product(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path, scale: float
) -> None:
    model, network = tiny
    lora.write(random_adapter(), tmp_path / "a.gguf")
    expected = torch_logits(network, random_adapter(), scale)
    assert np.abs(expected - llama_logits(model, None)).max() > 0.1
    np.testing.assert_allclose(llama_logits(model, tmp_path / "a.gguf", scale), expected, atol=1e-4)


def test_a_sum_has_the_effect_of_two_files(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    parts = [(random_adapter(), 0.5), (random_adapter(seed=200, rank=1, layers=(1,)), -1.5)]
    for number, (adapter, _) in enumerate(parts):
        lora.write(adapter, tmp_path / f"{number}.gguf")
    lora.write(LoraAdapter.combined(parts), tmp_path / "sum.gguf")
    prompt = [5, 9, 17, 40, 3]
    with LlamaModel(tiny[0], n_parallel=2, n_ctx=256, n_threads=1) as model:
        plain = next(row.copy() for _, row in model.next_logits([prompt]))
        with model.steered(Steering(adapters=[(tmp_path / "0.gguf", 0.5), (tmp_path / "1.gguf", -1.5)])):
            together = next(row.copy() for _, row in model.next_logits([prompt]))
        with model.steered(Steering(adapters=[(tmp_path / "sum.gguf", 1.0)])):
            summed = next(row.copy() for _, row in model.next_logits([prompt]))
    assert np.abs(together - plain).max() > 0.1
    np.testing.assert_allclose(summed, together, atol=1e-3)


def test_scales_of_one_file_add_up(tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    lora.write(random_adapter(), file)
    with LlamaModel(tiny[0], n_parallel=2, n_ctx=256, n_threads=1) as model:

        def under(*adapters: tuple[Path, float]) -> np.ndarray:
            with model.steered(Steering(adapters=adapters)):
                return next(row.copy() for _, row in model.next_logits([[5, 9, 17, 40, 3]]))

        twice = under((file, 0.5), (tmp_path / "." / ".." / tmp_path.name / "a.gguf", -1.5))
        np.testing.assert_array_equal(twice, under((file, -1.0)))
        assert np.abs(twice - under((file, 0.5))).max() > 0.1


@pytest.mark.slow
def test_check_observes_the_effect_on_the_model(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    lora.write(random_adapter(), tmp_path / "a.gguf")
    report = steering_file.check(tmp_path / "a.gguf", tiny[0])
    assert report.errors == ()
    assert report.effect is not None
    assert report.effect.effect_observed
    assert set(report.effect.relative_error) == set(random_adapter().factors)
    assert report.effect.largest_relative_error < 1e-3
    assert report.effect.kl_mean is not None
    assert report.effect.kl_mean > 0


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraAdapter(random_adapter().factors, "llama"), "belongs to another model"),
        (random_adapter(layers=(3,)), "'blk.3.attn_output.weight' does not exist in base model"),
        (LoraAdapter({OUT: factors(1, 64, 32)}, "qwen2"), f"'{OUT}' has incorrect shape"),
        (LoraAdapter({OUT: factors(1, 32, 64)}, "qwen2"), f"'{OUT}' has incorrect shape"),
    ],
)
def test_an_adapter_for_another_model_is_reported(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path, adapter: LoraAdapter, message: str
) -> None:
    lora.write(adapter, tmp_path / "a.gguf")
    report = steering_file.check(tmp_path / "a.gguf", tiny[0])
    assert len(report.errors) == 1
    assert message in report.errors[0]


def test_a_bad_model_raises_and_is_not_an_error_of_the_adapter(tmp_path: Path) -> None:
    lora.write(FULL, tmp_path / "a.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="cannot load"):
        steering_file.check(tmp_path / "a.gguf", tmp_path / "m.gguf")
