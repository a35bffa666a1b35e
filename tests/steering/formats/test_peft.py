"""PEFT folders: PEFT has the same effect with them as llama.cpp with the GGUF file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers
from fixtures.adapters import PROMPTS, factors, llama_logits, random_adapter
from fixtures.tiny_gguf import write_tiny_qwen2
from safetensors import safe_open

from rs_gguf.errors import InputError, VerificationError
from rs_gguf.models import sources
from rs_gguf.steering import container as gguf_file
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.formats import peft as peft_export
from rs_gguf.steering.lora import LoraAdapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.Qwen2ForCausalLM]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return path, write_tiny_qwen2(path)


def apply(network: transformers.PreTrainedModel, folder: Path) -> None:
    """Let PEFT load the folder and merge its changes; its warnings, for example about keys, are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it imports an old name from transformers
        steered = peft.PeftModel.from_pretrained(network, str(folder))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(
            peft.get_peft_model_state_dict(steered)
        )  # PEFT ignores extra keys silently
    steered.merge_and_unload()


def torch_logits(network: transformers.PreTrainedModel) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.stack([network(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])


@pytest.mark.slow
def test_the_effect_equals_that_in_llama_cpp(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    model, _ = tiny
    adapter = random_adapter()  # its ranks are 1 and 2; PEFT has a single r
    lora.write(adapter, tmp_path / "a.gguf")
    tiny[1].save_pretrained(tmp_path / "model")
    peft_export.export(adapter, str(tmp_path / "model"), tmp_path / "peft")
    steered = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain = torch_logits(steered)
    apply(steered, tmp_path / "peft")
    assert np.abs(torch_logits(steered) - plain).max() > 0.1
    np.testing.assert_allclose(torch_logits(steered), llama_logits(model, tmp_path / "a.gguf"), atol=1e-3)


def test_a_gguf_file_gives_the_same_modules_as_the_folder(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    adapter = LoraAdapter(random_adapter().factors, "qwen2", {"strength": 0.5, "method": "gate"})
    tiny[1].save_pretrained(tmp_path / "model")
    peft_export.export(adapter, str(tmp_path / "model"), tmp_path / "a")
    peft_export.export(adapter, str(tiny[0]), tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        assert json.loads(file.metadata()["rs_gguf"]) == {"method": "gate", "strength": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        peft_export.export(adapter, "~/model", tmp_path / "a")
    # A local path would be useless on other machines.
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_only_the_configuration_of_a_repository_is_downloaded(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny[1].config.save_pretrained(tmp_path)
    downloads: list[str] = []

    def download(repository: str, file: str, folder: Path | None) -> Path:
        downloads.append(f"{repository}/{file}")
        return tmp_path / file

    monkeypatch.setattr(sources, "hub_download", download)
    peft_export.export(random_adapter(), "owner/name", tmp_path / "peft")
    assert downloads == ["owner/name/config.json"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"


DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA = transformers.LlamaConfig(**DENSE)
FALCON = transformers.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LFM2 = transformers.Lfm2Config(**DENSE, layer_types=["conv", "full_attention"])
MOE = transformers.Qwen3MoeConfig(**DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
TOWERS = transformers.Gemma3Config(
    text_config=DENSE,
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
)
GPT2 = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)


@pytest.mark.parametrize(
    ("config", "family", "modules"),
    [
        (LLAMA, "llama", ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")),
        (FALCON, "falcon", ("transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h")),
        (
            transformers.Starcoder2Config(**DENSE),
            "starcoder2",
            ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.c_proj"),
        ),
        (LFM2, "lfm2", ("model.layers.1.self_attn.out_proj", "model.layers.1.feed_forward.w2")),
        (MOE, "qwen3moe", ("model.layers.1.self_attn.o_proj",)),
        (  # with a vision tower
            TOWERS,
            "gemma3",
            (
                "model.language_model.layers.1.self_attn.o_proj",
                "model.language_model.layers.1.mlp.down_proj",
            ),
        ),
        # llama.cpp's name of this family does not follow from transformers' name.
        (
            transformers.HunYuanDenseV1Config(**DENSE),
            "hunyuan-dense",
            ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_have_the_names_of_the_family(
    tmp_path: Path, config: transformers.PretrainedConfig, family: str, modules: tuple[str, ...]
) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)  # weights are not needed
    matrices = {}
    for matrix, module in zip(("attn_output", "ffn_down"), modules, strict=False):
        linear = model.get_submodule(module)
        matrices[f"blk.1.{matrix}.weight"] = factors(1, linear.in_features, linear.out_features)
    peft_export.export(LoraAdapter(matrices, family), str(tmp_path), tmp_path / "peft")
    before = [model.get_submodule(module).weight.detach().clone() for module in modules]
    apply(model, tmp_path / "peft")
    for weight, module, (a, b) in zip(before, modules, matrices.values(), strict=True):
        np.testing.assert_allclose(
            (model.get_submodule(module).weight - weight).detach().numpy(), b @ a, atol=1e-5
        )


OUT = "blk.1.attn_output.weight"


@pytest.mark.parametrize(
    ("adapter", "config", "message"),
    [
        (LoraAdapter({OUT: factors(1, 32, 64)}, "llama"), LLAMA, "belongs to another model"),
        (LoraAdapter({OUT: factors(1, 64, 64)}, "qwen2"), LLAMA, "for 'qwen2'.*is 'llama'"),
        (LoraAdapter({OUT: factors(1, 64, 64)}, "novel"), LLAMA, "for 'novel'"),
        (
            LoraAdapter({"blk.2.ffn_down.weight": factors(1, 96, 64)}, "llama"),
            LLAMA,
            r"blk.2.ffn_down.weight: .*no linear layer",
        ),
        # llama.cpp orders the rows of this matrix differently from PyTorch.
        (
            LoraAdapter({"blk.1.attn_q.weight": factors(1, 64, 64)}, "llama"),
            LLAMA,
            "only attn_output and ffn_down can be exported",
        ),
        (LoraAdapter({OUT: factors(1, 64, 64)}, "gpt2"), GPT2, "no linear layer"),
        (LoraAdapter({OUT: factors(1, 64, 64)}, "llama"), None, "exactly one GGUF model or a config"),
    ],
)
def test_an_adapter_that_cannot_be_exported_is_refused(
    tmp_path: Path, adapter: LoraAdapter, config: transformers.PretrainedConfig | None, message: str
) -> None:
    if config is not None:
        config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        peft_export.export(adapter, str(tmp_path), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_configuration_that_transformers_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}')
    mark = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w').close()")
    with pytest.raises(InputError, match="cannot read the configuration"):
        peft_export.export(random_adapter(), str(tmp_path), tmp_path / "peft")
    assert not mark.exists()


def test_a_folder_that_cannot_be_written(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "peft").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        peft_export.export(random_adapter(), str(tiny[0]), tmp_path / "peft")


def test_written_files_are_read_back(
    tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(peft_export, "load", lambda _: {})
        with pytest.raises(VerificationError, match="round trip"):
            peft_export.export(random_adapter(), str(tiny[0]), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    monkeypatch.setattr(gguf_file, "write_atomic", lambda path, _: path.write_bytes(b""))
    with pytest.raises(VerificationError, match="other bytes"):
        peft_export.export(random_adapter(), str(tiny[0]), tmp_path)
