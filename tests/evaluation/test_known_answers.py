"""A model that cannot answer is refused; a weak one, a wordy one and one that thinks first are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation.known_answers import LEAST, QUESTIONS, check_can_answer
from rs_gguf.records.conversation import Generation

RIGHT = ["Paris", "7 plus 5 is 12.", "Blue", "七天 (7)", "The opposite is cold.", "60", "Spanish", "24 hours"]


class Scripted:
    """A model whose tokens are characters, and whose answers are given."""

    chat_template: str | None = "{{ messages[0].content }}"
    bos_token = eos_token = ""
    bos_prefix: ClassVar[list[int]] = []

    def __init__(self, texts: Sequence[str], *, finished: bool = True, template: str | None = None) -> None:
        self.texts, self.finished = texts, finished
        self.chat_template = template or self.chat_template

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return "".join(map(chr, tokens))

    def generate(self, prompts: Sequence[Any], **options: Any) -> Iterator[tuple[int, Generation]]:
        for i, text in reversed(list(enumerate(self.texts))):  # answers come in any order
            yield i, Generation(self.tokenize(text), text, self.finished)


def check(model: Scripted) -> None:
    check_can_answer(model)  # type: ignore[arg-type]


def test_no_question_holds_its_answer() -> None:
    echo = [question.text for question in QUESTIONS]
    with pytest.raises(InputError, match="it answered 0"):
        check(Scripted(echo))


def test_a_weak_model_passes() -> None:
    check(Scripted(RIGHT))
    wrong = ["17 + 250"] * (len(QUESTIONS) - LEAST)
    check(Scripted([*wrong, *RIGHT[-LEAST:]]))
    with pytest.raises(InputError, match=f"it answered {LEAST - 1} "):
        check(Scripted([*wrong, "no", *RIGHT[1 - LEAST :]]))


def test_a_model_that_does_not_end_its_answers_is_refused() -> None:
    """So a base model does, and one with the template of another family."""
    with pytest.raises(InputError, match=r"gave “Paris”; .* gave “7 plus 5 is 12.”"):
        check(Scripted(RIGHT, finished=False))


def test_a_model_that_thinks_first_may_be_cut_off() -> None:
    thoughts = [f"They want one word. {text}, of course" for text in RIGHT]
    check(Scripted(thoughts, finished=False, template="{{ messages[0].content }}<think>"))
    check(Scripted([f"<think>{text}" for text in thoughts], finished=False))
    with pytest.raises(InputError, match="it answered 0"):
        check(Scripted(["zqx"] * 8, finished=False, template="{{ messages[0].content }}<think>"))


def test_the_error_shows_two_answers_and_says_what_to_do() -> None:
    model = Scripted(["", "a\n\x1b[2Jb " * 40, *["no"] * 6])
    with pytest.raises(InputError) as error:
        check(model)
    message = str(error.value)
    assert "“What is the capital of France? Answer with one word.” gave no text; " in message
    assert message.count(" gave ") == 2
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 900
    for advice in ("instruction-tuned", "SHA-256", "llama-gguf-split --merge", "answers.check=false"):
        assert advice in message
    assert "no chat template" not in message
    model.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        check(model)


def test_random_weights_cannot_answer(tiny_model: LlamaModel) -> None:
    with pytest.raises(InputError, match=r"the model cannot answer: of 8 simple questions it answered 0"):
        check_can_answer(tiny_model)
