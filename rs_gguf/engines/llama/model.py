"""A GGUF model in llama.cpp that works on many sequences at once: what the rest of the package uses.

Token lists go in; answers, next-token logits, log-probabilities or internal activations come out.
Many sequences share each `llama_decode`, their common prefix (system prompt, few-shot examples) is
decoded once, and results are yielded as they are ready so that a killed run loses only the batch in
flight.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.generation import GREEDY, Sampling, check_lengths, draw, joined, seeds
from rs_gguf.engines.llama.context import BatchToken, InForce, LlamaContext
from rs_gguf.engines.llama.file import LlamaFile
from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores
from rs_gguf.models.architecture import FIRST_STEERABLE
from rs_gguf.records.conversation import Generation


class LlamaModel(LlamaFile):
    """A loaded GGUF file and the contexts that it is run in.

    Forward passes over whole sequences share one unified cache, where a common prefix costs nothing.
    Answers use a cache with a stream for each sequence: there a token attends to its own sequence's cells
    only, not to those of all others with a mask over them.

    A sequence has at most `max_length` tokens: `n_ctx`, or those that the model was trained on if they are
    fewer. Beyond them it has no positions (GPT-2), or answers what it never learned.

    Args:
        path: a GGUF file.
        n_parallel: sequences that are answered at once.
        n_ctx: cells of the key/value cache, shared by all sequences. Bounds the memory.
        n_threads: CPU threads; all that this process may use by default.

    Raises:
        InputError: the file cannot be loaded (see `LlamaFile`), or there is no memory for the context.
    """

    def __init__(
        self, path: Path, *, n_parallel: int = 32, n_ctx: int = 8192, n_threads: int | None = None
    ) -> None:
        super().__init__(path)
        self.n_parallel = n_parallel
        self.n_ctx = n_ctx
        self.max_length: int = min(n_ctx, llama_cpp.llama_model_n_ctx_train(self.handle))
        self._n_threads = n_threads or usable_cores()
        self._steering = InForce()
        self._forward_context: LlamaContext | None = None
        self._answer_context: LlamaContext | None = None
        try:
            self._forward_context = self._new_context(n_parallel, n_ctx, unified=True)
        except BaseException:
            self.close()
            raise

    def _new_context(self, n_slots: int, n_cells: int, *, unified: bool) -> LlamaContext:
        n_batch = min(512, self.n_ctx)
        context = LlamaContext(
            self, n_slots, n_cells, unified=unified, n_batch=n_batch, n_threads=self._n_threads
        )
        try:
            context.steer(self._steering)
        except BaseException:
            context.free()
            raise
        return context

    def _context_for_answers(self, longest: int) -> LlamaContext:
        """A context whose sequences hold `longest` tokens, as many at once as `n_ctx` cells allow."""
        n_cells = _cells(longest)
        n_slots = max(1, min(self.n_parallel, self.n_ctx // n_cells))
        context = self._answer_context
        if context is None or context.n_cells < n_cells or context.n_slots < n_slots:
            if context is not None:
                self._answer_context = None
                context.free()
            self._answer_context = context = self._new_context(n_slots, n_cells, unified=False)
        return context

    def close(self) -> None:
        """Free the contexts and the weights. The object is of no use afterwards."""
        for context in self._contexts():
            context.free()
        self._forward_context = self._answer_context = None
        super().close()

    def _contexts(self) -> list[LlamaContext]:
        return [c for c in (self._forward_context, self._answer_context) if c is not None]

    # ---- steering --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steered(
        self,
        directions: Mapping[int, NDArray[np.float32]] | None = None,
        *,
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> Iterator[None]:
        """Within the block, add `directions[l]` [D] to the output of block l, and apply LoRA `adapters`.

        The same C calls that `--control-vector` and `--lora` end in. The cache is cleared on the way in
        and out: its cells were computed under the other steering. The scales of one file add up.

        Raises:
            InputError: a width or a layer that the model does not have, or a file it cannot use.
        """
        buffer = self._buffer(directions) if directions else None
        scales: dict[Path, float] = {}
        for path, scale in adapters:
            # llama.cpp's programs load a file that is given twice twice; of one handle only one scale counts.
            scales[path.resolve()] = scales.get(path.resolve(), 0.0) + scale
        steering = InForce(buffer, tuple((self._adapter(path), scale) for path, scale in scales.items()))
        try:
            self._apply(steering)
            yield
        finally:
            self._apply(InForce())

    def _buffer(self, directions: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float32]:
        # It starts at the first such block, and a shorter one would leave older values behind.
        buffer = np.zeros((self.n_layer - FIRST_STEERABLE, self.n_embd), dtype=np.float32)
        for layer, direction in directions.items():
            if not FIRST_STEERABLE <= layer < self.n_layer:
                raise InputError(
                    f"layer {layer} cannot be steered: this model has blocks 1 to {self.n_layer - 1} "
                    "(llama.cpp never steers block 0)."
                )
            if np.shape(direction) != (self.n_embd,):
                raise InputError(
                    f"layer {layer}: direction of shape {np.shape(direction)}, but {self.path.name} has "
                    f"width {self.n_embd}. The vector belongs to another model."
                )
            buffer[layer - FIRST_STEERABLE] = direction
        return buffer

    def _apply(self, steering: InForce) -> None:
        self._steering = steering
        for context in self._contexts():
            context.steer(steering)
        self._free_adapters([handle for handle, _ in steering.adapters])

    # ---- batches ---------------------------------------------------------------------------------

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
        for alike in _of_like_length([len(prompt) + max_tokens for prompt in prompts]):
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

    def _open_context(self) -> LlamaContext:
        """That of forward passes; `InputError` after `close`."""
        if self._forward_context is None:
            raise InputError(f"{self.path.name} was closed.")
        return self._forward_context

    def _forward(
        self, sequences: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Decode whole sequences; yield (index, position, logits) for the positions `outputs[index]`."""
        context = self._open_context()
        prefix = context.share_prefix(sequences, min(map(min, outputs)))
        # The prefix fills cells too.
        limit = min(context.n_batch, context.n_cells - prefix)
        # Of like length together, so that a batch is well filled.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        # llama.cpp cuts batches of models with a recurrent state where lengths differ, and the callback sees
        # rows of each piece.
        uneven = llama_cpp.llama_model_is_hybrid(self.handle) or llama_cpp.llama_model_is_recurrent(
            self.handle
        )
        at_once = 1 if uneven and context.graph.reads else self.n_parallel
        start = 0
        while start < len(order):
            group: list[int] = []
            size = 0
            while start < len(order) and len(group) < at_once:
                length = len(sequences[order[start]]) - prefix
                if group and size + length > limit:
                    break
                group.append(order[start])
                size += length
                start += 1
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

    def activations(
        self, prompts: Sequence[Sequence[int]], *, layers: Sequence[int], tensors: Sequence[str] = ("l_out",)
    ) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, {tensor: [L, width]}) at the last token of each prompt, read during evaluation.

        `l_out` is the output of a block (method §2). Steering in force is included in what is read.

        Raises:
            InputError: an empty prompt, no layer, or a graph without a tensor of that name.
        """
        last = [(len(p) - 1,) for p in prompts]
        for i, _, found in self.token_activations(prompts, last, layers=layers, tensors=tensors):
            yield i, found

    def token_activations(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        *,
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {tensor: [L, width]}) for each of `positions[index]` of each sequence.

        Blocks after the deepest of `layers` are not computed. The errors are those of `activations`.
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


def _cells(length: int) -> int:
    """Of a sequence in the cache: llama.cpp pads a stream to a multiple."""
    return -(-length // 256) * 256


def _of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by length, those together of which none takes more than twice the cells of another.

    All slots of a context are as long as its longest sequence: beside one long prompt few others would have
    room. And llama.cpp runs sequences of unequal length in several smaller steps.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    for k, i in enumerate(order):
        if _cells(lengths[i]) > 2 * _cells(lengths[order[start]]):
            yield order[start:k]
            start = k
    yield order[start:]
