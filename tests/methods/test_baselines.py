"""The baselines: planted differences are found, ablation ablates, and prompts ask for what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3

from rs_gguf.engines.engine import NO_STEERING, Can, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation.condition import Condition
from rs_gguf.methods import baselines
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline.recipe import Recipe, load
from rs_gguf.records.conversation import KINDS, Prompt

LAYERS, WIDTH, N = 10, 32, 240


def recipe(*names: str, effect: str = "remove", system: str | None = None) -> Recipe:
    overrides = [f"effect={effect}", f"measure.baselines={list(names)}"]
    return load(None, overrides + ([] if system is None else [f"prompts.system={system}"]))


def samples(layers: int = LAYERS) -> Samples:
    """Refused differ from answered along one axis, in block 4 most but for block 9, which is too deep."""
    rng = np.random.default_rng(0)
    refused = np.arange(N) % 2 == 0
    activations = rng.standard_normal((N, layers, WIDTH)).astype(np.float32)
    for layer in range(layers):
        gap = {4: 3.0, 9: 9.0}.get(layer, 0.5)
        activations[refused, layer, layer] += gap
    prompts = [Prompt(f"about {k}", KINDS[k % 3], subject=f"s{k % 7}", split="fit") for k in range(N)]
    return Samples(prompts, activations, np.where(refused, 0.9, -0.9), {}, Path())


def templated(template: str) -> Any:
    """All of a model that a system prompt needs."""
    return SimpleNamespace(path=Path("tiny.gguf"), chat_template=template, bos_token="", eos_token="")


def build(
    found: Samples, chosen: Recipe, model: LlamaModel | None = None, folder: Path = Path()
) -> Sequence[Condition]:
    return baselines.build(
        chosen.measure.baselines,
        found.prompts,
        lambda: found,
        model,  # type: ignore[arg-type]
        folder,
        effect=chosen.effect,
        system=chosen.prompts.system,
        seed=chosen.seed,
    )


@pytest.mark.parametrize(("effect", "sign"), [("remove", -1), ("induce", 1)])
def test_the_mean_difference_is_taken_where_it_tells_most(effect: str, sign: int) -> None:
    found = samples()
    (baseline,) = build(found, recipe("md", effect=effect))
    refused = found.confidence > 0
    expected = found.activations[refused, 4].mean(axis=0) - found.activations[~refused, 4].mean(axis=0)
    assert list(baseline.steering.directions) == [4]
    np.testing.assert_allclose(baseline.steering.directions[4], sign * expected, atol=1e-5)


@pytest.mark.parametrize("name", ["rmd", "wrmd"])
def test_as_printed_adds_up_to_the_papers_strength(name: str) -> None:
    found = samples()
    (remove,) = build(found, recipe(name))
    (induce,) = build(found, recipe(name, effect="induce"))
    added = remove.steering.directions
    assert len(added) == LAYERS // 3
    assert 4 in added
    assert 0 not in added
    # Away from refusal, along the planted axis of the block; to induce it the other way round.
    assert added[4][4] < 0 < induce.steering.directions[4][4]
    assert abs(added[4][4]) > 0.75 * np.linalg.norm(added[4])
    # α·s with k·|α| = 3 and s = |Q₀.₀₅(p)/Q₀.₀₅(c)| of the answered samples.
    direction = added[4] / np.linalg.norm(added[4])
    answered = found.confidence < 0
    middle = 0.5 * sum(found.activations[side, 4].mean(axis=0) for side in (answered, ~answered))
    low = np.quantile((found.activations[answered, 4] - middle) @ -direction, 0.05) / -0.9
    assert np.linalg.norm(added[4]) == pytest.approx(3 / 3 * abs(low), rel=0.05)


def test_a_system_prompt_asks_for_the_effect() -> None:
    found, model = samples(), templated("{{ messages | map(attribute='content') | join }}")
    (opened,) = build(found, recipe("system-prompt"), model)
    assert opened.steering is NO_STEERING
    assert "openly" in (opened.system or "")
    (own,) = build(found, recipe("system-prompt", system="You are a pirate."), model)
    assert own.system == f"You are a pirate.\n\n{opened.system}"
    (closed,) = build(found, recipe("system-prompt", effect="induce"), model)
    listed = [line.removeprefix("- ") for line in (closed.system or "").split("\n")[1:]]
    wanted = {p.prompt for p in found.prompts if p.kind == "sensitive"}
    assert len(set(listed)) == 6
    assert set(listed) <= wanted


def test_of_a_long_request_the_beginning_is_shown() -> None:
    asked = [Prompt(f"Case {k}.\n" + "The patient takes a medicine. " * 200, "sensitive") for k in range(10)]
    shown = (baselines.system_prompt(asked, "induce", None, seed=0).system or "").split("\n- ")[1:]
    assert len(shown) == 6
    assert all(" ".join(asked[int(line[5])].prompt.split()).startswith(line) for line in shown)
    assert {len(line) for line in shown} == {200}


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
    found = build(samples(), recipe("system-prompt", "md"), model)
    assert [side.name for side in found] == ["md, one block"]
    assert "tiny takes no system prompt" in caplog.text


def test_after_ablation_no_block_writes_along_the_direction(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    found = samples()
    (difference,) = build(found, recipe("md"))
    unit = -difference.steering.directions[4] / np.linalg.norm(difference.steering.directions[4])
    with LlamaModel(path, n_threads=1) as model:
        (ablated,) = build(found, recipe("ablation"), model, tmp_path)
        prompt = [[5, 9, 17, 30]]

        def along() -> np.ndarray:
            return np.asarray(read_last(model, prompt, range(LAYERS))["l_out"][0] @ unit)

        before = along()
        with model.steered(ablated.steering):
            after = along()
    # What the embedding put there stays, and nothing is added to it.
    assert np.ptp(after) < 1e-3 * np.ptp(before)


def test_ablation_that_would_leave_the_experts_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "experts.gguf"
    write_tiny_qwen3(path, THINKING_TEMPLATE, experts=4, n_layer=3)
    found = samples(layers=3)
    with LlamaModel(path, n_parallel=2, n_ctx=256) as model:
        assert build(found, recipe("ablation"), model, tmp_path) == []
    assert "ffn_down_exps" in caplog.text


def test_ablation_is_for_removal_from_a_gguf_file(tmp_path: Path) -> None:
    found = samples()
    gguf, folder = (cast("LlamaModel", SimpleNamespace(can=can)) for can in (Can.LORA, Can(0)))
    with pytest.raises(InputError, match=r"measure\.baselines: ablation"):
        baselines.ablation(found, gguf, tmp_path, "induce", None)
    for effect in ("remove", "induce"):
        with pytest.raises(InputError, match=r"measure\.baselines: ablation"):
            build(found, recipe("ablation", effect=effect), folder)
