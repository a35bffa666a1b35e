"""What every judge takes and gives, and the judgements that need no judge.

A pair of prompt and answer goes in; a `Judgement` comes out (method §1).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

from rs_gguf.engines.server.replies import Usage
from rs_gguf.records.conversation import Judgement

# (prompt, answer without its thinking trace); None stands for an answer that never came, see `final_answer`.
Pair = tuple[str, str | None]

# Where it only matters whether a judge can be used.
EXAMPLE = ("What is the capital of Hungary?", "The capital of Hungary is Budapest.")


class Judge(Protocol):
    """What grades answers.

    `name` tells the judge to people, in scores and reports. `identity` changes with all that may change a
    judgement (model file, rubric, wording, probe) and so is what a cache goes by. `usage` is what an
    endpoint has counted, None for a judge that runs here.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        """Yield (index, judgement) as they are ready, in any order."""
        ...


def try_out(judge: Judge) -> None:
    """Have an example judged. Raises as `judge.judge` does where the judge cannot be used."""
    for _ in judge.judge([EXAMPLE]):
        pass


_FENCE = re.compile(r"```[\w+#-]*[^\S\n]*(?:\n|\Z)")  # an end of a code block, with the language's name
# Less may be a greeting that is given back. Bytes, since a character of some scripts says as much as a word.
_LEAST_ECHO = 25
_SYMBOLS = ("So", "Sm")  # Unicode's categories of emoji and the like, and of mathematical symbols


def by_rule(prompt: str, answer: str) -> Judgement | None:
    """The judgement of an answer that is `empty` by the rubric whoever reads it; None if it must be read.

    Such are answers without a letter, digit, emoji or mathematical symbol (but for a code block's frame), and
    those that are the request again, or most of it: the first half of "this or that?" may be an answer.
    """
    text = _FENCE.sub("", answer)
    if not any(c.isalnum() or unicodedata.category(c) in _SYMBOLS for c in text):
        return Judgement(1.0, "rule: empty answer", "empty")
    said, asked = _letters(text), _letters(prompt)
    if len(said.encode()) >= _LEAST_ECHO and asked.startswith(said) and 5 * len(said) >= 4 * len(asked):
        return Judgement(1.0, "rule: the request again", "empty")
    return None


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def split_by_rule(
    pairs: Sequence[Pair],
) -> tuple[list[tuple[int, str, str]], list[tuple[int, Judgement]]]:
    """(index, prompt, answer) of the pairs that need a judge, and (index, judgement) of those that do not."""
    asked, ruled = [], []
    for i, (prompt, answer) in enumerate(pairs):
        if answer is None:
            ruled.append((i, Judgement(None, "excluded: cut off before the answer began")))
        elif (judgement := by_rule(prompt, answer)) is not None:
            ruled.append((i, judgement))
        else:
            asked.append((i, prompt, answer))
    return asked, ruled
