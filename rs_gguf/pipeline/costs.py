"""Estimate the parts of a run's cost: tokens read and answered, judgements, memory.

A recipe, the prompts that it chooses from, the `ModelDimensions` of its model and the `Speed` of the machine
go in; `Costs` comes out. Each stage computes its `Cost` from it, beside its work. Prompts are measured in
bytes, so no tokenizer is needed. The errors of earlier plans are in docs/lab/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rs_gguf.activations.capture import ANSWER_TOKENS
from rs_gguf.engines.engine import Can
from rs_gguf.engines.llama.contexts import kv_cells
from rs_gguf.methods import suited_methods
from rs_gguf.models.dimensions import ModelDimensions
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.speed import JudgeModel, Speed, pair_tokens, tokens_of
from rs_gguf.records.conversation import Prompt

Pool = Mapping[str, Mapping[str, Sequence[Prompt]]]

# Assumptions about models and prompts.
CHANGED, KEPT = 0.35, 0.5  # share of sensitive prompts whose verdict to change; of harmful ones refused
NEW = 0.6  # share of the steered answers that the judge has not judged before; it caches its judgements
_LENGTH = 85  # mean tokens of an answer without a limit
_PREFIX, _TEMPLATE = 25, 6  # tokens that a chat template puts before all prompts, and after each
_PYTHON = 0.6e9  # bytes of a process with its libraries but without a model

ROW, ROW_TOKEN = 320, 11  # bytes of a row with its prompt, and of each token of its answer


@dataclass(frozen=True)
class Cost:
    """The cost of a stage: seconds, peak memory in bytes, disk space in bytes, tokens read and answered."""

    seconds: float
    memory: float
    disk: float
    read: float = 0.0
    answered: float = 0.0


class Costs:
    """The parts of a run's cost.

    pool: the prompts that the run chooses from, by split and kind.
    judge: the judge, if it is a model on this machine; None if judging costs this machine nothing.
    """

    def __init__(
        self, recipe: Recipe, pool: Pool, model: ModelDimensions, speed: Speed, judge: JudgeModel | None
    ) -> None:
        self.recipe, self.model, self.speed, self._judge = recipe, model, speed, judge
        self.sizes = {
            split: {kind: min(getattr(recipe.prompts, split), len(rows)) for kind, rows in kinds.items()}
            for split, kinds in pool.items()
        }
        read = recipe.prompts.gate_only if model.output_matrices else 0
        self.gate_only: int = sum(
            min(read, len(rows) - self.sizes["fit"][kind]) for kind, rows in pool["fit"].items()
        )
        lengths = [tokens_of(p.prompt) for kinds in pool.values() for rows in kinds.values() for p in rows]
        self.prefix = _PREFIX + tokens_of(recipe.prompts.system or "")
        self.text = fmean(lengths)
        self.prompt = self.text + _TEMPLATE
        self._longest = max(lengths) + _TEMPLATE + self.prefix
        # A model whose output matrices are not known runs in PyTorch, or has none that an adapter can change.
        can = Can.LORA | Can.MATRIX_INPUTS if model.output_matrices else Can(0)
        self.files = len(suited_methods(can, recipe.effect))
        self.inputs = model.matrix_inputs

    def count(self, *splits: str) -> int:
        """Return the number of prompts of these splits."""
        return sum(sum(self.sizes[split].values()) for split in splits)

    def answers(self, n: float, limit: int) -> float:
        """Return the seconds to answer n prompts with at most `limit` tokens each."""
        return n * (self.prompt * self.speed.begin + (mean_length(limit) - 1) * self.speed.answer)

    def reading(self, tokens: float) -> float:
        """Return the seconds to read `tokens` tokens."""
        return tokens * self.speed.read

    def drift(self, n: float, limit: int) -> float:
        """Return the seconds to read n prompts with their answers."""
        return self.reading(n * (self.prompt + mean_length(limit)))

    def judgements(self, n: float, limit: int) -> float:
        """Return the seconds to judge n answers of at most `limit` tokens each."""
        return n * self.pair(limit) * self.speed.judge

    def pair(self, limit: int) -> float:
        """Return the tokens that the judge reads of a prompt and an answer."""
        return pair_tokens(self.text, mean_length(limit))

    def memory(self, *, logits: bool = False) -> float:
        """Return the bytes of the process with its models; `logits` adds two copies for half a batch."""
        model, answers, engine = self.model, self.recipe.answers, self.recipe.engine
        cells: int = kv_cells(
            math.ceil(self._longest + max(answers.fit_tokens, answers.tokens, answers.test_tokens))
        )
        slots = max(1, min(answers.parallel, engine.ctx_size // cells))
        total: float = _PYTHON + model.weights
        total += engine.cache_bytes * model.cache * (engine.ctx_size + (slots + 1) * cells)
        if self._judge is not None and (judge := self._judge.model) != model:
            total += judge.weights + engine.cache_bytes * judge.cache * engine.ctx_size
        return total + (2 * 4 * engine.batch_size / 2 * model.n_vocab if logits else 0)

    def other_tokens(self) -> float:
        """Return the number of tokens of prompts and answers to read besides the last one of each prompt.

        The answer of a refused sensitive prompt is not read, since the gate may be active there.
        """
        answered = self.count("fit")
        return answered + self.gate_only + ANSWER_TOKENS * (1 - CHANGED / 3) * answered

    def adapter(self) -> float:
        """Return the bytes of an adapter for two thirds of the layers."""
        model = self.model
        outputs = model.width * sum(map(len, model.all_matrices.values()))
        return 4 * (self.inputs + outputs) * 2 / 3


def mean_length(limit: int) -> float:
    """Return the mean tokens of answers that end at a constant rate, or at `limit` tokens."""
    return _LENGTH * (1 - math.exp(-limit / _LENGTH))
