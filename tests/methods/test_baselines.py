"""Test the baselines: planted differences are recovered, ablation ablates, prompts ask for the effect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3

from rs_gguf.engines.engine import NO_STEERING, Can, Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation.condition import Condition
from rs_gguf.methods import baselines
from rs_gguf.methods.baselines import usable
from rs_gguf.methods.samples import Samples
from rs_gguf.models import architecture, dimensions
from rs_gguf.pipeline.recipe import Recipe, load
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.steering import lora_file
from rs_gguf.steering.ablation import ablated, outputs_along
from rs_gguf.steering.formats import glp
from rs_gguf.steering.lora import LoraAdapter

LAYERS, WIDTH, N = 10, 32, 240


def recipe(*names: str, effect: str = "remove", system: str | None = None) -> Recipe:
    overrides = [f"effect={effect}", f"measure.baselines={list(names)}"]
    return load(None, overrides + ([] if system is None else [f"prompts.system={system}"]))


def samples(layers: int = LAYERS) -> Samples:
    """Return samples: refused ones differ along one axis, most in layer 9, which is too deep, then in 4."""
    rng = np.random.default_rng(0)
    refused = np.arange(N) % 2 == 0
    activations = rng.standard_normal((N, layers, WIDTH)).astype(np.float32)
    for layer in range(layers):
        gap = {4: 3.0, 9: 9.0}.get(layer, 0.5)
        activations[refused, layer, layer] += gap
    prompts = [Prompt(f"about {k}", KINDS[k % 3], subject=f"s{k % 7}", split="fit") for k in range(N)]
    return Samples(prompts, activations, np.where(refused, 0.9, -0.9), {}, Path())


def templated(template: str) -> Any:
    """Return the parts of a model that a system prompt needs."""
    return SimpleNamespace(path=Path("tiny.gguf"), chat_template=template, bos_token="", eos_token="")


def build(
    fit_samples: Samples,
    chosen: Recipe,
    model: LlamaModel | None = None,
    folder: Path = Path(),
    layers: tuple[int, int] = (3, 5),
) -> Sequence[Condition]:
    """Return the usable baselines of a recipe; the first system prompt counts as the best one."""
    return baselines.build(
        baselines.usable(chosen.measure.baselines, model),  # type: ignore[arg-type]
        lambda: fit_samples,
        model,  # type: ignore[arg-type]
        folder,
        effect=chosen.effect,
        system=chosen.prompts.system,
        system_prompt=lambda: wordings(fit_samples, chosen)[0],
        layers=layers,
    )


def wordings(fit_samples: Samples, chosen: Recipe) -> list[Condition]:
    system = chosen.prompts.system
    return baselines.system_prompts(fit_samples.prompts, chosen.effect, system, seed=chosen.seed)


@pytest.mark.parametrize(("effect", "sign"), [("remove", -1), ("induce", 1)])
def test_the_mean_difference_is_taken_where_it_separates_best(effect: str, sign: int) -> None:
    fit_samples = samples()
    (baseline,) = build(fit_samples, recipe("md", effect=effect))
    refused, rows = fit_samples.confidence > 0, fit_samples.activations[:, 4]
    expected = rows[refused].mean(axis=0) - rows[~refused].mean(axis=0)
    assert list(baseline.steering.directions) == [4]
    np.testing.assert_allclose(baseline.steering.directions[4], sign * expected, atol=1e-5)


@pytest.mark.parametrize("name", ["rmd", "wrmd"])
def test_as_printed_adds_up_to_the_papers_strength(name: str) -> None:
    fit_samples = samples()
    (remove,) = build(fit_samples, recipe(name))
    (induce,) = build(fit_samples, recipe(name, effect="induce"))
    added = remove.steering.directions
    assert sorted(added) == [3, 4, 5]
    # Away from refusal along the planted axis of the layer; the opposite way to induce.
    assert added[4][4] < 0 < induce.steering.directions[4][4]
    assert abs(added[4][4]) > 0.75 * np.linalg.norm(added[4])
    # α·s with k·|α| = 3 and s = |Q₀.₀₅(p)/Q₀.₀₅(c)| of the answered samples.
    direction = added[4] / np.linalg.norm(added[4])
    answered, rows = fit_samples.confidence < 0, fit_samples.activations[:, 4]
    middle = 0.5 * sum(rows[mask].mean(axis=0) for mask in (answered, ~answered))
    low = np.quantile((rows[answered] - middle) @ -direction, 0.05) / -0.9
    assert np.linalg.norm(added[4]) == pytest.approx(3 / 3 * abs(low), rel=0.05)


@pytest.mark.parametrize("name", ["rmd", "wrmd"])
def test_as_printed_steers_the_layers_of_the_selected_vector(name: str) -> None:
    (few,) = build(samples(), recipe(name))
    (many,) = build(samples(), recipe(name), layers=(2, 6))
    assert sorted(many.steering.directions) == [2, 3, 4, 5, 6]
    assert many.name == few.name
    # k·|α| = 3 is shared by five layers in place of three.
    for layer in (3, 4, 5):
        np.testing.assert_allclose(
            many.steering.directions[layer], 3 / 5 * few.steering.directions[layer], rtol=1e-5
        )


def test_a_system_prompt_asks_for_the_effect() -> None:
    fit_samples, model = samples(), templated("{{ messages | map(attribute='content') | join }}")
    (remove,) = build(fit_samples, recipe("system-prompt"), model)
    assert (remove.name, remove.steering) == ("system prompt", NO_STEERING)
    assert "openly" in (remove.system or "")
    (own,) = build(fit_samples, recipe("system-prompt", system="You are a pirate."), model)
    assert own.system == f"You are a pirate.\n\n{remove.system}"
    (induce,) = build(fit_samples, recipe("system-prompt", effect="induce"), model)
    examples = [line.removeprefix("- ") for line in (induce.system or "").split("\n")[1:]]
    sensitive = {p.prompt for p in fit_samples.prompts if p.kind == "sensitive"}
    assert len(set(examples)) == 6
    assert set(examples) <= sensitive


@pytest.mark.parametrize("effect", ["remove", "induce"])
def test_at_least_six_wordings_differ(effect: str) -> None:
    fit_samples = samples()
    found = wordings(fit_samples, recipe("system-prompt", effect=effect))
    assert len({wording.system for wording in found}) == len({w.name for w in found}) == len(found) >= 6
    assert all(wording.steering is NO_STEERING for wording in found)
    sensitive = {p.prompt for p in fit_samples.prompts if p.kind == "sensitive"}
    for wording in found:
        assert "{examples}" not in (wording.system or "")
        shown = [line for line in (wording.system or "").split("\n") if line.removeprefix("- ") in sensitive]
        assert len(shown) == (6 if effect == "induce" else 0)
    own = wordings(fit_samples, recipe("system-prompt", effect=effect, system="You are a pirate."))
    assert all((wording.system or "").startswith("You are a pirate.") for wording in own)


def test_the_beginning_of_a_long_prompt_is_shown() -> None:
    prompts = [
        Prompt(f"Case {k}.\n" + "The patient takes a medicine. " * 200, "sensitive") for k in range(10)
    ]
    for wording in baselines.system_prompts(prompts, "induce", None, seed=0):
        lines = (wording.system or "").split("\n")
        examples = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
        assert len(examples) == 6
        assert all(" ".join(prompts[int(line[5])].prompt.split()).startswith(line) for line in examples)
        assert {len(line) for line in examples} == {200}


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('') }}{% endif %}{{ messages[-1].content }}",
        "{{ messages[-1].content }}",
    ],
)
def test_a_template_without_a_system_prompt_does_without_that_baseline(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = templated(template)
    conditions = build(samples(), recipe("system-prompt", "md"), model)
    assert [condition.name for condition in conditions] == ["md, one layer"]
    assert "tiny takes no system prompt" in caplog.text


def test_after_ablation_no_layer_adds_along_the_direction(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    fit_samples = samples()
    (difference,) = build(fit_samples, recipe("md"))
    unit = -difference.steering.directions[4] / np.linalg.norm(difference.steering.directions[4])
    with LlamaModel(path, n_threads=1) as model:
        (ablated,) = build(fit_samples, recipe("ablation"), model, tmp_path)
        prompt = [[5, 9, 17, 30]]

        def along() -> np.ndarray:
            return np.asarray(read_last(model, prompt, range(LAYERS))["l_out"][0] @ unit)

        before = along()
        with model.steered(ablated.steering):
            after = along()
    # The part of the embedding stays, and no layer adds to it.
    assert np.ptp(after) < 1e-3 * np.ptp(before)
    projection, notes = glp.of_adapter(lora_file.read(tmp_path / "baselines" / "ablation.gguf"), path)
    assert projection.vector.layers == list(range(1, LAYERS))
    assert projection.alpha == pytest.approx(1)
    for row in projection.vector.directions.values():
        np.testing.assert_allclose(row, unit, atol=1e-6)
    assert "Left out layer 0" in notes[1]


def test_after_ablation_no_expert_adds_along_the_direction(tmp_path: Path) -> None:
    path = tmp_path / "experts.gguf"
    write_tiny_qwen3(path, THINKING_TEMPLATE, experts=4, n_layer=3)
    width = dimensions.of_gguf(path).width
    unit = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    unit /= np.linalg.norm(unit)
    factors = {n: ablated(unit, along) for n, along in outputs_along(path, dict.fromkeys(range(3), unit))}
    assert {name.split(".")[2] for name in factors} == {"attn_output", "ffn_down_exps"}
    adapter = LoraAdapter(factors, "qwen3moe")
    lora_file.write(adapter, tmp_path / "ablation.gguf")
    with LlamaModel(path, n_parallel=2, n_ctx=256, n_threads=1) as model:

        def along() -> np.ndarray:
            return np.asarray(read_last(model, [[5, 9, 17, 30]], range(3))["l_out"][0] @ unit)

        before = along()
        assert usable(["ablation"], model) == ["ablation"]
        with model.steered(Steering(adapters=[(tmp_path / "ablation.gguf", 1.0)])):
            assert np.ptp(along()) < 1e-3 * np.ptp(before)


def test_ablation_is_left_out_where_llama_cpp_applies_no_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    monkeypatch.setattr(architecture, "_WITHOUT_LORA", {"qwen2": ("attn_output",)})
    with LlamaModel(path, n_parallel=2, n_ctx=256, n_threads=1) as model:
        assert build(samples(), recipe("ablation"), model, tmp_path) == []
    assert "applies no adapter to blk.0.attn_output.weight" in caplog.text


def test_ablation_is_for_removal_from_a_gguf_file(tmp_path: Path) -> None:
    fit_samples = samples()
    gguf, folder = (cast("LlamaModel", SimpleNamespace(can=can)) for can in (Can.LORA, Can(0)))
    with pytest.raises(InputError, match=r"measure\.baselines: ablation"):
        baselines.ablation(fit_samples, gguf, tmp_path, "induce", None)
    for effect in ("remove", "induce"):
        with pytest.raises(InputError, match=r"measure\.baselines: ablation"):
            build(fit_samples, recipe("ablation", effect=effect), folder)
