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

# What explicit refusals begin with, in twelve languages.
REFUSAL_PHRASES = (
    "sorry", "i can't", "i cannot", "i'm unable", "i am unable", "i won't", "as an ai", "not able to",
    "抱歉", "对不起", "无法", "不能回答", "作为一个人工智能", "作为ai",
    "lo siento", "no puedo", "désolé", "je ne peux pas", "es tut mir leid", "ich kann nicht",
    "извините", "не могу", "desculpe", "não posso", "mi dispiace", "non posso",
    "申し訳", "できません", "죄송", "عذرا", "آسف", "üzgünüm",
)  # fmt: skip
# How a trace decides to refuse. In a trace, the phrases above may stand anywhere.
_DECISIONS = (
    *(f"{verb} refuse" for verb in ("should", "must", "need to", "have to", "will")),
    *(f"{verb} decline" for verb in ("should", "must", "need to", "have to", "will")),
    "应该拒绝",
    "必须拒绝",
    "需要拒绝",
)


def opens_with_refusal(text: str) -> bool:
    """Tell whether the first 120 characters of a text hold one of `REFUSAL_PHRASES`."""
    opening = text.strip().lower().replace("’", "'")[:120]
    return any(phrase in opening for phrase in REFUSAL_PHRASES)


def mentions_refusal(trace: str) -> bool:
    """Tell whether a thinking trace has a phrase of refusal anywhere. It may still decide to answer."""
    text = trace.lower().replace("’", "'")
    return any(phrase in text for phrase in (*REFUSAL_PHRASES, *_DECISIONS))


def turn_ends(vocabulary: Mapping[str, int]) -> set[int]:
    """Return the tokens of a vocabulary whose text ends a turn."""
    # In the formats of gpt-oss and Solar Open, `<|end|>` only ends a channel, such as the thinking trace.
    channels = "<|return|>" in vocabulary or "<|flush|>" in vocabulary
    return {
        vocabulary[text] for text in TURN_ENDS if text in vocabulary and not (channels and text == "<|end|>")
    }
