"""The engine for GGUF files: run many sequences at once in llama.cpp.

Token lists go in; answers, next-token logits, log-probabilities or internal tensors come out. Many sequences
share each `llama_decode`. Their common prefix (system prompt, few-shot examples) is decoded once. Results are
yielded as soon as they are ready, so a killed run loses only the current batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Can, Steering
from rs_gguf.engines.generation import (
    GREEDY,
    Enough,
    Pairs,
    Sampling,
    TokenLists,
    check_lengths,
    draw,
    group_by_length,
    join,
    never_enough,
    rest_of_draft,
    seeds,
)
from rs_gguf.engines.llama.context import BatchToken, LlamaContext
from rs_gguf.engines.llama.contexts import LlamaContexts, kv_cells
from rs_gguf.errors import InputError
from rs_gguf.records.conversation import Generation

# Outputs of a step that reads drafts. Logits of each are kept twice: 1.2 MB with a vocabulary of 150,000.
_OUTPUTS = 96
# Tokens of a draft in one step, or as many as have agreed so far. Those after a wrong one are read in vain.
_PIECE = 8


@dataclass
class _Answering:
    """An answer in progress: the index of its prompt, a draft, the source of its draws, its tokens so far."""

    index: int
    prompt: Sequence[int]
    draft: Sequence[int]
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)


class LlamaModel(LlamaContexts):
    """A GGUF file loaded in llama.cpp, as an `Engine`. Arguments and errors: `LlamaContexts`."""

    can: ClassVar[Can] = Can.LORA | Can.MATRIX_INPUTS | Can.LLAMA_CPP

    def generate(
        self, prompts: TokenLists, *, max_tokens: int, sampling: Sampling = GREEDY, drafts: TokenLists = (),
        enough: Enough = never_enough, reordered: bool = False,
    ) -> Iterator[tuple[int, Generation]]:  # fmt: skip
        """Answer many token lists at once; yield (index, answer) in the order in which they finish.

        A finished sequence makes room for the next one at once (continuous batching). Models with a state
        do not use drafts. `reordered` turns flash attention off, or on where the settings have it off.

        Raises:
            InputError: a prompt is empty or does not fit the context.
        """
        if not prompts:
            return
        if not all(prompts):
            raise InputError("an empty prompt cannot be answered: every prompt needs at least one token.")
        self.check_lengths(prompts, max_tokens)
        if self.has_state or not drafts:
            drafts = [()] * len(prompts)
        seed_of = seeds(prompts, sampling.seed)
        lengths = [len(prompt) + max_tokens for prompt in prompts]

        def similar(group: Sequence[int]) -> bool:
            return kv_cells(lengths[group[-1]]) <= 2 * kv_cells(lengths[group[0]])

        # All slots of a context are as long as its longest sequence, so one long prompt would leave room for
        # few others. llama.cpp also runs sequences of unequal length in several smaller steps.
        for group in group_by_length(lengths, len(lengths), similar):
            queue = deque(
                _Answering(i, prompts[i], drafts[i], np.random.default_rng(seed_of[i])) for i in group
            )
            longest = len(queue[-1].prompt) + max_tokens
            context = self._context_for_answers(longest, reordered=reordered)
            yield from self._generate(context, queue, max_tokens, sampling, enough)

    def check_lengths(self, sequences: Sequence[Sequence[int]], max_tokens: int = 0) -> None:
        """Raise `InputError` if a sequence and an answer of `max_tokens` together exceed `max_length`."""
        check_lengths(sequences, self.max_length, self.detokenize, max_tokens)

    def _generate(
        self,
        context: LlamaContext,
        queue: deque[_Answering],
        max_tokens: int,
        sampling: Sampling,
        enough: Enough,
    ) -> Iterator[tuple[int, Generation]]:
        """Answer the prompts of a queue, sorted by length, in one context."""
        prompts = [one.prompt for one in queue]
        prefix = context.share_prefix(prompts, len(prompts[0]) - 1)
        running: dict[int, _Answering] = {}  # by slot
        while queue or running:
            for slot in range(1, context.n_slots + 1):
                if queue and slot not in running:
                    running[slot] = queue.popleft()
                    context.begin(slot)
            context.close_gaps(running)
            guesses = _guesses(running, max_tokens)
            batch = []
            for slot, one in sorted(running.items()):
                known = [*one.prompt, *one.tokens]
                start = len(known) - 1 if one.tokens else prefix
                batch += [
                    BatchToken(t, pos, slot, pos >= len(known) - 1)
                    for pos, t in enumerate([*known[start:], *guesses[slot]], start=start)
                ]
            expected = {slot: iter(guess) for slot, guess in guesses.items()}
            ended: dict[int, bool] = {}  # {slot: whether the model ended the answer}
            for token, logits in context.decode(batch):
                slot = token.seq
                if slot not in expected:  # an earlier guess was wrong: this token does not follow the answer
                    continue
                one = running[slot]
                drawn = draw(logits, sampling, one.rng)
                finished = self._ends(drawn)
                if not finished:
                    one.tokens.append(drawn)
                if finished or len(one.tokens) >= max_tokens or enough(one.index, one.tokens):
                    ended[slot] = finished
                if slot in ended or next(expected[slot], None) != drawn:
                    del expected[slot]
            for slot, one in running.items():
                if guesses[slot]:
                    context.cut(slot, len(one.prompt) + len(one.tokens) - 1)  # the last token is not read yet
            for slot, finished in ended.items():
                context.end(slot)
                one = running.pop(slot)
                yield one.index, Generation(one.tokens, self.detokenize(one.tokens), finished)

    def stream(
        self, prompt: Sequence[int], steering: Steering, *, max_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yield the tokens of one answer as they are drawn, in a context of its own under `steering`.

        Streams under different steerings can take turns. Close an unfinished stream before the model.

        Raises:
            InputError: the prompt is empty or too long, or as in `steered`.
        """
        if not prompt:
            raise InputError("an empty prompt cannot be answered: give at least one token.")
        self.check_lengths([prompt], max_tokens)
        context = self._new_context(1, kv_cells(len(prompt) + max_tokens), unified=False)
        try:
            context.steer(self._active(steering))
            rng = np.random.default_rng(seeds([prompt], sampling.seed)[0])
            tokens, start = list(prompt), 0
            while len(tokens) < len(prompt) + max_tokens:
                last = len(tokens) - 1
                batch = [BatchToken(tokens[pos], pos, 1, pos == last) for pos in range(start, last + 1)]
                ((_, logits),) = context.decode(batch)
                drawn = draw(logits, sampling, rng)
                if self._ends(drawn):
                    return
                start = len(tokens)
                tokens.append(drawn)
                yield drawn
        finally:
            context.free()

    def _forward(
        self, sequences: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Decode whole sequences; yield (index, position, logits) for the positions `outputs[index]`."""
        context = self._open_context()
        prefix = context.share_prefix(sequences, min(map(min, outputs)))
        # The prefix takes cells too.
        limit = min(context.n_batch, context.n_cells - prefix)
        # For models with a recurrent state, llama.cpp splits batches of unequal lengths. The callback would
        # then get the rows of each part.
        at_once = 1 if self.has_state and context.graph.reads else self.n_parallel
        lengths = [len(sequence) - prefix for sequence in sequences]
        for group in group_by_length(lengths, at_once, lambda g: sum(lengths[i] for i in g) <= limit):
            batch = []
            for slot, i in enumerate(group, start=1):
                context.begin(slot)
                batch += [
                    BatchToken(t, pos, slot, pos in outputs[i])
                    for pos, t in enumerate(sequences[i][prefix:], start=prefix)
                ]
            for token, logits in context.decode(batch):
                yield group[token.seq - 1], token.pos, logits
            for slot in range(1, len(group) + 1):
                context.end(slot)

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, logits [V]) for the token after each prompt. The array is a view: copy to keep it."""
        if not prompts:
            return
        if not all(prompts):
            raise InputError("an empty prompt has no next token: every prompt needs at least one token.")
        self.check_lengths(prompts)
        for i, _, logits in self._forward(prompts, [(len(p) - 1,) for p in prompts]):
            yield i, logits

    def token_logprobs(self, pairs: Pairs) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Return log-probabilities [T] in nats and top-1 flags [T] of each (prompt, continuation)."""
        results = [(np.empty(len(a), dtype=np.float32), np.empty(len(a), dtype=np.bool_)) for _, a in pairs]
        for i, step, logits in self.answer_logits(pairs):
            token = pairs[i][1][step]
            top = float(logits.max())
            logsumexp = top + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
            results[i][0][step] = float(logits[token]) - logsumexp
            results[i][1][step] = logits[token] == top
        return results

    def answer_logits(self, pairs: Pairs) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield (index, step, logits [V]) that predict each token of the continuations; see `Engine`."""
        if not pairs:
            return
        sequences = join(pairs)
        self.check_lengths(sequences)
        answers = [range(len(p) - 1, len(s)) for (p, _), s in zip(pairs, sequences, strict=True)]
        for i, position, logits in self._forward(sequences, answers):
            yield i, position - answers[i].start, logits

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
        matrices: Sequence[str] = (),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {tensor: [L, width]}) for each of `positions[index]` of each sequence.

        The rows are copied during evaluation. See `Engine.read`.

        Raises:
            InputError: a sequence is empty or has no position, no layer is given, or a tensor is missing.
        """
        if not sequences:
            return
        wanted = [f"{name}-{layer}" for name in tensors for layer in layers] + [*matrices]
        if not (wanted and all(sequences) and all(positions)):
            raise InputError(
                "nothing to read: give at least one layer, and for every sequence a token and a position."
            )
        self.check_lengths(sequences)
        graph = self._open_context().graph
        with graph.reading(wanted):
            for i, position, _ in self._forward(sequences, positions):
                rows = graph.take()
                missing = [name for name in wanted if name not in rows]
                if missing:
                    raise InputError(
                        f"cannot read activations of architecture {self.architecture!r} in llama.cpp: its "
                        f"graph has no tensor {missing[0]} with one row per token. Use another model."
                    )
                stacked = {n: np.stack([rows[f"{n}-{layer}"] for layer in layers]) for n in tensors if layers}
                yield i, position, stacked | {name: rows[name] for name in matrices}


def _guesses(running: Mapping[int, _Answering], max_tokens: int) -> dict[int, Sequence[int]]:
    """Return by slot the tokens of its draft that the next step reads, perhaps none."""
    rests = {slot: rest_of_draft(one.draft, one.tokens, max_tokens) for slot, one in running.items()}
    share = max(0, _OUTPUTS - len(running)) // max(1, sum(map(bool, rests.values())))
    guesses = {
        slot: rest[: min(share, max(_PIECE, len(running[slot].tokens)))] for slot, rest in rests.items()
    }
    # llama.cpp computes guesses after the next tokens of all answers, in a batch of their own or with new
    # prompts. A batch that is smaller than the one for all answers would take more time for a token.
    begun = [slot for slot, one in running.items() if one.tokens]
    if sum(len(guesses[slot]) for slot in begun) < len(running):
        guesses |= dict.fromkeys(begun, ())
    return guesses
