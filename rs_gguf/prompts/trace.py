"""Separate the final answer of a thinking model from its thinking trace, in text and in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rs_gguf.prompts.markers import ANSWER_ENDS, ANSWER_STARTS, THINKING_MARKERS
from rs_gguf.prompts.template import ChatModel


class Parts(NamedTuple):
    """The parts of an output. `trace` is empty without a trace. `ended`: no trace is left open."""

    trace: str
    ended: bool
    answer: str


def after_thinking(text: str, *, inside: bool | None = None) -> str:
    """Return the final answer without the thinking trace before it; see `split_trace`."""
    return split_trace(text, inside=inside).answer


def split_trace(text: str, *, inside: bool | None = None) -> Parts:
    """Return the thinking trace and the final answer, which is empty if the trace does not end.

    `inside`: whether the prompt opened the trace, so that the text starts within it. None means unknown: then
    a text that contains an end marker, and does not start with a start marker, counts as inside.
    """
    text = text.strip()
    opened = [pair for pair in THINKING_MARKERS if text.startswith(pair)]
    if inside is None:
        inside = not opened and any(closing in text for _, closing in THINKING_MARKERS)
    trace, ended, answer = (text, False, "") if inside or opened else ("", True, text)
    for _, closing in [*opened, *(THINKING_MARKERS if inside else ())]:
        if closing in text:
            trace, _, answer = text.partition(closing)
            ended, answer = True, answer.strip()
            break
    for opening, _ in opened:
        trace = trace.removeprefix(opening)
    for start in ANSWER_STARTS:
        answer = answer.removeprefix(start)
    for end in ANSWER_ENDS:
        answer = answer.partition(end)[0]
    return Parts(trace.strip(), ended, answer.strip())


def opens_thinking(rendered: str) -> bool:
    """Return whether a rendered prompt ends inside a thinking trace, because its template opens one."""
    tail = rendered.rstrip()
    return any(tail.endswith(start) for start, _ in THINKING_MARKERS)


def begins_in_trace(model: ChatModel, prompt: Sequence[int]) -> bool:
    """Return whether the answer to a prompt, given as tokens, begins inside a thinking trace."""
    return opens_thinking(model.detokenize(prompt[-8:], special=True))


def answer_start(count: int, text_from: Callable[[int], str], answer: str) -> int | None:
    """Return the index of the first of `count` tokens that the final `answer` consists of.

    Return None if the text of the tokens does not contain the answer. `text_from(i)` returns the text of the
    tokens from i on. If the answer occurs several times, the last occurrence counts. Markers may follow it.
    """
    if answer not in text_from(0):
        return None
    low, high = 0, count  # The text from `low` on contains the answer; the text from `high` on does not.
    while high - low > 1:
        middle = (low + high) // 2
        if answer in text_from(middle):
            low = middle
        else:
            high = middle
    return low


def final_answer(text: str, *, finished: bool) -> str | None:
    """Return the part of an answer that is judged: the text after its thinking trace.

    Return None if the output was truncated (not `finished`) inside the trace: the answer is then unknown. If
    the model itself ended the output inside the trace, the answer is empty.
    """
    answer = after_thinking(text)
    return None if text.strip() and not answer and not finished else answer
