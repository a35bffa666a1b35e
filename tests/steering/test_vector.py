"""SteeringVector: the values it accepts, and that `apply` equals adding the direction to a bias."""

# mypy: disable-error-code="dict-item"
# Some rows are lists or float64 arrays; the constructors convert them.
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.networks import PROMPTS, WIDTH, build

from rs_gguf.engines.pytorch.weights import decoder_layers
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import MAX_LAYERS
from rs_gguf.steering.vector import SteeringVector


def vector(*layers: int, width: int = WIDTH, seed: int = 0) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector({layer: rng.standard_normal(width).astype(np.float32) for layer in layers})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(PROMPTS).logits
    return found


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize(
    ("name", "bias"),
    [("llama", "model.layers.{}.mlp.down_proj.bias"), ("gpt2", "transformer.h.{}.mlp.c_proj.bias")],
)
def test_apply_equals_a_change_of_the_layers_last_bias(name: str, bias: str, scale: float) -> None:
    """The reference is the model's arithmetic: the layer's last addition gets the same constant."""
    model, steering = build(name), vector(1, 2)
    plain = logits(model)
    with steering.apply(model, scale):
        steered = logits(model)
    for layer, row in steering.directions.items():
        model.get_parameter(bias.format(layer)).data += scale * torch.from_numpy(row.copy())
    torch.testing.assert_close(steered, logits(model), rtol=1e-5, atol=1e-5)
    assert (steered - plain).abs().max() > 0.01


def test_cached_generation_is_steered_like_whole_passes() -> None:
    model, steering = build("llama"), vector(2)
    with steering.apply(model):
        scores = [
            torch.stack(
                model.generate(
                    PROMPTS,
                    attention_mask=torch.ones_like(PROMPTS),
                    do_sample=False,
                    min_new_tokens=5,
                    max_new_tokens=5,
                    use_cache=use_cache,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits
            )
            for use_cache in (True, False)
        ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_restores_the_model_and_adds_up_when_nested() -> None:
    model, one, two = build("llama"), vector(1), vector(1, 2, seed=1)
    plain = logits(model)
    with one.apply(model), two.apply(model, -1.0):
        nested = logits(model)
    summed = SteeringVector(
        {1: one.directions[1] - two.directions[1], 2: -two.directions[2]},
    )
    with summed.apply(model):
        torch.testing.assert_close(logits(model), nested, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), plain)
    assert hook_count(model) == 0


def test_hooks_are_removed_when_the_with_statement_raises() -> None:
    model = build("llama")
    with pytest.raises(RuntimeError, match="2 hooks inside"), vector(1, 2).apply(model):
        raise RuntimeError(f"{hook_count(model)} hooks inside")
    assert hook_count(model) == 0


def test_hooks_are_removed_when_attaching_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")

    def refuse(_hook: Any) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(decoder_layers(model)[2], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"), vector(1, 2).apply(model):
        pytest.fail("the block must not run")
    assert hook_count(model) == 0


class Tuples(torch.nn.Module):
    """Layers that return a tuple, as in older versions of transformers."""

    class Block(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
            return 2 * hidden, "cache"

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2, hidden_size=4)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.blocks = torch.nn.ModuleList([self.Block(), self.Block()])

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
        for block in self.blocks:
            hidden, rest = block(hidden)
        return hidden, rest


def test_keeps_the_rest_of_a_tuple_and_the_models_dtype() -> None:
    steering, model = SteeringVector({1: [1.0, 2.0, 3.0, 4.0]}), Tuples()
    with steering.apply(model, 0.5):
        hidden, rest = model(torch.ones(1, 2, 4, dtype=torch.bfloat16))
    assert rest == "cache"
    assert hidden.dtype is torch.bfloat16
    assert hidden[0].tolist() == [[4.5, 5.0, 5.5, 6.0]] * 2


def test_a_vector_for_another_model_is_refused_before_any_change() -> None:
    model = build("llama")
    with pytest.raises(InputError, match=r"layers \[3\].*layers 0 to 2"), vector(2, 3).apply(model):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match=r"width 16.*width 32"), vector(1, width=16).apply(model):
        pytest.fail("the block must not run")
    for scale in (float("nan"), 1e39):
        with pytest.raises(InputError, match="finite number"), vector(1).apply(model, scale):
            pytest.fail("the block must not run")
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "no direction"),
        ({0: [1.0]}, "layer 0 cannot be steered"),
        ({-1: [1.0]}, "layer -1 cannot be steered"),
        ({True: [1.0]}, "layer True cannot be steered"),
        ({1.0: [1.0]}, r"layer 1\.0 cannot be steered"),
        ({MAX_LAYERS: [1.0]}, "layer 512 cannot be steered"),
        ({1: [[1.0]]}, r"shape \(1, 1\)"),
        ({1: []}, r"shape \(0,\)"),
        ({1: ["x"]}, "layer 1 is not an array of numbers"),
        ({1: [[1.0], [1.0, 2.0]]}, "layer 1 is not an array of numbers"),
        ({1: [1.0, float("nan"), float("inf")]}, "2 values that are NaN"),
        ({1: [1e300]}, "beyond float32"),
        ({1: [1.0], 2: [1.0, 2.0]}, r"widths \[1, 2\]"),
    ],
)
def test_refuses_bad_directions(directions: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SteeringVector(directions)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"a key": 1}, "not a dotted name"),
        ({"a..b": 1}, "not a dotted name"),
        ({"a": float("inf")}, "no finite value"),
        ({"a": 2**63}, "beyond 64 bits"),
        ({"a": []}, "at least one"),
        ({"a": [1, 2.0]}, "one type"),
        ({"a": None}, "NoneType"),
        ({"a": [[1]]}, "type list"),
        ({"a": "\ud800"}, "not valid Unicode"),
    ],
)
def test_refuses_bad_provenance(provenance: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SteeringVector({1: [1.0]}, provenance)


def test_a_vector_is_a_sorted_read_only_copy() -> None:
    row = np.array([3.0, 4.0])
    steering = SteeringVector({np.int64(9): row, 2: row * 2}, {"b": 1, "a": [True]})
    row[0] = 99.0
    assert steering.layers == [2, 9]
    assert steering.norms == {2: 10.0, 9: 5.0}
    assert list(steering.provenance) == ["a", "b"]
    assert steering.directions[9].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        steering.directions[9][0] = 1.0


def test_takes_numpy_scalars_as_provenance() -> None:
    provenance: dict[str, Any] = {
        "drift": np.float64(0.5),
        "layers": [np.int32(1), np.int64(2)],
        "on": np.bool_(True),
    }
    steering = SteeringVector({1: [1.0]}, provenance)
    assert steering == SteeringVector({1: [1.0]}, {"drift": 0.5, "layers": [1, 2], "on": True})


def test_equality_compares_values_types_and_architecture() -> None:
    base = SteeringVector({1: [1.0]}, {"n": 1}, "qwen2")
    assert base == SteeringVector({1: [1.0]}, {"n": 1}, "qwen2")
    assert base != SteeringVector({1: [2.0]}, {"n": 1}, "qwen2")
    assert base != SteeringVector({2: [1.0]}, {"n": 1}, "qwen2")
    assert base != SteeringVector({1: [1.0]}, {"n": 1.0}, "qwen2")
    assert base != SteeringVector({1: [1.0]}, {"n": True}, "qwen2")
    assert base != SteeringVector({1: [1.0]}, {"n": 1}, "llama")
    assert base != "qwen2"


def test_scaled_multiplies_in_float32_and_records_the_factor() -> None:
    steering = vector(1, 2).scaled(0.1).scaled(-3)
    expected = vector(1, 2).directions[2] * np.float32(0.1) * np.float32(-3)
    assert np.array_equal(steering.directions[2], expected)
    assert steering.provenance["scaled_by"] == pytest.approx(-0.3)
    with pytest.raises(InputError, match="beyond float32"):
        SteeringVector({1: [2.0]}).scaled(3e38)
    for scale in (1e39, float("inf")):
        with pytest.raises(InputError, match="finite number"):
            vector(1).scaled(scale)
