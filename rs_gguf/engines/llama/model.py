"""A GGUF model in llama.cpp that works on many sequences at once: what the rest of the package uses.

Token lists go in; answers, next-token logits, log-probabilities or internal activations come out.
Many sequences share each `llama_decode`, their common prefix (system prompt, few-shot examples) is
decoded once, and results are yielded as they are ready so that a killed run loses only the batch in
flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import ClassVar

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Can
from rs_gguf.engines.generation import GREEDY, Sampling, check_lengths, draw, groups, joined, seeds
from rs_gguf.engines.llama.context import BatchToken
from rs_gguf.engines.llama.contexts import LlamaContexts, kv_cells
from rs_gguf.errors import InputError
from rs_gguf.records.conversation import Generation


class LlamaModel(LlamaContexts):
    """A loaded GGUF file that works on many sequences at once. Arguments and errors: `LlamaContexts`."""

    can: ClassVar[Can] = Can.LORA | Can.MATRIX_INPUTS | Can.LLAMA_CPP

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> Iterator[tuple[int, Generation]]:
        """Answer token lists, many at a time; yield (index, answer) in the order they finish.

        A sequence that ends makes room for the next one at once (continuous batching).

        Raises:
            InputError: an empty prompt, or one that does not fit the context.
        """
        if not prompts:
            return
        if not all(prompts):
            raise InputError("an empty prompt cannot be answered: every prompt needs at least one token.")
        self.check_lengths(prompts, max_tokens)
        seed_of = seeds(prompts, sampling.seed)
        whole = [len(prompt) + max_tokens for prompt in prompts]
        # All slots of a context are as long as its longest sequence: beside one long prompt few others would
        # have room. And llama.cpp runs sequences of unequal length in several smaller steps.
        for alike in groups(whole, len(whole), lambda g: kv_cells(whole[g[-1]]) <= 2 * kv_cells(whole[g[0]])):
            some = [prompts[i] for i in alike]
            for k, found in self._generate(some, max_tokens, sampling, [seed_of[i] for i in alike]):
                yield alike[k], found

    def check_lengths(self, sequences: Sequence[Sequence[int]], max_tokens: int = 0) -> None:
        """Raise `InputError` if a sequence and an answer of `max_tokens` do not fit `max_length`."""
        check_lengths(sequences, self.max_length, self.detokenize, max_tokens)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling,
        seed_of: Sequence[tuple[int, ...]],
    ) -> Iterator[tuple[int, Generation]]:
        """`generate` in one context, for prompts by their length."""
        context = self._context_for_answers(len(prompts[-1]) + max_tokens)
        prefix = context.share_prefix(prompts, len(prompts[0]) - 1)
        queue = deque(range(len(prompts)))
        running: dict[int, int] = {}  # slot → index of prompt
        answers: dict[int, list[int]] = {}
        draws: dict[int, np.random.Generator] = {}
        while queue or running:
            for slot in range(1, context.n_slots + 1):
                if queue and slot not in running:
                    i = running[slot] = queue.popleft()
                    answers[i], draws[i] = [], np.random.default_rng(seed_of[i])
                    context.begin(slot)
            context.close_gaps(running)
            batch = []
            for slot, i in sorted(running.items()):
                known = [*prompts[i], *answers[i]]
                start = len(known) - 1 if answers[i] else prefix
                batch += [
                    BatchToken(t, pos, slot, pos == len(known) - 1)
                    for pos, t in enumerate(known[start:], start=start)
                ]
            for token, logits in context.decode(batch):
                i = running[token.seq]
                drawn = draw(logits, sampling, draws[i])
                finished = self._ends(drawn)
                if not finished:
                    answers[i].append(drawn)
                if finished or len(answers[i]) >= max_tokens:
                    context.end(token.seq)
                    del running[token.seq], draws[i]
                    tokens = answers.pop(i)
                    yield i, Generation(tokens, self.detokenize(tokens), finished)

    def _forward(
        self, sequences: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Decode whole sequences; yield (index, position, logits) for the positions `outputs[index]`."""
        context = self._open_context()
        prefix = context.share_prefix(sequences, min(map(min, outputs)))
        # The prefix fills cells too.
        limit = min(context.n_batch, context.n_cells - prefix)
        # llama.cpp cuts batches of models with a recurrent state where lengths differ, and the callback sees
        # rows of each piece.
        uneven = llama_cpp.llama_model_is_hybrid(self.handle) or llama_cpp.llama_model_is_recurrent(
            self.handle
        )
        at_once = 1 if uneven and context.graph.reads else self.n_parallel
        lengths = [len(sequence) - prefix for sequence in sequences]
        for group in groups(lengths, at_once, lambda g: sum(lengths[i] for i in g) <= limit):
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
        """Yield (index, logits [V]) of the token after each prompt. The array is a view: copy to keep it."""
        if not prompts:
            return
        if not all(prompts):
            raise InputError("an empty prompt has no next token: every prompt needs at least one token.")
        self.check_lengths(prompts)
        for i, _, logits in self._forward(prompts, [(len(p) - 1,) for p in prompts]):
            yield i, logits

    def token_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """For each (prompt, continuation): log-probabilities [T] of its tokens, and which are top-1 [T]."""
        if not pairs:
            return []
        sequences = joined(pairs)
        self.check_lengths(sequences)
        results = [(np.empty(len(a), dtype=np.float32), np.empty(len(a), dtype=np.bool_)) for _, a in pairs]
        answers = [range(len(p) - 1, len(s)) for (p, _), s in zip(pairs, sequences, strict=True)]
        for i, pos, logits in self._forward(sequences, answers):
            prompt, answer = pairs[i]
            step = pos - len(prompt) + 1
            top = float(logits.max())
            logsumexp = top + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
            results[i][0][step] = float(logits[answer[step]]) - logsumexp
            results[i][1][step] = logits[answer[step]] == top
        return results

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {tensor: [L, width]}) for each of `positions[index]` of each sequence.

        They are copied during evaluation. See `Engine.read`.

        Raises:
            InputError: an empty sequence, no layer, or a graph without a tensor of that name.
        """
        if not sequences:
            return
        if not (layers and all(sequences) and all(positions)):
            raise InputError(
                "nothing to read: it takes a layer, and of every sequence a token and a position."
            )
        self.check_lengths(sequences)
        wanted = [(name, layer) for name in tensors for layer in layers]
        graph = self._open_context().graph
        with graph.reading(wanted):
            for i, position, _ in self._forward(sequences, positions):
                found = graph.take()
                missing = set(wanted) - found.keys()
                if missing:
                    tensor, layer = min(missing)
                    raise InputError(
                        f"architecture {self.architecture!r} has no tensor {tensor}-{layer} with one row a "
                        "token in its graph, so its activations cannot be read through llama.cpp."
                    )
                yield i, position, {n: np.stack([found[n, layer] for layer in layers]) for n in tensors}

    def graph_tensors(self) -> list[str]:
        """Names of the tensors of this model's graph, such as `l_out-3`, in the order of evaluation."""
        with self._open_context().graph.listing() as names:
            for _ in self.next_logits([[0]]):
                pass
        return names
