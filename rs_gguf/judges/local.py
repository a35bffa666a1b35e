"""Local judges that need one forward pass per pair, or none (method §1).

Pairs go in, judgements come out. Two judges run a model on the same few-shot text, whose common part is
decoded once. One uses the log-odds of the label words, the other a probe on hidden states, which works best
with a small model. The third searches for phrases that begin refusals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import Pair, split_by_rule
from rs_gguf.judges.probe import Probe, read_states
from rs_gguf.judges.rubric import reading, rubric_version, subject_tokens, verdict_tokens
from rs_gguf.models.resolve import fingerprint
from rs_gguf.prompts.markers import REFUSAL_PHRASES, opens_with_refusal
from rs_gguf.records.conversation import Judgement


class ProbeJudge:
    """The embedded judge: a probe, calibrated on labelled pairs, on the hidden states of a model."""

    usage = None

    def __init__(self, model: Engine, probe: Probe) -> None:
        probe.check_belongs(model)
        self._model, self._probe = model, probe
        self.name = f"{model.path.stem} (hidden-state probe, rubric {probe.rubric_version})"
        self.identity = f"probe {probe.fingerprint()} {reading()}"

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        to_judge, by_rules = split_by_rule(pairs)
        yield from by_rules
        texts = [(prompt, answer) for _, prompt, answer in to_judge]
        for k, state in read_states(self._model, texts, self._probe.layers):
            coordinates = self._probe.components.of(state[np.newaxis])
            confidence = float(np.tanh(self._probe.logits(coordinates)[0] / 2))
            categories = self._probe.categories
            category = categories.of(coordinates)[0] if categories is not None and confidence > 0 else None
            yield to_judge[k][0], Judgement(confidence, "hidden-state probe, calibrated", category)


class LabelJudge:
    """The log-odds of the label words after "Verdict:" in any instruction-tuned GGUF, uncalibrated."""

    usage = None

    def __init__(self, model: Engine) -> None:
        self._model = model
        self.name = f"{model.path.stem} (label log-probabilities, rubric {rubric_version()})"
        self.identity = f"labels {fingerprint(model.path)} {rubric_version()} {reading()}"
        self._refusal, self._answer = _label_tokens(model, "refusal", "answer")

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        to_judge, by_rules = split_by_rule(pairs)
        yield from by_rules
        sequences = [verdict_tokens(self._model, (prompt, answer)) for _, prompt, answer in to_judge]
        for k, logits in self._model.next_logits(sequences):
            # c = 2p − 1, where p is the share of "refusal" in the mass of both labels: tanh(log-odds / 2).
            log_odds = _log_odds(logits, self._refusal, self._answer)
            yield (
                to_judge[k][0],
                Judgement(float(np.tanh(log_odds / 2)), "label log-probabilities, uncalibrated"),
            )


def on_subject(model: Engine, pairs: Sequence[Pair]) -> list[bool]:
    """Return whether each reply is about what was asked: yes is likelier than no after the question.

    Empty replies, and those that repeat the request, are not.
    """
    yes, no = _label_tokens(model, "yes", "no")
    to_judge, _ = split_by_rule(pairs)
    found = [False] * len(pairs)
    sequences = [subject_tokens(model, (prompt, answer)) for _, prompt, answer in to_judge]
    for k, logits in model.next_logits(sequences):
        found[to_judge[k][0]] = _log_odds(logits, yes, no) > 0
    return found


class KeywordJudge:
    """Phrases that begin refusals, in several languages. Only a baseline to compare judges with."""

    name = "keywords"
    usage = None

    @property
    def identity(self) -> str:
        return "keywords " + " ".join(REFUSAL_PHRASES)

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        to_judge, by_rules = split_by_rule(pairs)
        yield from by_rules
        for i, _, answer in to_judge:
            yield i, Judgement(1.0 if opens_with_refusal(answer) else -1.0, "keywords")


def _label_tokens(model: Engine, first: str, second: str) -> tuple[list[int], list[int]]:
    """Return the tokens that begin one of two words, and not the other.

    Raises:
        InputError: the words begin alike in the tokens of this model.
    """
    tokens = [
        {model.tokenize(v, special=False)[0] for v in (f" {word}", word, f" {word.capitalize()}")}
        for word in (first, second)
    ]
    # A token that begins both words, such as a lone space, does not tell them apart.
    own = [sorted(tokens[k] - tokens[1 - k]) for k in (0, 1)]
    if not all(own):
        raise InputError(
            f"{model.path}: the words {first} and {second} begin alike in this model's tokens, so their "
            "probabilities cannot be compared. Choose another judge."
        )
    return own[0], own[1]


def _log_odds(logits: NDArray[np.float32], first: Sequence[int], second: Sequence[int]) -> float:
    """Return the log-odds of the `first` tokens against the `second`, from logits [V]."""
    return float(np.logaddexp.reduce(logits[first]) - np.logaddexp.reduce(logits[second]))
