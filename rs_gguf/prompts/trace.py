"""Thinking traces: the final answer without one, and where it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rs_gguf.prompts.markers import ANSWER_ENDS, ANSWER_STARTS, THINKING_MARKERS
from rs_gguf.prompts.template import ChatModel


def after_thinking(text: str, *, inside: bool | None = None) -> str:
    """The final answer, without the thinking trace before it; nothing where the trace has no end.

    `inside`: whether the prompt had opened the trace, so that the text starts within it. None: nobody knows.
    Then it had if the text holds the end of a trace and does not begin with the start of one.
    """
    text = text.strip()
    begun = [pair for pair in THINKING_MARKERS if text.startswith(pair)]
    if inside is None:
        inside = not begun and any(closing in text for _, closing in THINKING_MARKERS)
    answer = "" if inside or begun else text
    for _, closing in [*begun, *(THINKING_MARKERS if inside else ())]:
        if closing in text:
            answer = text.partition(closing)[2].strip()
            break
    for start in ANSWER_STARTS:
        answer = answer.removeprefix(start)
    for end in ANSWER_ENDS:
        answer = answer.partition(end)[0]
    return answer.strip()


def opens_thinking(rendered: str) -> bool:
    """Whether a rendered prompt ends inside a thinking trace (its template opens one)."""
    tail = rendered.rstrip()
    return any(tail.endswith(opening) for opening, _ in THINKING_MARKERS)


def begins_in_trace(model: ChatModel, prompt: Sequence[int]) -> bool:
    """Whether the answer to a prompt, given as tokens, begins within a thinking trace."""
    return opens_thinking(model.detokenize(prompt[-8:], special=True))


def answer_start(count: int, text_from: Callable[[int], str], answer: str) -> int | None:
    """First of `count` tokens that the final `answer` is made of; None if the tokens do not hold it.

    `text_from(i)` is the text of the tokens from i on. What stands last counts; a frame may end after it.
    """
    if answer not in text_from(0):
        return None
    low, high = 0, count  # the answer is in the text from `low` on, and no longer from `high` on
    while high - low > 1:
        middle = (low + high) // 2
        if answer in text_from(middle):
            low = middle
        else:
            high = middle
    return low


def final_answer(text: str, *, finished: bool) -> str | None:
    """The part of an answer that is judged: what follows its thinking trace.

    None if generation was cut off (not `finished`) before anything followed the trace: nobody knows what
    the answer would have been. A model that ended by itself within its trace did give an empty answer.
    """
    answer = after_thinking(text)
    return None if text.strip() and not answer and not finished else answer
