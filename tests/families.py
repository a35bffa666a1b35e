"""Tiny random networks of the families that users run, and the GGUF files that llama.cpp makes of them.

The name of a case goes in; the network in PyTorch comes out, or a file with its weights in F32 from the
converter in llama.cpp's own source (of `binaries`). All share one byte-level vocabulary: only the weights
matter here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import binaries
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_gguf import byte_level

N_LAYER, WIDTH = 4, 64
VOCABULARY = ["<|endoftext|>", "<|im_end|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
_COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # wide, so that every block matters
    "tie_word_embeddings": False,
}
_DENSE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = {"sliding_window": 4}  # shorter than the prompts

# GELU is a table of F16 values in llama.cpp: smaller weights keep what it rounds off small.
_SMALL = {"initializer_range": 0.02}
_GELU = {**_DENSE, **_SMALL}
_TIED = {"tie_word_embeddings": True}
# Attention that keeps what all heads share.
_LATENT = {
    **_DENSE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip

# Each name is what a user would call the family; the architecture is llama.cpp's own word in the file.
CASES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "Llama": lambda: transformers.LlamaConfig(**_DENSE),
    "Mistral": lambda: transformers.MistralConfig(**_DENSE, sliding_window=None),
    "Mixtral": lambda: transformers.MixtralConfig(**_DENSE, num_local_experts=4, sliding_window=None),
    "Qwen2": lambda: transformers.Qwen2Config(**_DENSE),
    "Qwen2-MoE": lambda: transformers.Qwen2MoeConfig(
        **_DENSE, **_EXPERTS, shared_expert_intermediate_size=32
    ),
    "Qwen3": lambda: transformers.Qwen3Config(**_DENSE),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeConfig(**_DENSE, **_EXPERTS, norm_topk_prob=True),
    "Qwen3-Next": lambda: transformers.Qwen3NextConfig(
        **_DENSE,
        **_EXPERTS,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "Gemma 2": lambda: transformers.Gemma2Config(**_GELU | _TIED, **_SLIDING, query_pre_attn_scalar=16),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**_GELU | _TIED, **_SLIDING, query_pre_attn_scalar=16),
    "Gemma 4": lambda: transformers.Gemma4TextConfig(
        **_GELU | _TIED | {"initializer_range": 0.01},
        **_SLIDING,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=len(VOCABULARY),
    ),
    "Phi-3": lambda: transformers.Phi3Config(**_DENSE, original_max_position_embeddings=128),
    "OLMo 2": lambda: transformers.Olmo2Config(**_DENSE),
    "Granite": lambda: transformers.GraniteConfig(
        **_DENSE,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "Falcon": lambda: transformers.FalconConfig(
        **_COMMON | _SMALL,
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYER,
        num_attention_heads=4,
        num_kv_heads=1,
        multi_query=True,
    ),
    "GPT-OSS": lambda: transformers.GptOssConfig(
        **_DENSE,
        **_SLIDING,
        # YaRN's interpolation differs between the two by itself (3e-2 here), steered or not.
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "SmolLM3": lambda: transformers.SmolLM3Config(**_DENSE),
    "Command R7B": lambda: transformers.Cohere2Config(
        **_DENSE | _TIED, **_SLIDING, rotary_pct=1.0, logit_scale=0.5
    ),
    "GLM-4": lambda: transformers.Glm4Config(**_DENSE),
    "EXAONE 4": lambda: transformers.Exaone4Config(
        **_DENSE, sliding_window=None, layer_types=["full_attention"] * N_LAYER
    ),
    "StableLM": lambda: transformers.StableLmConfig(**_DENSE),
    "StarCoder 2": lambda: transformers.Starcoder2Config(**_GELU, sliding_window=None),
    "Nemotron": lambda: transformers.NemotronConfig(**_DENSE),
    "GPT-2": lambda: transformers.GPT2Config(
        **_COMMON | _SMALL, n_embd=WIDTH, n_layer=N_LAYER, n_head=4, n_positions=128, n_ctx=128
    ),
    "ERNIE 4.5": lambda: transformers.Ernie4_5Config(**_DENSE),
    "Hunyuan": lambda: transformers.HunYuanDenseV1Config(**_DENSE),
    "LFM2": lambda: transformers.Lfm2Config(**_DENSE, layer_types=["conv", "full_attention"] * 2),
    "DeepSeek-V2": lambda: transformers.DeepseekV2Config(
        **_LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "MiniCPM3": lambda: transformers.MiniCPM3Config(**_LATENT),
    "Hy4": lambda: transformers.HYV4Config(
        **_LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        index_head_dim=16,
        index_n_heads=2,
        index_topk=128,
    ),
}
# Neither engine can read what its blocks put out: four streams instead of one.
STREAMS = "Gemma 3n"
_STREAMS = transformers.Gemma3nTextConfig(
    **_GELU | _TIED | {"intermediate_size": [96] * N_LAYER},
    **_SLIDING,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * N_LAYER,
    vocab_size_per_layer_input=len(VOCABULARY),
    hidden_size_per_layer_input=256,
    laurel_rank=64,
    num_kv_shared_layers=0,
)

# The converter's own recognition of tokenizers knows published ones only, and some families insist on a
# SentencePiece file. What it does with weights and hyperparameters is left as it is.
_CONVERT = """
import json, sys
from pathlib import Path
tree, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, tree)
import convert_hf_to_gguf as converter
from conversion import TextModel, get_model_class
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for folder, file in jobs:
    config = json.loads((Path(folder) / "config.json").read_text())
    model = get_model_class(config["architectures"][0])
    model.set_vocab = TextModel._set_vocab_gpt2
    draft = ["--no-mtp"] if getattr(model, "supports_mtp_export", False) else []
    sys.argv = ["convert", folder, *draft, "--outtype", "f32", "--outfile", file]
    converter.main()
"""


def network(name: str) -> transformers.PreTrainedModel:
    """The random network of a case, F32, in evaluation mode: the same weights at every call."""
    torch.manual_seed(3)
    config = _STREAMS if name == STREAMS else CASES[name]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms of 1 and biases of 0 would hide a converter's slip
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def write_gguf(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Convert the networks of these cases; the GGUF file of each, in `folder`."""
    files = {name: folder / f"{name.replace(' ', '-').lower()}.gguf" for name in names}
    jobs = []
    for name, file in files.items():
        source = file.with_suffix("")
        network(name).save_pretrained(source)
        _undo_misnaming(source / "model.safetensors")
        _write_tokenizer(source)
        jobs.append((str(source), str(file)))
    command = [sys.executable, "-c", _CONVERT, str(binaries.source()), json.dumps(jobs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stdout[-3000:]}")
    return files


def _undo_misnaming(weights: Path) -> None:
    """transformers saves some of Hy4's matrices under other names than those they were published with."""
    tensors = load_file(weights)
    for pattern, published in (
        (r"\.hc_pre\.(hc_head|hc_attn_layer|hc_mlp_layer)\.", r".\1."),
        (r"\.(hc_attn_layer|hc_mlp_layer)\.", r".\1.hc_pre."),
        (r"\.mlp\.(shared_experts\.)?linear_gate\.", r".mlp.\1gate_proj."),
    ):
        tensors = {re.sub(pattern, published, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    tokenizer = byte_level(VOCABULARY, ["Ġ t"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=VOCABULARY[0], eos_token=VOCABULARY[1], pad_token=VOCABULARY[0]
    ).save_pretrained(folder)
