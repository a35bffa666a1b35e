"""Check that a model can answer at all, before hundreds of its answers are judged.

A loaded model goes in; an `InputError` comes out if it answers too few simple questions. The causes are
damaged weights, parts joined in the wrong order, a wrong chat template or a base model. Then the right words
are missing, or the model does not end its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rs_gguf.engines.answers import answer, chat_tokens, has_trace
from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError, excerpt
from rs_gguf.records.conversation import Answer, Prompt


@dataclass(frozen=True)
class Question:
    """A question, and the words of which a right answer has one. The question has none: an echo is wrong."""

    text: str
    words: tuple[str, ...]


# Half of the answers are numbers, which a model of any language writes alike.
QUESTIONS = (
    Question("What is the capital of France? Answer with one word.", ("paris", "parís", "巴黎")),
    Question("What is 7 plus 5? Answer with the number only.", ("12", "twelve")),
    Question("What colour is the sky on a clear day? Answer with one word.", ("blue", "蓝")),
    Question("How many days are in a week? Answer with the number only.", ("7", "seven")),
    Question("What is the opposite of hot? Answer with one word.", ("cold", "cool", "冷")),
    Question("How many minutes are in an hour? Answer with the number only.", ("60", "sixty")),
    Question("Which language do people speak in Spain? Answer with one word.", ("spanish", "西班牙")),
    Question("How many hours are in a day? Answer with the number only.", ("24", "twenty-four")),
)  # fmt: skip
LEAST = 3
"""Right answers of 8 that a model must give. Measured on 2026-12-01: SmolLM2-135M-Instruct gives 7. With
damaged weights it gives none, with the templates of Llama 2, Llama 3 or Gemma at most 1."""

_TOKENS = 48  # most of an answer; a model that works needs a few, but must end by itself
_SHOWN = 80  # characters


def check_can_answer(model: Engine) -> None:
    """Raise `InputError` if the model gives fewer than `LEAST` right answers to the questions.

    A right answer has one of the words, and the model ends it. A thinking model need not end: the word may be
    in its trace. The questions have no system prompt, which might forbid to answer them.
    """
    prompts = [Prompt(question.text, "benign") for question in QUESTIONS]
    answers = dict(answer(model, chat_tokens(model, prompts), max_tokens=_TOKENS))
    wrong = [i for i, question in enumerate(QUESTIONS) if not _is_right(model, question, answers[i])]
    right = len(QUESTIONS) - len(wrong)
    if right >= LEAST:
        return
    examples = "; ".join(f"“{QUESTIONS[i].text}” gave {_shown(answers[i])}" for i in wrong[:2])
    template = "" if model.chat_template else " The file has no chat template, so ChatML was used."
    raise InputError(
        f"the model cannot answer: of {len(QUESTIONS)} simple questions it answered {right} rightly and to "
        f"the end; {LEAST} are needed. {examples}.{template} An instruction-tuned model with its own chat "
        "template is accepted. Compare the file's SHA-256 with its source, and join split parts in order "
        "(llama-gguf-split --merge). Choose the instruct variant in place of a base model. For a model made "
        "for something else, set answers.check=false in the recipe."
    )


def _is_right(model: Engine, question: Question, reply: Answer) -> bool:
    traced = has_trace(model, reply)
    text = model.detokenize(reply.tokens) if traced else reply.text
    # Numbers and Latin words stand alone; in Chinese, no space separates a word from the next.
    words = "|".join(map(re.escape, question.words))
    found = re.search(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", text.casefold())
    return found is not None and (reply.finished or traced)


def _shown(reply: Answer) -> str:
    text = excerpt(reply.text, _SHOWN)
    return f"“{text}”" if text else "no text"
