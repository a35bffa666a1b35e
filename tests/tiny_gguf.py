"""A tiny random qwen2 model: a GGUF file in F32, a Hugging Face folder, and the same weights in PyTorch.

File and folder are complete: llama.cpp and transformers load them, tokenizer and chat template included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import tokenizers
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
_VOCABULARY = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in _MERGES] + SPECIALS


def tiny_qwen2(*, n_layer: int = 3, n_embd: int = 32, seed: int = 0) -> transformers.Qwen2ForCausalLM:
    """The model in PyTorch, F32, in evaluation mode.

    `n_embd` is a multiple of 16: heads are 8 wide, two share their keys and values. Every byte is a token, so
    any text can be tokenised. The weights are large for their kind, so that logits spread over several units
    and every block matters.
    """
    config = transformers.Qwen2Config(
        vocab_size=len(_VOCABULARY),
        hidden_size=n_embd,
        intermediate_size=2 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_embd // 8,
        num_key_value_heads=n_embd // 16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_VOCABULARY.index("<|im_end|>"),
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # zero by default, where a converter's slip would not show
                weight.normal_(std=0.2)
    return model


def byte_level(vocabulary: Sequence[str], merges: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer of bytes, and of what `merges` make of them, "left right" each as in a GGUF file."""
    pairs = [(left, right) for left, right in map(str.split, merges)]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=numbers, merges=pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def write_tiny_folder(folder: Path) -> None:
    """Write the model as a Hugging Face folder."""
    tiny_qwen2().save_pretrained(folder)
    tokenizer = byte_level(_VOCABULARY, _MERGES)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_tiny_qwen2(
    path: Path, *, n_layer: int = 3, n_embd: int = 32, seed: int = 0
) -> transformers.Qwen2ForCausalLM:
    """Write `tiny_qwen2` as a GGUF file, and return it."""
    model = tiny_qwen2(n_layer=n_layer, n_embd=n_embd, seed=seed)
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(_VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(_VOCABULARY)
    control = [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in _VOCABULARY]
    writer.add_token_types(control)
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(_VOCABULARY.index("<|endoftext|>"))
    writer.add_eos_token_id(_VOCABULARY.index("<|im_end|>"))
    writer.add_pad_token_id(_VOCABULARY.index("<|endoftext|>"))
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
