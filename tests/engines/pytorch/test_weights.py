"""Which modules of a network are its decoder blocks; hooks at them: see `test_engine` and `test_vector`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from fixtures.networks import CONFIGS, DENSE, PROMPTS, WIDTH, build

from rs_gguf.engines.pytorch.weights import decoder_blocks
from rs_gguf.errors import InputError


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_the_blocks(name: str) -> None:
    model = build(name)
    blocks = decoder_blocks(model)
    assert len(blocks) == 3
    assert decoder_blocks(model.base_model) == blocks
    # Block N turns entry N of the hidden states into entry N + 1 (the last entry is after the final norm).
    seen: list[torch.Tensor] = []
    handle = blocks[1].register_forward_hook(
        lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        states = model(PROMPTS, output_hidden_states=True).hidden_states
    handle.remove()
    torch.testing.assert_close(seen[0], states[2], rtol=0, atol=0)


def test_finds_the_text_blocks_of_a_model_with_a_vision_tower_as_deep() -> None:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=DENSE, vision_config=vision)
    blocks = decoder_blocks(transformers.AutoModelForImageTextToText.from_config(config))
    assert [type(block).__name__ for block in blocks] == ["Gemma3DecoderLayer"] * 3


def test_refuses_what_is_no_transformers_model() -> None:
    with pytest.raises(InputError, match="no transformers configuration"):
        decoder_blocks(torch.nn.Linear(2, 2))


def test_refuses_two_candidate_lists() -> None:
    class Twins(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
            self.left = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
            self.right = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

    with pytest.raises(InputError, match=r"\['left', 'right'\]"):
        decoder_blocks(Twins())
