"""A tiny random qwen2 model, as a GGUF file in F32 and as the same weights in PyTorch.

The file is complete: llama.cpp and transformers both load it, tokenizer and chat template included.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the byte-level alphabet, where "Ġ" is the space. Each pair's halves exist before it.
_MERGES = [
    "Ġ t",
    "h e",
    "Ġt he",
    "i n",
    "e r",
    "Ġ a",
    "Ġ w",
    "o u",
    "Ġ o",
    "o n",
    "in g",
    "a n",
    "Ġ s",
    "r e",
]


def write_tiny_qwen2(
    path: Path, *, n_layer: int = 3, n_embd: int = 32, seed: int = 0
) -> transformers.Qwen2ForCausalLM:
    """Write the GGUF file and return the model in PyTorch, F32, in evaluation mode.

    `n_embd` is a multiple of 16: heads are 8 wide, two share their keys and values. Every byte is a token, so
    any text can be tokenised. The weights are large for their kind, so that logits spread over several units
    and every block matters.
    """
    vocabulary = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in _MERGES] + SPECIALS
    config = transformers.Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=n_embd,
        intermediate_size=2 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_embd // 8,
        num_key_value_heads=n_embd // 16,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary.index("<|im_end|>"),
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # zero by default, where a converter's slip would not show
                weight.normal_(std=0.2)

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    control = [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in vocabulary]
    writer.add_token_types(control)
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(vocabulary.index("<|endoftext|>"))
    writer.add_eos_token_id(vocabulary.index("<|im_end|>"))
    writer.add_pad_token_id(vocabulary.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, n_layer)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
