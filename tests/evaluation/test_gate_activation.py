"""Gate activation on a tiny model, against NumPy on inputs that are read one token at a time.

Minimal pairs are compared with counts made by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures.adapters import factors
from fixtures.architectures import llama
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Engine, Steering, read_last
from rs_gguf.evaluation import gate_activation as module
from rs_gguf.evaluation.gate_activation import (
    gate_activation_by_kind,
    gate_activations,
    minimal_pairs,
    separation,
)
from rs_gguf.records.conversation import KINDS, Answer, Prompt
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering import lora_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

INPUTS = {"attn_output": "kqv_out", "ffn_down": "ffn_swiglu"}
ADAPTER = LoraAdapter(
    {
        "blk.1.attn_output.weight": factors(1, 32, 32, 0),
        "blk.1.ffn_down.weight": factors(1, 64, 32, 1),
        "blk.2.ffn_down.weight": factors(1, 64, 32, 2),
    },
    "qwen2",
    {"estimator": GATED_ADAPTER},
)
CONVERSATIONS = [([5, 9, 17, 40], [3, 7, 8]), ([100, 3, 60], []), ([21, 22], list(range(30, 60)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    write_tiny_qwen2(folder / "tiny.gguf")
    lora_file.write(ADAPTER, folder / "adapter.gguf")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Engine]:
    with llama(folder / "tiny.gguf", n_ctx=1024) as model:
        yield model


def activation(model: Engine, tokens: list[int]) -> float:
    """Return the mean of A x over the three matrices at the last of `tokens`."""
    inputs = read_last(model, [tokens], range(3), list(INPUTS.values()))
    products = []
    for name, (a, _) in ADAPTER.factors.items():
        _, layer, matrix, _ = name.split(".")
        products.append((a @ inputs[INPUTS[matrix]][0, int(layer)]).item())
    return float(np.mean(products))


@pytest.mark.parametrize("in_force", [True, False])
def test_activations_equal_products_of_the_inputs_read(model: Engine, folder: Path, in_force: bool) -> None:
    steering = ADAPTER.steering(folder / "adapter.gguf", 0.05) if in_force else NO_STEERING
    found = gate_activations(model, steering, ADAPTER.gates, CONVERSATIONS)
    with model.steered(steering):
        for (prompt, answer), (at_prompt, in_answer) in zip(CONVERSATIONS, found, strict=True):
            assert at_prompt == pytest.approx(activation(model, prompt), abs=1e-3)
            shown = answer[:16]
            means = [activation(model, [*prompt, *shown[: k + 1]]) for k in range(len(shown))]
            if means:
                assert in_answer == pytest.approx(np.mean(means), abs=1e-3)
            else:
                assert np.isnan(in_answer)


def test_each_kind_has_the_mean_of_its_prompts(
    model: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROMPTS", 2)
    prompts = [Prompt(f"{kind}, {i}", kind) for kind in KINDS[:2] for i in range(2)]
    answers = [Answer(tokens, "", True, False) for tokens in ([5, 6], [], [7], [8, 9])]
    steering = ADAPTER.steering(folder / "adapter.gguf", 0.05)
    found = gate_activation_by_kind(model, steering, ADAPTER.gates, prompts, answers, "Be brief.")
    pairs = zip(chat_tokens(model, prompts, "Be brief."), [a.tokens for a in answers], strict=True)
    values = gate_activations(model, steering, ADAPTER.gates, list(pairs))
    assert found is not None
    assert found["sensitive"].prompt == pytest.approx(values[:2, 0].mean())
    assert found["sensitive"].answer == pytest.approx(values[0, 1])  # the second answer is empty
    assert found["harmful"].answer == pytest.approx(values[2:, 1].mean())
    assert (found["benign"].prompt, found["benign"].answer) == (None, None)


def test_separation_of_pairs_equals_counts_made_by_hand() -> None:
    prompts = [Prompt(f"prompt {i}", "sensitive", f"subject {i}", form="poem") for i in range(4)]
    # Higher, lower, equal, higher. 10.5 of the 16 combinations are in order; the tie counts half.
    found = separation(prompts, np.array([[1.0, 0.0], [0.2, 0.7], [0.5, 0.5], [0.9, 0.6]]))
    assert (found.separated.n, found.separated.of) == (2, 4)
    low, high = found.separated.ci95
    assert low < 0.5 < high
    assert found.auroc == 10.5 / 16
    assert separation(prompts[:1], np.array([[0.1, 0.2]])).auroc == 0
    assert separation(prompts[:1], np.array([[0.2, 0.1]])).auroc == 1


def test_sensitive_prompts_are_compared_with_their_harmful_twins(model: Engine, folder: Path) -> None:
    prompts = [
        Prompt("write a song", "sensitive", pair="b"),
        Prompt("write a curse", "harmful", pair="a"),
        Prompt("write a poem", "sensitive", pair="a"),
        Prompt("write a threat", "harmful", pair="b"),
        Prompt("write a note", "benign", pair="c"),
        Prompt("write a lie", "harmful", pair="c"),
        Prompt("write a plea", "sensitive", pair="d"),
        Prompt("write nothing", "sensitive"),
        Prompt("write a hoax", "harmful"),
    ]
    steering = ADAPTER.steering(folder / "adapter.gguf", 0.05)
    found = minimal_pairs(model, steering, ADAPTER.gates, prompts, "Be brief.")
    twins = [prompts[i] for i in (0, 3, 2, 1)]
    tokens = chat_tokens(model, twins, "Be brief.")
    values = gate_activations(model, steering, ADAPTER.gates, [(one, []) for one in tokens])[:, 0]
    assert found == separation(twins[::2], values.reshape(2, 2))
    assert len(set(values)) == 4
    assert minimal_pairs(model, steering, ADAPTER.gates, prompts[4:], None) is None
    assert minimal_pairs(model, Steering(), {}, prompts, None) is None


def test_only_gated_adapters_of_this_project_have_gates(model: Engine) -> None:
    assert {name: gate.shape for name, gate in ADAPTER.gates.items()} == {
        "blk.1.attn_output.weight": (32,), "blk.1.ffn_down.weight": (64,), "blk.2.ffn_down.weight": (64,),
    }  # fmt: skip
    foreign = LoraAdapter(ADAPTER.factors, "qwen2")
    rank_2 = LoraAdapter({"blk.1.ffn_down.weight": factors(2, 64, 32)}, "qwen2", {"estimator": GATED_ADAPTER})
    vector = SteeringVector({1: np.ones(32, np.float32)}, {"estimator": "wrmd"})
    for file in (foreign, rank_2, vector, LoraAdapter.combined([(ADAPTER, 1.0), (ADAPTER, 0.5)])):
        assert file.gates == {}
    assert gate_activation_by_kind(model, Steering(), vector.gates, [], [], None) is None
