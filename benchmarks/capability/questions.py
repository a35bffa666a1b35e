"""Write the prompts of `gsm8k.jsonl` and `mmlu.jsonl`, for lm-evaluation-harness and Inspect alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Two examples keep the answers short: small models explain at length otherwise.
_EXAMPLES = """\
Answer the last question in the same way.

Question: A tailor has 50 buttons. He sews 6 of them on each of 7 shirts. How many buttons are left?
Answer: 6 × 7 = 42
50 − 42 = 8
#### 8

Question: Vera earns 12 dollars an hour and works 5 hours on 3 days. How many dollars does she earn?
Answer: 5 × 3 = 15
12 × 15 = 180
#### 180
"""


def word_problem(row: Mapping[str, Any]) -> str:
    """Return the prompt of a word problem, with two examples."""
    return f"{_EXAMPLES}\nQuestion: {row['question']}\nAnswer:"


def multiple_choice(row: Mapping[str, Any]) -> str:
    """Return the prompt of a question with four choices."""
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}\n{choices}\nAnswer with the letter only."
