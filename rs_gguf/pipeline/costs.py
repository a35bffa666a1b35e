"""What each stage of a run does, counted: tokens read and answered, factorisations, bytes kept.

A recipe, the prompts it chooses from, the `Shape` of its model and the `Speed` of the machine go in; a
`Stage` for each stage comes out. Prompts are counted in bytes, so that no tokenizer is needed. The counts
follow the code of the stages; how far off they were is in docs/lab/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rs_gguf.activations.capture import ANSWER_TOKENS, SHARD
from rs_gguf.models.shape import Shape
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.speed import Speed, cholesky, factorisation
from rs_gguf.records.conversation import Prompt
from rs_gguf.search.rungs import BENIGN, OPENING, PROBED_PAIRS

Pool = Mapping[str, Mapping[str, Sequence[Prompt]]]

# What is taken for granted of models and prompts.
_BYTES_PER_TOKEN = 4.3  # of UTF-8, in any language
_TEMPLATE = 6  # tokens that a chat template puts after a prompt
_PREFIX = 25  # tokens that it puts before all of them, decoded once
_AROUND = 15  # tokens of a context around a prompt that is only read, beside what is read once for several
_LENGTH = 85  # mean tokens of an answer that is left to end by itself
_NEW = 0.6  # share of the steered answers that are new to the judge, which keeps its judgements
_CHANGED, _KEPT = 0.5, 0.6  # shares of sensitive prompts to change, and of harmful ones that are refused

# What the stages do, and with which sizes.
_CONTEXT, _PADDING = 8192, 256  # cells of a key/value cache; of a sequence's own, a multiple of the second
_BATCH = 512  # tokens that are run together
_JUDGE_PREFIX, _JUDGE_ITEM, _JUDGE_CUT = 360, 8, 400  # tokens of examples, around a pair; characters read
_QUIET = 0.84  # share of the answered conversations whose answers are read too
_DRIFT = 128  # benign answers compared at the end
_DEPTH = 0.55  # share of the blocks before those that a proof looks at
_FACTORISATIONS = 1 + 5 * 0.8  # of a class by each estimator: the fit, and five folds for the figure
_CLASS = 2 / 3  # share of the samples in the class whose covariance is used
_FIGURES = 1.2  # seconds for the figures of an estimator
_ROW, _ROW_TOKEN = 320, 11  # bytes of a row with its prompt, and for each token of an answer
_PYTHON = 0.6e9  # bytes of a process that has loaded its libraries, without a model


@dataclass(frozen=True)
class Grader:
    """A judge that is a model of this machine, and the share of its blocks that a judgement needs."""

    model: Shape
    depth: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Seconds, the most bytes of memory, and bytes left on disk; tokens read and answered."""

    seconds: float
    memory: float
    disk: float
    read: float = 0.0
    answered: float = 0.0


class Costs:
    """The stages of a run: one method each, named like it.

    `pool` holds the prompts that the run chooses from, by split and kind.
    """

    def __init__(self, recipe: Recipe, pool: Pool, model: Shape, speed: Speed, judge: Grader | None) -> None:
        self._recipe, self._model, self._speed, self._judge = recipe, model, speed, judge
        self.sizes = {
            split: {kind: min(getattr(recipe.prompts, split), len(rows)) for kind, rows in found.items()}
            for split, found in pool.items()
        }
        read = recipe.prompts.unanswered if model.writers else 0
        self.unanswered = sum(
            min(read, len(rows) - self.sizes["fit"][kind]) for kind, rows in pool["fit"].items()
        )
        lengths = [
            len(row.prompt.encode()) for found in pool.values() for rows in found.values() for row in rows
        ]
        system = len((recipe.prompts.system or "").encode()) / _BYTES_PER_TOKEN
        self._prefix = _PREFIX + system
        self._text = fmean(lengths) / _BYTES_PER_TOKEN
        self._prompt = self._text + _TEMPLATE
        self._longest = max(lengths) / _BYTES_PER_TOKEN + _TEMPLATE + self._prefix
        self._arms = 2 if model.writers else 1  # a control vector, and an adapter where there can be one
        # Numbers that the fit of an adapter reads of a token.
        self._inputs = model.n_layer * sum(model.writers.values())

    # ---- stages ----------------------------------------------------------------------------------

    def answer(self) -> Stage:
        n = self._count("fit", "tune")
        tokens = self._recipe.answers.tokens
        return Stage(
            0.0 if self._recipe.answers.servers else self._answers(n, tokens),
            self._memory(),
            n * (_ROW + _length(tokens) * _ROW_TOKEN),
            n * self._prompt,
            n * _length(tokens),
        )

    def score(self) -> Stage:
        n = self._count("fit", "tune")
        tokens = self._recipe.answers.tokens
        return Stage(self._judgements(n, tokens), self._memory(), n * _ROW / 4, n * self._pair(tokens))

    def capture(self) -> Stage:
        answered = self._count("fit")
        n = answered + self.unanswered
        read = n * self._prompt + self.unanswered * _AROUND
        if self._model.writers:
            # Up to the last of some tokens at random.
            depth = ANSWER_TOKENS / (ANSWER_TOKENS + 1) * _length(self._recipe.answers.tokens)
            read += answered * _QUIET * depth
        rows = n + self._quiet(n, answered) + 2 * self._prefix  # the template's tokens are kept in F32
        outputs = self._model.n_layer * self._model.width
        disk = 4 * n * outputs + 2 * rows * self._inputs
        # A shard in F32, and the copies of one matrix that are made of it; at last the template's tokens.
        shard = max(min(SHARD, n) * (rows / n if n else 0), 2 * self._prefix)
        working = 4 * shard * (2 * self._inputs + outputs)
        return Stage(self._forward(n, read), self._memory() + working, disk, read)

    def fit(self) -> Stage:
        """Every block: a covariance and its factorisation for each estimator and fold, and for the gates."""
        n, model, recipe = self._count("fit"), self._model, self._recipe
        estimators = len(recipe.estimators)
        flops = estimators * _FACTORISATIONS * factorisation(n * _CLASS, model.width)
        every = n + self.unanswered
        rows = every + self._quiet(every, n) + self._prefix
        flops += sum(cholesky(rows, width) for width in model.writers.values())
        seconds = model.n_layer * flops / self._speed.algebra + estimators * _FIGURES
        widest = max([model.width, *model.writers.values()])
        working = 8 * (3 * rows * widest + 2 * min(rows, widest) ** 2)  # of one block
        arrays = 8 * estimators * len(recipe.fit.ridges) * model.n_layer * model.width
        arrays += 2 * 4 * len(recipe.fit.gate_ridges) * self._inputs
        return Stage(seconds, self._memory() + working, arrays)

    def tune(self) -> Stage:
        recipe, sizes = self._recipe, self.sizes["tune"]
        tokens, benign = recipe.answers.tokens, min(BENIGN, sizes["benign"])
        wanted = _CHANGED * sizes["sensitive"]
        opened = wanted + _KEPT * sizes["harmful"]
        asked = wanted + sizes["harmful"] + benign
        probe = self._forward(opened, opened * (self._prompt + OPENING), opened * OPENING)
        probe += self._drift(min(PROBED_PAIRS, benign), tokens)
        candidate = self._answers(asked, tokens) + self._judgements(_NEW * asked, tokens)
        candidate += self._drift(benign, tokens)
        probes: float = self._arms * (recipe.tune.trials + recipe.tune.finalists)
        candidates: float = self._arms * recipe.tune.finalists
        # At full length the unsteered model answers too, and each file at two strengths.
        full = (1 + 2 * self._arms) * sum(min(recipe.tune.full, size) for size in sizes.values())
        long = recipe.answers.test_tokens
        in_full = self._answers(full, long) + self._judgements(full, long)
        in_full += 2 * self._arms * self._drift(benign if full else 0, tokens)
        seconds = probes * probe + candidates * candidate
        if recipe.tune.budget is not None:
            share = max(0.0, recipe.tune.budget - in_full) / seconds if seconds else 0.0
            seconds, probes, candidates = share * seconds, share * probes, share * candidates
        return Stage(
            seconds + in_full,
            self._memory(logits=True),
            (probes + candidates) * _ROW + self._adapters() * probes / self._arms,
            (probes * opened + candidates * asked + full) * self._prompt,
            candidates * asked * _length(tokens) + full * _length(long),
        )

    def write(self) -> Stage:
        """The files, and the proof of each: whole passes, and some that end at the block they look at."""
        pair, four = (self._prefix + n * self._prompt for n in (2, 4))
        alone = (self._model.n_layer / 3 + 1) * pair  # a block of the vector's band
        if self._model.writers:
            alone += 12 * four  # six matrices, with and without the change
        read = 2 * self._arms * four + _DEPTH * alone
        vector = 4 * self._model.n_layer / 3 * self._model.width
        return Stage(self._forward(4, read), self._memory(logits=True), vector + self._adapters(), read)

    def measure(self) -> Stage:
        n, tokens = self._count("test"), self._recipe.answers.test_tokens
        sides = 1 + len(self._recipe.measure.baselines) + self._arms
        judged = n + _NEW * (sides - 1) * n
        seconds = sides * self._answers(n, tokens) + self._judgements(judged, tokens)
        seconds += sides * self._drift(min(_DRIFT, self.sizes["test"]["benign"]), tokens)
        return Stage(
            seconds,
            self._memory(logits=True),
            2 * sides * n * (_ROW + _length(tokens) * _ROW_TOKEN),
            sides * n * self._prompt,
            sides * n * _length(tokens),
        )

    # ---- what they are made of -------------------------------------------------------------------

    def _count(self, *splits: str) -> int:
        return sum(sum(self.sizes[split].values()) for split in splits)

    def _cells(self, tokens: int) -> int:
        """Of the cache, that a sequence with an answer of so many tokens holds."""
        return _PADDING * math.ceil((self._longest + tokens) / _PADDING)

    def _answers(self, n: float, tokens: int) -> float:
        """Seconds to answer n prompts with at most so many tokens each."""
        if n == 0:
            return 0.0
        slots = max(1, min(self._recipe.answers.parallel, _CONTEXT // self._cells(tokens)))
        context = self._prefix + self._prompt + tokens / 2
        steps = n * (_length(tokens) - 1)
        return self._speed.answering(self._model, n, n * self._prompt, steps, context, min(n, slots))

    def _forward(self, n: float, tokens: float, outputs: float = 0.0) -> float:
        """Seconds to read so many tokens in n sequences."""
        if n == 0:
            return 0.0
        return self._speed.reading(self._model, tokens, self._prefix + tokens / n, outputs)

    def _drift(self, n: float, tokens: int) -> float:
        answers = n * _length(tokens)
        return self._forward(n, n * self._prompt + answers, answers)

    def _pair(self, tokens: int) -> float:
        """Tokens that the judge reads of a prompt and an answer."""
        return min(self._text, _JUDGE_CUT / _BYTES_PER_TOKEN) + _length(tokens) + _JUDGE_ITEM

    def _judgements(self, n: float, tokens: int) -> float:
        if self._judge is None:
            return 0.0
        pair = self._pair(tokens)
        return self._judge.depth * self._speed.reading(self._judge.model, n * pair, _JUDGE_PREFIX + pair)

    def _memory(self, *, logits: bool = False) -> float:
        """Of the process with its models, and with the logits of half a batch, which the graph holds too."""
        model, answers = self._model, self._recipe.answers
        cells = max(self._cells(answers.tokens), self._cells(answers.test_tokens))
        slots = max(1, min(answers.parallel, _CONTEXT // cells))
        total = _PYTHON + model.weights + 2 * model.cache * (_CONTEXT + (slots + 1) * cells)
        if self._judge is not None and self._judge.model != model:
            total += self._judge.model.weights + 2 * self._judge.model.cache * _CONTEXT
        return total + (2 * 4 * _BATCH / 2 * model.n_vocab if logits else 0)

    @staticmethod
    def _quiet(n: float, answered: float) -> float:
        """Tokens of n prompts and their answers that are read besides the last of each prompt."""
        return n + ANSWER_TOKENS * _QUIET * answered

    def _adapters(self) -> float:
        """Bytes of an adapter for two blocks of three."""
        outputs = self._model.n_layer * self._model.width * len(self._model.writers)
        return 4 * (self._inputs + outputs) * 2 / 3


def _length(limit: int) -> float:
    """Mean tokens of answers that end by themselves, at a constant rate, or at a limit."""
    return _LENGTH * (1 - math.exp(-limit / _LENGTH))
