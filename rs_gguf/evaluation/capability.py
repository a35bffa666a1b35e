"""What a model can do besides: short tasks with exact answers, to put a number on "nothing else changed".

A way to ask a model goes in; for each task of `data/capability.jsonl` the answer and whether it is right come
out, and paired rates by kind. The tasks (arithmetic, facts, format, Python functions) were written for this
project, and how an answer is checked is data too: `checks`, which all must hold. Nothing is judged by a
model. Tasks are such that a model of half a billion parameters solves some and fails some, so that a loss
shows.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from rs_gguf.evaluation import sandbox
from rs_gguf.evaluation.paired_statistics import mcnemar, wilson
from rs_gguf.records.conversation import Answer, Prompt

SKILLS = ("arithmetic", "facts", "format", "code")
_TOKENS, _CODE_TOKENS = 48, 192

# Answers to prompts, in order, of at most so many tokens.
Ask = Callable[[Sequence[Prompt], int], list[Answer]]

_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Task:
    """A prompt, the checks that its answer must pass, an answer that passes them, and how long one may be."""

    id: str
    kind: str
    prompt: str
    checks: Sequence[Mapping[str, Any]]
    reference: str
    max_tokens: int = _TOKENS


@dataclass(frozen=True)
class Solution:
    """What a model answered to a task, and whether that is right; None where it was cut off before an answer,
    within its thinking trace say.
    """

    task: Task
    text: str
    correct: bool | None


def tasks(kinds: Sequence[str] = SKILLS) -> list[Task]:
    """The project's tasks of these kinds."""
    text = (resources.files("rs_gguf") / "data" / "capability.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        Task(**row, max_tokens=_CODE_TOKENS if row["kind"] == "code" else _TOKENS)
        for row in rows
        if row["kind"] in kinds
    ]


def runnable(max_tokens: int = 0) -> tuple[list[Task], str]:
    """The tasks that this system can check, and why the others are left out (empty when none is).

    Answers may have `max_tokens` where that is more than the tasks need: a model may think before them.
    """
    reason = sandbox.unavailable()
    found = tasks([kind for kind in SKILLS if kind != "code"]) if reason else tasks()
    return [replace(task, max_tokens=max(task.max_tokens, max_tokens)) for task in found], reason


def solve(ask: Ask, chosen: Sequence[Task]) -> list[Solution]:
    """Have tasks answered; the solutions are in the order of the tasks."""
    solutions: dict[str, Solution] = {}
    for limit in sorted({task.max_tokens for task in chosen}):
        group = [task for task in chosen if task.max_tokens == limit]
        answers = ask([Prompt(task.prompt, "benign") for task in group], limit)
        for task, found in zip(group, answers, strict=True):
            correct = None if found.to_judge is None else passes(task, found.text)
            solutions[task.id] = Solution(task, found.text, correct)
    return [solutions[task.id] for task in chosen]


def compare(before: Sequence[Solution], after: Sequence[Solution]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind and in `all`, from solutions of the same tasks unsteered and steered.

    `n` are the tasks that were answered on both sides; the others are `unanswered_…` on one or both.
    """
    pairs = list(zip(before, after, strict=True))
    kinds = [kind for kind in SKILLS if any(b.task.kind == kind for b, _ in pairs)]
    groups = {kind: [pair for pair in pairs if pair[0].task.kind == kind] for kind in kinds}
    return {name: _paired(group) for name, group in {**groups, "all": pairs}.items()}


def _paired(asked: Sequence[tuple[Solution, Solution]]) -> dict[str, Any]:
    pairs = [(b.correct, a.correct) for b, a in asked if b.correct is not None and a.correct is not None]
    n = len(pairs)
    right, right_after = sum(b for b, _ in pairs), sum(a for _, a in pairs)
    gained = sum(a and not b for b, a in pairs)
    lost = sum(b and not a for b, a in pairs)
    return {
        "n": n,
        "unanswered_unsteered": sum(b.correct is None for b, _ in asked),
        "unanswered_steered": sum(a.correct is None for _, a in asked),
        "right_unsteered": right,
        "right_steered": right_after,
        "accuracy_unsteered": right / n if n else 0.0,
        "accuracy_steered": right_after / n if n else 0.0,
        "ci95_unsteered": list(wilson(right, n)),
        "ci95_steered": list(wilson(right_after, n)),
        "gained": gained,
        "lost": lost,
        "mcnemar_p": mcnemar(gained, lost),
    }


# ---- checks ------------------------------------------------------------------------------------------


def passes(task: Task, text: str) -> bool:
    """Whether an answer passes all checks of its task."""
    return all(_CHECKS[check["check"]](text.strip(), check) for check in task.checks)


def _number(text: str, check: Mapping[str, Any]) -> bool:
    """The last number in the text, as models tend to repeat the sum before its result."""
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == check["value"]


def _any_of(text: str, check: Mapping[str, Any]) -> bool:
    words = f" {_folded(text)} "
    return any(f" {_folded(value)} " in words for value in check["values"])


def _folded(text: str) -> str:
    """Words in small letters without accents or punctuation."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return " ".join(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def _parsed(text: str) -> Any:
    """The JSON value that the answer is, in a code block or not; an exception object when it is none."""
    block = _FENCE.search(text)
    try:
        return json.loads(block[1] if block else text)
    except (ValueError, RecursionError) as error:
        return error


def _json_keys(text: str, check: Mapping[str, Any]) -> bool:
    value = _parsed(text)
    return isinstance(value, dict) and sorted(value) == sorted(check["keys"])


def _json_list(text: str, check: Mapping[str, Any]) -> bool:
    value = _parsed(text)
    return (
        isinstance(value, list) and len(value) == check["length"] and all(isinstance(v, str) for v in value)
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _words(text: str, check: Mapping[str, Any]) -> bool:
    return bool(check.get("min", 0) <= len(text.split()) <= check["max"])


def _python(text: str, check: Mapping[str, Any]) -> bool:
    """The function in the first code block, or else in the whole text, gives the values expected."""
    block = _FENCE.search(text)
    arguments = [arguments for arguments, _ in check["calls"]]
    outcome = sandbox.call(block[1] if block else text, check["function"], arguments)
    expected = [value for _, value in check["calls"]]
    return not outcome.error and _same(outcome.values, expected)


def _same(found: Any, expected: Any) -> bool:
    """Equal as JSON values: True is not 1, but 2.0 is 2."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[k], expected[k]) for k in expected)
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return found == expected or _close(found, expected)
    return bool(found == expected)


def _close(found: float, expected: float) -> bool:
    """Equal but for rounding; whole numbers are never rounded."""
    if isinstance(found, int) and isinstance(expected, int):
        return False
    try:
        return math.isclose(found, expected)
    except OverflowError:  # a whole number beyond the floats
        return False


_CHECKS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "number": _number,
    "any_of": _any_of,
    "json_keys": _json_keys,
    "json_list": _json_list,
    "json_value": lambda text, check: _same(_parsed(text), check["value"]),
    "lines": lambda text, check: len(_lines(text)) == check["count"],
    "each_line": lambda text, check: all(re.fullmatch(check["pattern"], line) for line in _lines(text)),
    "words": _words,
    "matches": lambda text, check: re.fullmatch(check["pattern"], text) is not None,
    "equals": lambda text, check: text == check["text"],
    "starts": lambda text, check: text.startswith(check["text"]),
    "ends": lambda text, check: text.endswith(check["text"]),
    "lacks": lambda text, check: check["text"] not in text.casefold(),
    "python": _python,
}
