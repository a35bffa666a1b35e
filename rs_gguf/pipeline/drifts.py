"""How far each condition of a run moves the unsteered answers to benign prompts.

The unsteered answers and a condition go in, a `Drift` comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rs_gguf.engines.answers import chat_tokens, logprobs_of
from rs_gguf.engines.engine import Engine, LogProbs
from rs_gguf.evaluation.condition import Condition, JudgedAnswers
from rs_gguf.evaluation.drift import Drift, changes_of, drift_interval, drift_of, is_drift_reference
from rs_gguf.evaluation.kl import CONVERSATIONS, Tokens, conversations
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import Prompt

DRIFT_PAIRS = 128  # conversations, as in the paper


class BenignDrifts:
    """How far a condition moves the unsteered answers to benign prompts.

    The unsteered answers were given under the recipe's own system prompt, so their log-probabilities are
    known once. `of`: the drift by condition.
    """

    def __init__(
        self, model: Engine, prompts: Sequence[Prompt], before: JudgedAnswers, recipe: Recipe
    ) -> None:
        self._model, self._seed, self._system = model, recipe.seed, recipe.prompts.system
        answers = {
            prompt.id: answer
            for prompt, answer, judgement in zip(prompts, before.answers, before.judgements, strict=True)
            if prompt.kind == "benign" and is_drift_reference(answer, judgement)
        }
        # Prompts lie sorted by subject: the first of them would be of a few.
        references = [p for p in prompts if p.id in answers]
        self._prompts = stratified(references, DRIFT_PAIRS, seed=recipe.seed)
        self._by_id = answers
        self._answers = [answers[prompt.id] for prompt in self._prompts]
        self._before = self._logprobs(self._system)
        self._changes: dict[str, list[float]] = {}
        self.of: dict[str, Drift] = {}

    def under(self, condition: Condition) -> Drift:
        """Measure and return the drift under a condition."""
        with self._model.steered(condition.steering):
            after = self._logprobs(condition.system)
        self._changes[condition.name] = changes_of(self._before, after).tolist()
        self.of[condition.name] = drift_of(self._before, after)
        return self.of[condition.name]

    def conversations(self) -> Sequence[Tokens]:
        """Return a few of the conversations as tokens, for the KL divergence."""
        prompts = stratified(self._prompts, CONVERSATIONS, seed=self._seed)
        tokens = chat_tokens(self._model, prompts, self._system)
        return conversations(self._model, tokens, [self._by_id[prompt.id] for prompt in prompts])

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95% interval of the drift of a condition, in nats a token."""
        return drift_interval(self._prompts, self._changes[name], self._seed)

    def _logprobs(self, system: str | None) -> LogProbs:
        return logprobs_of(self._model, self._prompts, self._answers, system)
