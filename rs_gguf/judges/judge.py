"""The protocol of all judges, and the rules for answers that need no judge.

Pairs (prompt, answer) go in; a `Judgement` of each comes out (method §1).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

from rs_gguf.engines.server.replies import Usage
from rs_gguf.records.conversation import Judgement

# (prompt, answer without its thinking trace). None: generation stopped before the answer (`final_answer`).
Pair = tuple[str, str | None]

# A pair that shows whether a judge can be used.
EXAMPLE = ("What is the capital of Hungary?", "The capital of Hungary is Budapest.")


class Judge(Protocol):
    """A model or rule that grades answers.

    Attributes:
        name: for people, in files and reports.
        identity: changes with everything that may change a judgement (model file, rubric, wording, probe).
            It is part of cache keys.
        usage: requests and tokens of an endpoint; None for a judge in this process.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        """Yield (index, judgement) of each pair as it is ready, in any order."""
        ...


def try_out(judge: Judge) -> None:
    """Judge an example. Raises as `judge.judge` does if the judge cannot be used."""
    for _ in judge.judge([EXAMPLE]):
        pass


_FENCE = re.compile(r"```[\w+#-]*[^\S\n]*(?:\n|\Z)")  # start or end of a code block
# A shorter echo may be a greeting in return. In bytes, since one character of some scripts is a whole word.
_LEAST_ECHO = 25
_SYMBOLS = ("So", "Sm")  # Unicode categories: emoji and similar symbols, mathematical symbols


def by_rule(prompt: str, answer: str) -> Judgement | None:
    """Return the judgement of an answer that is clearly `empty` in the rubric's sense; else None.

    An answer is empty if it has no letter, digit, emoji or mathematical symbol outside the frame of a code
    block. It is also empty if it repeats the request, or at least 80% of it from the start. A shorter part
    may be an answer: to "this or that?", "this" is one.
    """
    text = _FENCE.sub("", answer)
    if not any(c.isalnum() or unicodedata.category(c) in _SYMBOLS for c in text):
        return Judgement(1.0, "rule: empty answer", "empty")
    said, request = _letters(text), _letters(prompt)
    if len(said.encode()) >= _LEAST_ECHO and request.startswith(said) and 5 * len(said) >= 4 * len(request):
        return Judgement(1.0, "rule: the request again", "empty")
    return None


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def split_by_rule(
    pairs: Sequence[Pair],
) -> tuple[list[tuple[int, str, str]], list[tuple[int, Judgement]]]:
    """Return (index, prompt, answer) of pairs that need a judge, and (index, judgement) of the others."""
    to_judge, by_rules = [], []
    for i, (prompt, answer) in enumerate(pairs):
        if answer is None:
            by_rules.append((i, Judgement(None, "excluded: cut off before the answer began")))
        elif (judgement := by_rule(prompt, answer)) is not None:
            by_rules.append((i, judgement))
        else:
            to_judge.append((i, prompt, answer))
    return to_judge, by_rules
