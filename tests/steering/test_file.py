"""Either kind of file that llama.cpp loads: what all of them can do, and telling them apart."""

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
from rs_gguf.steering.file import SteeringFile, check, check_effect, read, read_alike, write
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
    """What makes a file of the kind."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=4, n_embd=WIDTH)
    with LlamaModel(path, n_parallel=4, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def test_what_is_written_is_read(make: Any, tmp_path: Path) -> None:
    found: SteeringFile = make(**FACTS)
    write(found, tmp_path / "f.gguf")
    assert read(tmp_path / "f.gguf") == found
    report = check(tmp_path / "f.gguf")
    assert (report.valid, report.errors, report.warnings, report.effect) == (True, (), (), None)
    assert report.found == found
    first = (tmp_path / "f.gguf").read_bytes()
    write(found, tmp_path / "f.gguf")
    assert (tmp_path / "f.gguf").read_bytes() == first


def test_it_says_what_it_is(make: Any) -> None:
    found: SteeringFile = make(**FACTS)
    assert (found.architecture, found.layers, found.provenance) == ("qwen2", [1, 2], FACTS)
    assert len(found.norms) == 2
    assert all(norm > 0 for norm in found.norms.values())
    assert found.contents["kind"] == found.kind
    assert found.contents["layers"] == found.layers


def test_facts_are_added(make: Any, tmp_path: Path) -> None:
    found: SteeringFile = make(**FACTS)
    told = found.with_facts({"measured": True, "acceptance.passed": False})
    assert told.provenance == {**FACTS, "measured": True, "acceptance.passed": False}
    assert told.with_facts(FACTS).norms == found.norms
    assert found.provenance == FACTS  # as it was
    write(told, tmp_path / "f.gguf")
    assert read(tmp_path / "f.gguf").provenance == told.provenance


def test_a_sum_is_that_of_the_effects(make: Any) -> None:
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


def test_it_steers_as_far_as_its_scale(make: Any, model: LlamaModel, tmp_path: Path) -> None:
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


def test_llama_cpp_is_told_to_load_it(make: Any) -> None:
    found: SteeringFile = make()
    option, path, *rest = found.options("'my file.gguf'").split(" ", 3)
    assert option == found.option
    assert path == "'my"
    assert rest[0] == "file.gguf'"
    layer_range = "--control-vector-layer-range 1 2"
    assert found.options("f.gguf").removeprefix(f"{option} f.gguf").strip() in ("", layer_range)


def test_its_effect_is_seen_on_a_model(make: Any, model: LlamaModel, tmp_path: Path) -> None:
    write(make(), tmp_path / "f.gguf")
    shown = check_effect(tmp_path / "f.gguf", model)
    assert (shown.effect_observed, shown.reasons) == (True, ())
    assert shown == check(tmp_path / "f.gguf", model.path).effect
    assert shown.kl_mean is not None
    assert shown.kl_mean > 0


def test_one_of_another_model_has_none(make: Any, model: LlamaModel, tmp_path: Path) -> None:
    write(make(1, 2 * WIDTH), tmp_path / "f.gguf")
    shown = check_effect(tmp_path / "f.gguf", model)
    assert not shown.effect_observed
    assert shown.reasons


def test_with_a_model_the_proof_has_its_say(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: SteeringFile = make()
    write(found, tmp_path / "f.gguf")
    asked: list[Any] = []

    def shown(given: SteeringFile, path: Path, model: Any) -> EffectCheck:
        asked.append((given, path))
        return EffectCheck(False, ("the model has 6 blocks",), {}, None, "refused")

    monkeypatch.setattr(LlamaModel, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(LlamaModel, "close", lambda _: None)
    monkeypatch.setattr(steering_file, "_effect_on", shown)
    monkeypatch.setattr(effect_check, "other_model", lambda provenance, model: ["of another file"])
    report = check(tmp_path / "f.gguf", "model.gguf")
    assert asked == [(found, tmp_path / "f.gguf")]
    assert report.errors == ("the model has 6 blocks",)
    assert "of another file" in report.warnings
    assert report.effect is not None
    assert report.effect.reasons == report.errors
    assert report.loader_says == "refused"
    # A file that cannot be used is not run.
    (tmp_path / "bad.gguf").write_bytes(b"x")
    assert not check(tmp_path / "bad.gguf", "model.gguf").valid
    assert len(asked) == 1


def test_files_of_both_kinds_have_no_sum(tmp_path: Path) -> None:
    for name, make in KINDS.items():
        write(make(), tmp_path / name)
    with pytest.raises(
        InputError, match=r"is a control vector and .* a LoRA adapter.*loads both side by side"
    ):
        read_alike([tmp_path / name for name in KINDS])
    for name, make in KINDS.items():
        assert read_alike([tmp_path / name, tmp_path / name]) == [make(), make()]


def test_equality_is_of_all_content(make: Any) -> None:
    found = make(**FACTS)
    assert found == make(**FACTS)
    for other in (
        make(1, **FACTS),
        make(),
        dataclasses.replace(found, architecture="llama"),
        SimpleNamespace(),
    ):
        assert found != other
    assert make(layer=1) != make(layer=True)  # equal in Python, but not in a file
