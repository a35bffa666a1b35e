"""Steering files of both kinds: what each must do, how they are told apart, and `PATH:SCALE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.steering import effect_check
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.file import SteeringFile, check, check_effect, path_and_scale, read, read_alike, write
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.report import EffectCheck
from rs_gguf.steering.vector import SteeringVector

WIDTH = 32
FACTS: dict[str, ProvenanceValue] = {"method": "md", "layers": [1, 2], "measured": False}


def vector(seed: int = 0, width: int = WIDTH, **facts: Any) -> SteeringVector:
    rows = np.random.default_rng(seed).standard_normal((2, width)).astype(np.float32)
    return SteeringVector({1: rows[0], 2: rows[1]}, facts, "qwen2")


def adapter(seed: int = 0, width: int = WIDTH, **facts: Any) -> LoraAdapter:
    numbers = np.random.default_rng(seed).standard_normal((2, 2, width)).astype(np.float32)
    factors = {
        f"blk.{layer}.attn_output.weight": (a[np.newaxis], b[:, np.newaxis])
        for layer, (a, b) in enumerate(numbers, start=1)
    }
    return LoraAdapter(factors, "qwen2", facts)


KINDS: dict[str, Callable[..., SteeringFile]] = {"control vector": vector, "adapter": adapter}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Any:
    """A function that makes a file of one kind."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=4, n_embd=WIDTH)
    with LlamaModel(path, n_parallel=4, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def test_a_written_file_is_read_back_and_checked(make: Any, tmp_path: Path) -> None:
    file: SteeringFile = make(**FACTS)
    write(file, tmp_path / "f.gguf")
    assert read(tmp_path / "f.gguf") == file
    report = check(tmp_path / "f.gguf")
    assert (report.valid, report.errors, report.warnings, report.effect) == (True, (), (), None)
    assert report.content == file
    first = (tmp_path / "f.gguf").read_bytes()
    write(file, tmp_path / "f.gguf")
    assert (tmp_path / "f.gguf").read_bytes() == first


def test_a_file_describes_itself(make: Any) -> None:
    found: SteeringFile = make(**FACTS)
    assert (found.architecture, found.layers, found.provenance) == ("qwen2", [1, 2], FACTS)
    assert len(found.norms) == 2
    assert all(norm > 0 for norm in found.norms.values())
    assert found.contents["kind"] == found.kind
    assert found.contents["layers"] == found.layers


def test_facts_are_added(make: Any, tmp_path: Path) -> None:
    found: SteeringFile = make(**FACTS)
    updated = found.with_facts({"measured": True, "acceptance.passed": False})
    assert updated.provenance == {**FACTS, "measured": True, "acceptance.passed": False}
    assert updated.with_facts(FACTS).norms == found.norms
    assert found.provenance == FACTS  # unchanged
    write(updated, tmp_path / "f.gguf")
    assert read(tmp_path / "f.gguf").provenance == updated.provenance


def test_a_sum_has_the_sum_of_the_effects(make: Any) -> None:
    parts: list[tuple[SteeringFile, float]] = [(make(1), 0.5), (make(2, tool="b"), -2.0)]
    (first, _), (second, _) = parts
    total = first.combined(parts)
    assert total.layers == first.layers
    assert total.provenance == {"combine.0.weight": 0.5, "combine.1.tool": "b", "combine.1.weight": -2.0} | {
        key: value for key, value in total.provenance.items() if key.endswith(".architecture")
    }
    for part, cosine in first.cosines(second).items():
        ours, theirs = first.norms[part], second.norms[part]  # type: ignore[index]
        squared = 0.25 * ours**2 + 4 * theirs**2 - 2 * cosine * ours * theirs
        assert total.norms[part] == pytest.approx(squared**0.5, rel=1e-5)  # type: ignore[index]
    with pytest.raises(InputError, match="nothing to combine"):
        first.combined([])
    with pytest.raises(InputError, match="belong to different models"):
        first.combined([(first, 1.0), (make(1, 2 * WIDTH), 1.0)])


def test_cosines(make: Any) -> None:
    found: SteeringFile = make(1)
    assert found.cosines(make(1)) == pytest.approx(dict.fromkeys(found.norms, 1.0))
    assert found.cosines(found.combined([(found, -2.0)])) == pytest.approx(dict.fromkeys(found.norms, -1.0))
    with pytest.raises(InputError, match="belong to different models"):
        found.cosines(make(1, 2 * WIDTH))


def test_the_scale_sets_the_effect(make: Any, model: LlamaModel, tmp_path: Path) -> None:
    found: SteeringFile = make()
    write(found, tmp_path / "f.gguf")
    prompt = [model.tokenize("Who governs a city?")]

    def logits(scale: float) -> Any:
        with model.steered(found.steering(tmp_path / "f.gguf", scale)):
            return next(model.next_logits(prompt))[1].copy()

    plain = next(model.next_logits(prompt))[1].copy()
    assert np.array_equal(logits(0.0), plain)
    assert not np.array_equal(logits(1.0), plain)
    assert not np.array_equal(logits(0.5), logits(1.0))


def test_options_load_the_file_in_llama_cpp(make: Any) -> None:
    found: SteeringFile = make()
    option, path, *rest = found.options("'my file.gguf'").split(" ", 3)
    assert option == found.option
    assert path == "'my"
    assert rest[0] == "file.gguf'"
    layer_range = "--control-vector-layer-range 1 2"
    assert found.options("f.gguf").removeprefix(f"{option} f.gguf").strip() in ("", layer_range)


def test_the_effect_is_observed_on_a_model(make: Any, model: LlamaModel, tmp_path: Path) -> None:
    write(make(), tmp_path / "f.gguf")
    effect = check_effect(tmp_path / "f.gguf", model)
    assert (effect.effect_observed, effect.reasons) == (True, ())
    assert effect == check(tmp_path / "f.gguf", model.path).effect
    assert effect.kl_mean is not None
    assert effect.kl_mean > 0


def test_a_file_of_another_model_has_no_effect(make: Any, model: LlamaModel, tmp_path: Path) -> None:
    write(make(1, 2 * WIDTH), tmp_path / "f.gguf")
    effect = check_effect(tmp_path / "f.gguf", model)
    assert not effect.effect_observed
    assert effect.reasons


def test_with_a_model_the_report_includes_the_effect_check(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: SteeringFile = make()
    write(found, tmp_path / "f.gguf")
    calls: list[Any] = []

    def effect_on(content: SteeringFile, path: Path, model: Any) -> EffectCheck:
        calls.append((content, path))
        return EffectCheck(False, ("the model has 6 blocks",), {}, None, "refused")

    monkeypatch.setattr(LlamaModel, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(LlamaModel, "close", lambda _: None)
    monkeypatch.setattr(steering_file, "_effect_on", effect_on)
    monkeypatch.setattr(effect_check, "other_model", lambda provenance, model: ["of another file"])
    report = check(tmp_path / "f.gguf", "model.gguf")
    assert calls == [(found, tmp_path / "f.gguf")]
    assert report.errors == ("the model has 6 blocks",)
    assert "of another file" in report.warnings
    assert report.effect is not None
    assert report.effect.reasons == report.errors
    assert report.loader_says == "refused"
    # An unusable file is not run.
    (tmp_path / "bad.gguf").write_bytes(b"x")
    assert not check(tmp_path / "bad.gguf", "model.gguf").valid
    assert len(calls) == 1


def test_files_of_different_kinds_cannot_be_combined(tmp_path: Path) -> None:
    for name, make in KINDS.items():
        write(make(), tmp_path / name)
    with pytest.raises(
        InputError, match=r"is a control vector and .* a LoRA adapter.*loads both side by side"
    ):
        read_alike([tmp_path / name for name in KINDS])
    for name, make in KINDS.items():
        assert read_alike([tmp_path / name, tmp_path / name]) == [make(), make()]


def test_equality_compares_all_content(make: Any) -> None:
    found = make(**FACTS)
    assert found == make(**FACTS)
    for other in (
        make(1, **FACTS),
        make(),
        dataclasses.replace(found, architecture="llama"),
        SimpleNamespace(),
    ):
        assert found != other
    assert make(layer=1) != make(layer=True)  # 1 == True in Python, but not in a file


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a.gguf", (Path("a.gguf"), 1.0)),
        ("a.gguf:0.5", (Path("a.gguf"), 0.5)),
        ("a:b.gguf:-2", (Path("a:b.gguf"), -2.0)),
    ],
)
def test_a_scale_follows_the_last_colon(argument: str, expected: tuple[Path, float]) -> None:
    assert path_and_scale(argument) == expected


def test_an_existing_file_with_a_colon_in_its_name_has_scale_1(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert path_and_scale(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)


def test_a_scale_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="'much' is not a number"):
        path_and_scale("a.gguf:much")
