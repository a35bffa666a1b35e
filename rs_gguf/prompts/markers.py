"""Every marker that models write in their text: around thinking traces and answers, and after turns."""

from __future__ import annotations

from collections.abc import Mapping

# (start, end) of a thinking trace. The end marker may also start an answer that has no trace.
THINKING_MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("<think:opensource>", "</think:opensource>"),  # Hy3
    ("[THINK]", "[/THINK]"),  # Mistral
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|open|>think<|sep|>", "<|open|>response<|sep|>"),  # Kimi K3
    ("to=self<|message|>", "to=user<|message|>"),  # Muse
    ("<|think|>", "<|content|>"),  # Solar Open
)
# Markers that some models write around the answer. Gemma 4 may start another trace after it.
ANSWER_STARTS = ("<|START_TEXT|>", "<|START_RESPONSE|>")
ANSWER_ENDS = (
    "<|END_TEXT|>", "<|END_RESPONSE|>", "[END FINAL RESPONSE]", "<|channel>", "<|close|>response<|sep|>",
    "<|end|>",
)  # fmt: skip
# Control tokens that end a turn whatever the model's configuration says. llama.cpp does the same.
TURN_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<end_of_utterance>",
)


def turn_ends(vocabulary: Mapping[str, int]) -> set[int]:
    """Return the tokens of a vocabulary whose text ends a turn."""
    # In the formats of gpt-oss and Solar Open, `<|end|>` only ends a channel, such as the thinking trace.
    channels = "<|return|>" in vocabulary or "<|flush|>" in vocabulary
    return {
        vocabulary[text] for text in TURN_ENDS if text in vocabulary and not (channels and text == "<|end|>")
    }
