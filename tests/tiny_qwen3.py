"""Tiny random qwen3 models as GGUF files in F32, dense or with experts, with tokens that they like to say.

A path and what is wanted go in; a file that llama.cpp loads comes out, chat template included. Every byte is
a token, and so are the marks of a thinking trace and the words that a test asks for. `liked` gives logits
that are added, more or less, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers.pre_tokenizers import ByteLevel

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINKING = ["<think>", "</think>"]
# As the templates of models that always think: the generation prompt opens the trace.
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
_HEADS, _HEAD = 4, 8


def write_tiny_qwen3(
    path: Path,
    template: str,
    *,
    experts: int = 0,
    liked: Mapping[str, float] | None = None,
    n_layer: int = 4,
    width: int = 32,
    inner: int = 48,
    shift: float = 16.0,
    n_ctx: int = 2048,
    seed: int = 0,
) -> None:
    """Write the file. With `experts`, each block has so many, of which two are used: then it is qwen3moe.

    `shift` is the length of the embeddings' common part, which the liked tokens' logits come from: the longer
    it is, the more they are liked everywhere, and the less depends on what was said before.
    """
    liked = liked or {}
    letters = sorted(ByteLevel.alphabet())
    words = [token for token in liked if token not in (*letters, *CONTROL, *THINKING)]
    vocabulary = [*letters, "Ġt", *words, *THINKING, *CONTROL]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "qwen3")

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, _normal(rng, *shape) * np.float32(1 / np.sqrt(shape[-1])))

    def add_norm(name: str, size: int) -> None:
        writer.add_tensor(name, 1 + _normal(rng, size) / np.float32(8))

    writer.add_context_length(n_ctx)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS // 2)
    writer.add_key_length(_HEAD)
    writer.add_value_length(_HEAD)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(inner)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    kinds = dict.fromkeys(CONTROL, gguf.TokenType.CONTROL)
    # Published models keep these marks in their text, as tokens of the users' own.
    kinds |= dict.fromkeys((*words, *THINKING), gguf.TokenType.USER_DEFINED)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in vocabulary])
    writer.add_token_merges(["Ġ t"])  # llama.cpp wants one at least
    writer.add_eos_token_id(vocabulary.index("<|im_end|>"))
    writer.add_pad_token_id(vocabulary.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)

    common = _normal(rng, width)
    common /= np.linalg.norm(common)
    embeddings, output = _normal(rng, len(vocabulary), width), _normal(rng, len(vocabulary), width)
    output /= np.float32(np.sqrt(width))
    embeddings += common * np.float32(shift)
    for token, logit in liked.items():
        # After the last norm a row is √D long, and most of it lies in the common part.
        output[vocabulary.index(token)] += common * np.float32(logit / np.sqrt(width))
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for block in (f"blk.{n}" for n in range(n_layer)):
        for name, size in (("attn", width), ("ffn", width), ("attn_q", _HEAD), ("attn_k", _HEAD)):
            add_norm(f"{block}.{name}_norm.weight", size)
        add(f"{block}.attn_q.weight", _HEADS * _HEAD, width)
        add(f"{block}.attn_k.weight", _HEADS // 2 * _HEAD, width)
        add(f"{block}.attn_v.weight", _HEADS // 2 * _HEAD, width)
        add(f"{block}.attn_output.weight", width, _HEADS * _HEAD)
        suffix, many = ("_exps", [experts]) if experts else ("", [])
        if experts:
            add(f"{block}.ffn_gate_inp.weight", experts, width)
        add(f"{block}.ffn_gate{suffix}.weight", *many, inner, width)
        add(f"{block}.ffn_up{suffix}.weight", *many, inner, width)
        add(f"{block}.ffn_down{suffix}.weight", *many, width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _normal(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)
