"""The one place that touches llama.cpp: a loaded model, its steering, and batches of sequences.

Token lists go in; answers, next-token logits, log-probabilities or internal activations come out.
Many sequences share each `llama_decode`, their common prefix (system prompt, few-shot examples) is
decoded once and its cells are shared, and results are yielded as they are ready so that a killed run
loses only the batch in flight.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from rs_gguf import widening
from rs_gguf.errors import InputError
from rs_gguf.generation import Generation, Sampling, common_prefix, draw
from rs_gguf.graph import GraphReader

_log = logging.getLogger("rs_gguf.llama")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h, which the binding does not name
_recent_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: object) -> None:
    message = text.decode("utf-8", "replace").strip()
    if level == _ERROR and message:
        _recent_errors.append(message)
    _log.debug(message)


def build() -> str:
    """Which llama.cpp this is: the binding's version and the CPU features it was built with."""
    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return f"llama-cpp-python {llama_cpp.__version__} ({features})"


@dataclass(frozen=True)
class _Token:
    id: int
    pos: int
    seq: int
    output: bool


@dataclass(frozen=True)
class _Steering:
    """What is in force: directions [L − 1, D] from block 1 on, and adapters (handle, scale)."""

    buffer: NDArray[np.float32] | None
    adapters: tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class _Context:
    """A llama.cpp context for `n_slots` sequences besides sequence 0, which holds the shared prefix."""

    handle: Any
    n_slots: int
    n_cells: int  # that one sequence may use

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.handle)


class LlamaModel:
    """A GGUF model in llama.cpp that works on many sequences at once.

    Forward passes over whole sequences share one unified cache, where a common prefix costs nothing.
    Answers use a cache with a stream for each sequence: there a token attends to its own sequence's cells
    only, not to those of all others with a mask over them.

    Args:
        path: a GGUF file.
        n_parallel: sequences that are answered at once.
        n_ctx: cells of the key/value cache, shared by all sequences. Bounds the memory.
        n_threads: CPU threads; all that this process may use by default.

    Raises:
        InputError: the file is missing, no GGUF, truncated, of an unknown architecture, or there is
            not enough memory for the weights or the context. The message carries llama.cpp's own words.
    """

    def __init__(
        self, path: Path, *, n_parallel: int = 32, n_ctx: int = 8192, n_threads: int | None = None
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"model file not found: {path}. Give a GGUF file, or see `rs-export models list`."
            )
        self.n_parallel = n_parallel
        self._model: Any = None
        self._forward_context: _Context | None = None
        self._answer_context: _Context | None = None
        self._batch: Any = None
        self._steering = _Steering(None, ())
        self._adapters: dict[str, Any] = {}
        self._graph = GraphReader()
        llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        # A copy that is faster takes more memory than the model itself.
        for file in dict.fromkeys([widening.file_to_load(self.path), self.path]):
            _recent_errors.clear()
            self._model = llama_cpp.llama_model_load_from_file(
                os.fsencode(file), llama_cpp.llama_model_default_params()
            )
            if self._model:
                break
        if not self._model:
            raise InputError(_loader_failure(f"llama.cpp cannot load {self.path}"))
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama_cpp.llama_model_n_layer(self._model)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self._model)
        self.metadata = self._read_metadata()
        self.architecture = self.metadata.get("general.architecture", "unknown")
        self.n_ctx = n_ctx
        self._n_threads = n_threads or _usable_cores()
        self._n_batch = min(512, n_ctx)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        try:
            self._forward_context = self._new_context(n_parallel, n_ctx, unified=True)
        except InputError:
            self.close()
            raise

    def _new_context(self, n_slots: int, n_cells: int, *, unified: bool) -> _Context:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_cells if unified else n_cells * (n_slots + 1)
        # One physical batch per call keeps the callback's rows in the order they were given.
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_seq_max = n_slots + 1
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = self._n_threads
        params.no_perf = True
        if unified:
            params.cb_eval = self._graph.callback
        handle = llama_cpp.llama_init_from_model(self._model, params)
        if not handle:
            raise InputError(
                _loader_failure(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {self.path}")
                + " Use a smaller model or a smaller context."
            )
        context = _Context(handle, n_slots, n_cells)
        self._steer(context)
        return context

    def _context_for_answers(self, longest: int) -> _Context:
        """A context whose sequences hold `longest` tokens, as many at once as `n_ctx` cells allow."""
        n_cells = -(-longest // 256) * 256  # llama.cpp pads a stream to this anyway
        n_slots = max(1, min(self.n_parallel, self.n_ctx // n_cells))
        context = self._answer_context
        if context is None or context.n_cells < n_cells or context.n_slots < n_slots:
            self._free(context)
            self._answer_context = None
            self._answer_context = context = self._new_context(n_slots, n_cells, unified=False)
        return context

    @staticmethod
    def _free(context: _Context | None) -> None:
        if context is not None:
            llama_cpp.llama_free(context.handle)

    def _read_metadata(self) -> dict[str, str]:
        def text(read: Callable[..., int], index: int) -> str:
            size = read(self._model, index, None, 0) + 1
            buffer = ctypes.create_string_buffer(size)
            read(self._model, index, buffer, size)
            return buffer.value.decode("utf-8", "replace")

        return {
            text(llama_cpp.llama_model_meta_key_by_index, i): text(
                llama_cpp.llama_model_meta_val_str_by_index, i
            )
            for i in range(llama_cpp.llama_model_meta_count(self._model))
        }

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template in the file's metadata, if any."""
        return self.metadata.get("tokenizer.chat_template")

    def token_text(self, token: int) -> str:
        """The literal text of one token, special ones included."""
        return self.detokenize([token], special=True)

    @property
    def bos_token(self) -> str:
        return self._special(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_token(self) -> str:
        return self._special(llama_cpp.llama_vocab_eos(self._vocab))

    def _special(self, token: int) -> str:
        return self.token_text(token) if token >= 0 else ""

    def close(self) -> None:
        """Free the context and the weights. The object is of no use afterwards."""
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
            self._batch = None
        self._free(self._forward_context)
        self._free(self._answer_context)
        self._forward_context = self._answer_context = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- text and tokens -------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of `text`. With `special`, control tokens written out in it are recognised."""
        data = text.encode("utf-8")
        size = len(data) + 8
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, special)
        return list(buffer[:count])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are left out unless `special`."""
        if not tokens:
            return ""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        size = 32 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_detokenize(self._vocab, array, len(tokens), buffer, size, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

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
        and out: its cells were computed under the other steering.

        Raises:
            InputError: a width or a layer that the model does not have, or a file it cannot use.
        """
        buffer = self._buffer(directions) if directions else None
        steering = _Steering(buffer, tuple((self._adapter(path), scale) for path, scale in adapters))
        try:
            self._apply(steering)
            yield
        finally:
            self._apply(_Steering(None, ()))

    def _buffer(self, directions: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float32]:
        # It starts at block 1, and a shorter one would leave older values behind.
        buffer = np.zeros((self.n_layer - 1, self.n_embd), dtype=np.float32)
        for layer, direction in directions.items():
            if not 1 <= layer < self.n_layer:
                raise InputError(
                    f"layer {layer} cannot be steered: this model has blocks 1 to {self.n_layer - 1} "
                    "(llama.cpp never steers block 0)."
                )
            if np.shape(direction) != (self.n_embd,):
                raise InputError(
                    f"layer {layer}: direction of shape {np.shape(direction)}, but {self.path.name} has "
                    f"width {self.n_embd}. The vector belongs to another model."
                )
            buffer[layer - 1] = direction
        return buffer

    def _apply(self, steering: _Steering) -> None:
        self._steering = steering
        for context in (self._forward_context, self._answer_context):
            if context is not None:
                self._steer(context)

    def _steer(self, context: _Context) -> None:
        """Put the steering in force on a context and clear its cache, which another one had filled."""
        buffer, adapters = self._steering.buffer, self._steering.adapters
        pointer = None if buffer is None else buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = self.n_embd * (self.n_layer - 1)
        status = llama_cpp.llama_set_adapter_cvec(
            context.handle, pointer, size, self.n_embd, 1, self.n_layer - 1
        )
        if status != 0:
            raise InputError(_loader_failure("llama.cpp refused the control vector"))
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(h for h, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        if llama_cpp.llama_set_adapters_lora(context.handle, handles, len(adapters), scales) != 0:
            raise InputError(_loader_failure("llama.cpp refused the adapter"))
        llama_cpp.llama_memory_clear(context.memory, False)

    def _adapter(self, path: Path) -> Any:
        if not path.is_file():
            raise InputError(f"adapter file not found: {path}.")
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_mtime_ns}:{stat.st_size}"
        if key not in self._adapters:
            _recent_errors.clear()
            handle = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not handle:
                raise InputError(_loader_failure(f"llama.cpp cannot load the adapter {path}"))
            self._adapters[key] = handle
        return self._adapters[key]

    # ---- batches ---------------------------------------------------------------------------------

    def _decode(
        self, context: _Context, tokens: Sequence[_Token]
    ) -> Iterator[tuple[_Token, NDArray[np.float32]]]:
        """Run `tokens`; yield those marked `output` with a view of their logits [V], valid until the next."""
        batch = self._batch
        for start in range(0, len(tokens), self._n_batch):
            chunk = tokens[start : start + self._n_batch]
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i] = token.id
                batch.pos[i] = token.pos
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = token.seq
                batch.logits[i] = token.output
            outputs = [i for i, token in enumerate(chunk) if token.output]
            if self._graph.reads:
                self._graph.expect(len(chunk), outputs)
            status = llama_cpp.llama_decode(context.handle, batch)
            if status != 0:
                raise InputError(
                    _loader_failure(
                        f"llama.cpp could not decode a batch of {len(chunk)} tokens (status {status})"
                    )
                )
            for i in outputs:
                pointer = llama_cpp.llama_get_logits_ith(context.handle, i)
                yield chunk[i], np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def _share_prefix(self, context: _Context, sequences: Sequence[Sequence[int]], at_most: int) -> int:
        """Clear the cache, decode the sequences' common prefix as sequence 0, return its length."""
        llama_cpp.llama_memory_clear(context.memory, False)
        length = min(common_prefix(sequences), at_most)
        prefix = [_Token(t, i, 0, i == length - 1) for i, t in enumerate(sequences[0][:length])]
        with self._graph.reading(()):
            for _ in self._decode(context, prefix):
                pass
        return length

    def _check_lengths(self, lengths: Iterable[int]) -> None:
        longest = max(lengths)
        if longest > self.n_ctx:
            raise InputError(
                f"a prompt and its answer need {longest} tokens, but the context holds {self.n_ctx}. "
                "Shorten the prompt or raise the context size."
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Answer token lists, many at a time; yield (index, answer) in the order they finish.

        A sequence that ends makes room for the next one at once (continuous batching).

        Raises:
            InputError: an empty prompt, or one that does not fit the context.
        """
        if not prompts:
            return
        sampling = sampling or Sampling()
        if not all(prompts):
            raise InputError("an empty prompt cannot be answered: every prompt needs at least one token.")
        self._check_lengths(len(p) + max_tokens for p in prompts)
        context = self._context_for_answers(max(map(len, prompts)) + max_tokens)
        prefix = self._share_prefix(context, prompts, min(map(len, prompts)) - 1)
        # Of like length together: llama.cpp runs sequences of unequal length in several smaller steps.
        queue = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        running: dict[int, int] = {}  # slot → index of prompt
        answers: dict[int, list[int]] = {}
        draws = {}
        while queue or running:
            for slot in range(1, context.n_slots + 1):
                if queue and slot not in running:
                    i = running[slot] = queue.popleft()
                    answers[i], draws[i] = [], np.random.default_rng((sampling.seed, i))
                    llama_cpp.llama_memory_seq_cp(context.memory, 0, slot, -1, -1)
            self._close_gaps(context, running)
            batch = []
            for slot, i in sorted(running.items()):
                known = [*prompts[i], *answers[i]]
                start = len(known) - 1 if answers[i] else prefix
                batch += [
                    _Token(t, pos, slot, pos == len(known) - 1)
                    for pos, t in enumerate(known[start:], start=start)
                ]
            for token, logits in self._decode(context, batch):
                i = running[token.seq]
                drawn = draw(logits, sampling, draws[i])
                finished = bool(llama_cpp.llama_vocab_is_eog(self._vocab, drawn))
                if not finished:
                    answers[i].append(drawn)
                if finished or len(answers[i]) >= max_tokens:
                    llama_cpp.llama_memory_seq_rm(context.memory, token.seq, -1, -1)
                    del running[token.seq], draws[i]
                    tokens = answers.pop(i)
                    yield i, Generation(tokens, self.detokenize(tokens), finished)

    @staticmethod
    def _close_gaps(context: _Context, running: dict[int, int]) -> None:
        """Move the last slots into the free ones before them.

        llama.cpp computes sequences side by side only where their numbers follow one another.
        """
        for slot in range(1, len(running) + 1):
            if slot not in running:
                last = max(running)
                llama_cpp.llama_memory_seq_cp(context.memory, last, slot, -1, -1)
                llama_cpp.llama_memory_seq_rm(context.memory, last, -1, -1)
                running[slot] = running.pop(last)

    def _forward(
        self, sequences: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Decode whole sequences; yield (index, position, logits) for the positions `outputs[index]`."""
        context = self._forward_context
        if context is None:
            raise InputError(f"{self.path.name} was closed.")
        prefix = self._share_prefix(context, sequences, min(map(min, outputs)))
        # Of like length together, so that a batch is well filled.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        # llama.cpp cuts batches of models with a recurrent state where lengths differ, and the callback sees
        # rows of each piece.
        uneven = llama_cpp.llama_model_is_hybrid(self._model) or llama_cpp.llama_model_is_recurrent(
            self._model
        )
        at_once = 1 if uneven and self._graph.reads else self.n_parallel
        start = 0
        while start < len(order):
            group: list[int] = []
            size = 0
            while start < len(order) and len(group) < at_once:
                length = len(sequences[order[start]]) - prefix
                if group and size + length > self._n_batch:
                    break
                group.append(order[start])
                size += length
                start += 1
            batch = []
            for slot, i in enumerate(group, start=1):
                llama_cpp.llama_memory_seq_cp(context.memory, 0, slot, 0, prefix)
                batch += [
                    _Token(t, pos, slot, pos in outputs[i])
                    for pos, t in enumerate(sequences[i][prefix:], start=prefix)
                ]
            for token, logits in self._decode(context, batch):
                yield group[token.seq - 1], token.pos, logits
            for slot in range(1, len(group) + 1):
                llama_cpp.llama_memory_seq_rm(context.memory, slot, -1, -1)

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, logits [V]) of the token after each prompt. The array is a view: copy to keep it."""
        if not prompts:
            return
        if not all(prompts):
            raise InputError("an empty prompt has no next token: every prompt needs at least one token.")
        self._check_lengths(map(len, prompts))
        for i, _, logits in self._forward(prompts, [(len(p) - 1,) for p in prompts]):
            yield i, logits

    def token_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """For each (prompt, continuation): log-probabilities [T] of its tokens, and which are top-1 [T]."""
        if not pairs:
            return []
        if any(not prompt or not answer for prompt, answer in pairs):
            raise InputError("log-probabilities need a prompt and a continuation of at least one token each.")
        sequences = [[*prompt, *answer][:-1] for prompt, answer in pairs]
        self._check_lengths(map(len, sequences))
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
            InputError: this architecture's graph has no tensor of that name.
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
        if not all(positions):
            raise InputError("nothing to read: every sequence needs at least one token and one position.")
        self._check_lengths(map(len, sequences))
        wanted = [(name, layer) for name in tensors for layer in layers]
        with self._graph.reading(wanted):
            for i, position, _ in self._forward(sequences, positions):
                found = self._graph.take()
                missing = set(wanted) - found.keys()
                if missing:
                    tensor, layer = min(missing)
                    raise InputError(
                        f"architecture {self.architecture!r} has no tensor {tensor}-{layer} in its graph, "
                        "so its activations cannot be read through llama.cpp."
                    )
                yield i, position, {n: np.stack([found[n, layer] for layer in layers]) for n in tensors}

    def graph_tensors(self) -> list[str]:
        """Names of the tensors of this model's graph, such as `l_out-3`, in the order of evaluation."""
        with self._graph.listing() as names:
            for _ in self.next_logits([[0]]):
                pass
        return names


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loader_failure(what: str) -> str:
    said = "; ".join(dict.fromkeys(_recent_errors)) or "nothing more"
    return f"{what}. llama.cpp says: {said}."
