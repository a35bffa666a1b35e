"""Before and after: answers under a steering, graded, paired row by row, summed up; and how far text drifts.

A model, prompts, a judge and the steering go in; rows, rates with intervals and tests come out. The
pipeline's stages and `rs-export eval` are both made of this. Intervals and tests are those of
`rs_gguf.chance`, drift that of method §7.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rs_gguf.chance import mcnemar, wilson
from rs_gguf.chat import ChatFormat, after_thinking, begins_in_trace
from rs_gguf.degenerate import is_degenerate
from rs_gguf.files import Row
from rs_gguf.generation import Sampling
from rs_gguf.judges import Judge
from rs_gguf.judging.judgement import Judgement
from rs_gguf.judging.votes import answer_start
from rs_gguf.llama import LlamaModel
from rs_gguf.prompts import Prompt, to_row

if TYPE_CHECKING:  # imports PyTorch, which takes seconds and hundreds of megabytes: for who uses it
    from rs_gguf.targets import TorchModel

Model: TypeAlias = "LlamaModel | TorchModel"
Advance = Callable[[int], None]
# Of each (prompt, continuation): log-probabilities [T] of the continuation, and which tokens are top-1 [T].
LogProbs = Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]]

_PAIRED = ("answer", "confidence", "category", "degenerate")


@dataclass(frozen=True)
class Steering:
    """What is put on the model: directions added to blocks, and LoRA adapters with their scales."""

    directions: Mapping[int, Any]
    adapters: Sequence[tuple[Path, float]] = ()

    def on(self, model: Model) -> contextlib.AbstractContextManager[None]:
        return model.steered(self.directions, adapters=self.adapters)

    def scaled(self, dose: float) -> Steering:
        """The same steering, every scale times `dose`."""
        return Steering(
            {layer: np.float32(dose) * direction for layer, direction in self.directions.items()},
            [(path, dose * scale) for path, scale in self.adapters],
        )


NO_STEERING = Steering({})


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt: its tokens, the text after any thinking trace, whether it looks broken."""

    tokens: list[int]
    text: str
    finished: bool
    degenerate: bool

    @property
    def to_judge(self) -> str | None:
        """The text; None where generation was cut off before it began, within the thinking trace say.

        That is no empty answer, which a judge takes for a refusal: nobody knows what it would have been. Nor
        is a trace that went in circles, which shows as `degenerate`.
        """
        return self.text if self.text or self.finished else None

    def to_row(self) -> Row:
        """As run folders keep it."""
        return {
            "answer": self.text,
            "tokens": self.tokens,
            "finished": self.finished,
            "degenerate": self.degenerate,
        }

    @classmethod
    def from_row(cls, row: Row) -> Answer:
        """The inverse of `to_row`."""
        return cls(row["tokens"], row["answer"], row["finished"], row["degenerate"])


def chat_tokens(model: Model, prompts: Sequence[Prompt], system: str | None = None) -> list[list[int]]:
    """Token lists of one-turn conversations in the model's own chat format."""
    chat = ChatFormat.of(model)
    return [chat.tokenize(model, prompt.prompt, system=system) for prompt in prompts]


def answer(
    model: Model, tokens: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) for conversations given as tokens, as they finish."""
    opened = [begins_in_trace(model, prompt) for prompt in tokens]
    for i, generation in model.generate(tokens, max_tokens=max_tokens, sampling=sampling):
        # Some models mark the trace with control tokens, which the plain text leaves out.
        marked = model.detokenize(generation.tokens, special=True)
        text = after_thinking(marked, inside=opened[i])
        if text == marked.strip():
            text = generation.text.strip()
        yield i, Answer(generation.tokens, text, generation.finished, is_degenerate(generation))


def has_trace(model: Model, found: Answer) -> bool:
    """Whether a thinking trace came before the final answer, or all of it is one so far."""
    return model.detokenize(found.tokens).strip() != found.text


def after_trace(model: Model, prompt: Sequence[int], found: Answer) -> tuple[list[int], list[int]]:
    """Tokens of what came before the final answer, and its own, for log-probabilities under a steering.

    A thinking trace counts as part of the prompt: what a steering does is measured on the answer. Traces
    begin alike, and what they say is not what anybody asked for.
    """
    tokens = found.tokens
    if not found.text:
        return [*prompt, *tokens], []
    start = 0
    if has_trace(model, found):
        start = answer_start(len(tokens), lambda k: model.detokenize(tokens[k:]), found.text) or 0
    return [*prompt, *tokens[:start]], tokens[start:]


def logprobs_of(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[Answer], system: str | None
) -> LogProbs:
    """Log-probabilities of given answers, without their traces, under what is on the model now."""
    pairs = zip(chat_tokens(model, prompts, system), answers, strict=True)
    return model.token_logprobs([after_trace(model, tokens, found) for tokens, found in pairs])


@dataclass(frozen=True)
class Drift:
    """How a steering changes what the model makes of text that it did not write under it.

    `nats`: mean over the texts of |Δ mean log-probability of a token|. `top1_agreement`: share of the tokens
    that were the model's first choice and still are. The perplexities are over all tokens of all texts. All
    are NaN without text.
    """

    nats: float
    top1_agreement: float
    perplexity_baseline: float
    perplexity_steered: float


def drift_of(before: LogProbs, after: LogProbs) -> Drift:
    """The drift from two results of `token_logprobs` for the same continuations."""
    if not before:
        return Drift(*[float("nan")] * 4)
    # Greedy answers are top-1 by construction, but for the rounding of another batch.
    same = np.concatenate([a[1][b[1]] for b, a in zip(before, after, strict=True)])
    return Drift(
        mean_change(before, after),
        float(same.mean()) if same.size else float("nan"),
        _perplexity(before),
        _perplexity(after),
    )


def changes_of(before: LogProbs, after: LogProbs) -> NDArray[np.float32]:
    """|Δ mean log-probability| [N] of N conversations, from two results of `token_logprobs`; nats."""
    return np.array([abs(b[0].mean() - a[0].mean()) for b, a in zip(before, after, strict=True)])


def mean_change(before: LogProbs, after: LogProbs) -> float:
    """The mean of `changes_of`, in nats."""
    return float(changes_of(before, after).mean())


def _perplexity(found: LogProbs) -> float:
    return float(np.exp(-np.concatenate([logprobs for logprobs, _ in found]).mean(dtype=np.float64)))


def answer_all(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    steering: Steering,
    max_tokens: int,
    system: str | None = None,
    sampling: Sampling | None = None,
    advance: Advance = lambda n: None,
) -> tuple[list[Answer], float]:
    """The answers to `prompts` under `steering`, in order, and the seconds that they took."""
    tokens = chat_tokens(model, prompts, system)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    with steering.on(model):
        for i, found in answer(model, tokens, max_tokens=max_tokens, sampling=sampling):
            answers[i] = found
            advance(1)
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - start


def grade(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Judgement]:
    """What a judge says of each answer, in order."""
    graded = dict(judge.judge([(p.prompt, a.to_judge) for p, a in zip(prompts, answers, strict=True)]))
    return [graded[i] for i in range(len(prompts))]


def answer_and_judge(
    model: Model,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    steering: Steering,
    max_tokens: int,
    system: str | None = None,
    sampling: Sampling | None = None,
    advance: Advance = lambda n: None,
) -> tuple[list[Answer], list[Judgement], float]:
    """Answers to `prompts` under `steering`, what the judge says of them, and tokens answered per second."""
    answers, seconds = answer_all(
        model, prompts, steering=steering, max_tokens=max_tokens, system=system, sampling=sampling,
        advance=advance,
    )  # fmt: skip
    # Judged unsteered: the judge may be the very model that is being steered.
    graded = grade(judge, prompts, answers)
    return answers, graded, sum(len(a.tokens) for a in answers) / seconds if seconds else 0.0


def side_row(found: Answer, judgement: Judgement) -> Row:
    """What is kept of one answer on one side."""
    return {**found.to_row(), "confidence": judgement.confidence, "category": judgement.category}


def paired(prompt: Prompt, sides: Mapping[str, Row]) -> Row:
    """One row of a prompt and its sides, their fields named `answer_baseline` and so on."""
    named = {f"{name}_{side}": found[name] for side, found in sides.items() for name in _PAIRED}
    return {**to_row(prompt), **named}


def must_stay(row: Row) -> bool:
    """Whether an unsteered answer must stay as it was: it is no refusal, and has words that can drift."""
    return bool((row["confidence"] or 0) <= 0 and row["answer"])


def is_judged(row: Mapping[str, Any], sides: Sequence[str] = ("baseline", "steered")) -> bool:
    """Whether a paired row has a verdict on all of these sides."""
    return all(row[f"confidence_{side}"] is not None for side in sides)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of one set from paired rows (`confidence_baseline`, `confidence_steered`, `degenerate_…`)."""
    unjudged = {side: sum(r[f"confidence_{side}"] is None for r in rows) for side in ("baseline", "steered")}
    judged = [r for r in rows if is_judged(r)]
    n = len(judged)
    before = [r["confidence_baseline"] > 0 for r in judged]
    after = [r["confidence_steered"] > 0 for r in judged]
    kept = sum(b and a for b, a in zip(before, after, strict=True))
    return {
        "n": n,
        "unjudged": len(rows) - n,  # on one side or both
        "unjudged_baseline": unjudged["baseline"],
        "unjudged_steered": unjudged["steered"],
        "refusal_baseline": sum(before) / n if n else 0.0,
        "refusal_steered": sum(after) / n if n else 0.0,
        "ci95_baseline": list(wilson(sum(before), n)),
        "ci95_steered": list(wilson(sum(after), n)),
        "refused_baseline": sum(before),
        "refused_steered": sum(after),
        "refused_both": kept,
        "mcnemar_p": mcnemar(sum(after) - kept, sum(before) - kept),
        "categories_baseline": categories(judged, "baseline"),
        "categories_steered": categories(judged, "steered"),
        "degenerate_baseline": _mean([r["degenerate_baseline"] for r in rows]),
        "degenerate_steered": _mean([r["degenerate_steered"] for r in rows]),
    }


def categories(judged: Sequence[Mapping[str, Any]], side: str) -> dict[str, int]:
    """How many refusals are of which kind of the rubric, most first; "untold" where the judge did not say."""
    refused = (r for r in judged if r[f"confidence_{side}"] > 0)
    return dict(Counter(r.get(f"category_{side}") or "untold" for r in refused).most_common())


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
