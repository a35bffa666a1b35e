"""The decoder layers of a network. Their hooks: see `test_engine` and `test_vector`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from fixtures.networks import CONFIGS, DENSE, PROMPTS, WIDTH, build

from rs_gguf.engines.pytorch.weights import decoder_layers
from rs_gguf.errors import InputError


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_the_layers(name: str) -> None:
    model = build(name)
    layers = decoder_layers(model)
    assert len(layers) == 3
    assert decoder_layers(model.base_model) == layers
    # Layer N turns entry N of the hidden states into entry N + 1 (the last entry is after the final norm).
    outputs: list[torch.Tensor] = []
    handle = layers[1].register_forward_hook(
        lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        states = model(PROMPTS, output_hidden_states=True).hidden_states
    handle.remove()
    torch.testing.assert_close(outputs[0], states[2], rtol=0, atol=0)


def test_finds_the_text_layers_of_a_model_with_an_equally_deep_vision_tower() -> None:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=DENSE, vision_config=vision)
    layers = decoder_layers(transformers.AutoModelForImageTextToText.from_config(config))
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 3


def test_refuses_a_module_that_is_not_a_transformers_model() -> None:
    with pytest.raises(InputError, match="no transformers configuration"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_refuses_two_candidate_lists() -> None:
    class Twins(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
            self.left = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
            self.right = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

    with pytest.raises(InputError, match=r"\['left', 'right'\]"):
        decoder_layers(Twins())
