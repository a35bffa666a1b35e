"""Check answers against the instructions of `ifeval.jsonl`, for lm-evaluation-harness and Inspect alike.

The rows have IFEval's format, and the identifiers of the instructions are IFEval's. The checks are this
project's, since IFEval's own need a tokenizer from a download. Only the instructions of this file are known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Arguments = Mapping[str, Any]


def follows_all(answer: str, instructions: Sequence[str], arguments: Sequence[Arguments]) -> bool:
    """Return whether an answer follows every instruction; `arguments` holds the `kwargs` of each.

    Raises:
        KeyError: an instruction is not one of `CHECKS`.
    """
    text = answer.strip()
    # A data set in columns gives every row the arguments of all rows; None stands for an absent one.
    return bool(text) and all(
        CHECKS[instruction](text, given) for instruction, given in zip(instructions, arguments, strict=True)
    )


def process_results(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return lm-evaluation-harness's metric for one row: 1.0 if the answer follows every instruction."""
    followed = follows_all(answers[0], row["instruction_id_list"], row["kwargs"])
    return {"prompt_level_strict_acc": float(followed)}


def _is_json(text: str, _: Arguments) -> bool:
    block = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return False
    return True


def _bullets(text: str, given: Arguments) -> bool:
    return len(re.findall(r"^\s*[*-] \S", text, re.MULTILINE)) == int(given["num_bullets"])


def _word_count(text: str, given: Arguments) -> bool:
    n, bound = len(re.findall(r"\w+", text)), int(given["num_words"])
    return n < bound if given["relation"] == "less than" else n >= bound


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "change_case:english_capital": lambda text, _: text.isupper(),
    "change_case:english_lowercase": lambda text, _: text.islower(),
    "detectable_format:json_format": _is_json,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:title": lambda text, _: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", text) is not None,
    "keywords:existence": lambda text, given: all(_has_word(text, word) for word in given["keywords"]),
    "keywords:forbidden_words": lambda text, given: (
        not any(_has_word(text, word) for word in given["forbidden_words"])
    ),
    "length_constraints:number_words": _word_count,
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": lambda text, given: text.lower().endswith(given["end_phrase"].lower()),
    "startend:quotation": lambda text, _: len(text) > 1 and text[0] == text[-1] == '"',
}
