"""The engine for Hugging Face folders (config, tokenizer, safetensors): run many sequences in PyTorch.

Token lists go in; answers, next-token logits, log-probabilities or activations come out. Forward hooks read
the activations (arXiv 2512.16602, section on activations): `hidden_states[-1]` is after the final norm.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
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
    seeds,
)
from rs_gguf.engines.pytorch import weights
from rs_gguf.engines.pytorch.vocabulary import Vocabulary
from rs_gguf.errors import InputError
from rs_gguf.models.architecture import PADS_THE_STATE, WITHOUT_ATTENTION, llama_cpp_name
from rs_gguf.records.conversation import Generation

# Tokens of a batch that is only read, padding included. On a CPU, 512 tokens already keep all cores busy, and
# small batches need less padding.
_BATCH_TOKENS, _CPU_BATCH_TOKENS = 4096, 512
# All logits of a log-probability batch exist at once: 1024 tokens with a vocabulary of 150,000 take 0.6 GB.
_LOGPROB_BATCH_TOKENS = 1024
# Tokens in the cache of all sequences that are answered at once. On a CPU, llama.cpp's cache is as large.
_CACHED_TOKENS, _CPU_CACHED_TOKENS = 65536, 8192


class TorchModel(Vocabulary):
    """A decoder-only transformers model with its tokenizer, as an `Engine`.

    Batches are padded on the left and masked, and have explicit position ids. A result therefore does not
    depend on the other sequences of its batch, except for float rounding.

    Args:
        path: a Hugging Face folder with safetensors, or a GGUF file of a family that transformers can read.
        n_parallel: the most sequences that are answered at once.
        device: a torch device. By default the GPUs, or the CPU if there are none. Accelerate spreads the
            layers over the GPUs; layers that do not fit stay in main memory.

    Raises:
        InputError: as `weights.load`; also a family whose sequences cannot be padded in transformers.
    """

    can: ClassVar[Can] = Can(0)

    def __init__(self, path: Path, *, n_parallel: int = 32, device: str | None = None) -> None:
        self.path = Path(path)
        self.n_parallel = n_parallel
        spread = device is None and torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if spread else "cpu"))
        on_cpu = self.device.type == "cpu"
        self._read_tokens = _CPU_BATCH_TOKENS if on_cpu else _BATCH_TOKENS
        self._cached_tokens = _CPU_CACHED_TOKENS if on_cpu else _CACHED_TOKENS
        self.model, tokenizer = weights.load(self.path, on_cpu=on_cpu, spread=spread)
        super().__init__(tokenizer, self.model.generation_config)
        self.model.eval()
        if not spread:
            self.model.to(self.device)
        config = self.model.config.get_text_config()
        if config.model_type in PADS_THE_STATE:
            raise InputError(
                f"{self.path}: {config.model_type} takes padding into its state in transformers, so its "
                "answers would depend on the other prompts of a batch. Use a model of another family."
            )
        self.architecture = llama_cpp_name(config.model_type)
        self.n_layer = len(weights.decoder_layers(self.model))
        self.n_embd: int = config.hidden_size
        self.n_vocab: int = config.vocab_size
        self.n_params = sum(parameter.numel() for parameter in self.model.parameters())
        self.max_length: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.metadata: Mapping[str, Any] = {}
        parameters = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in parameters  # models with ALiBi take only the mask
        self._masks_new_only = config.model_type in WITHOUT_ATTENTION and not self._takes_positions
        self._takes_keep = "logits_to_keep" in parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def close(self) -> None:
        """Free the weights. The object cannot be used afterwards."""
        self.model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- steering --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steered(self, steering: Steering) -> Iterator[None]:
        """Add directions to the outputs of layers, at every position, inside the `with` block.

        Raises:
            InputError: the model lacks a layer or the width, or the steering has a LoRA adapter.
        """
        if steering.adapters:
            raise InputError(
                f"cannot apply a GGUF LoRA to {self.path.name} in PyTorch: this needs llama.cpp. "
                "Give the model as a GGUF file to the llama.cpp engine."
            )
        steering.check(self.n_layer, self.n_embd, self.path.name)
        with weights.add_directions(self.model, steering.directions):
            yield

    # ---- batches ---------------------------------------------------------------------------------

    def _groups(self, lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
        """Yield batches of indices of similar length, with at most `budget` tokens each."""
        return group_by_length(lengths, self.n_parallel, lambda g: len(g) * lengths[g[-1]] <= budget)

    def _checked_lengths(self, prompts: Sequence[Sequence[int]], max_tokens: int = 0) -> list[int]:
        if not all(prompts):
            raise InputError("a prompt is empty: every prompt needs at least one token.")
        self.check_lengths(prompts, max_tokens)
        return list(map(len, prompts))

    def check_lengths(self, sequences: Sequence[Sequence[int]], max_tokens: int = 0) -> None:
        """Raise `InputError` if a sequence and an answer of `max_tokens` together exceed `max_length`."""
        check_lengths(sequences, self.max_length, self.detokenize, max_tokens)

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        keep: int = 1,
        use_cache: bool = False,
        cache: Any = None,
    ) -> tuple[torch.Tensor, Any]:
        """Return F32 logits [n, keep, V] of the last `keep` positions, and the cache after `ids`."""
        options: dict[str, Any] = {"use_cache": use_cache}
        if cache is not None:
            options[self._cache_name] = cache
        if self._takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        if self._masks_new_only:
            mask = mask[:, -ids.shape[1] :]
        if self._takes_keep:
            options["logits_to_keep"] = keep
        with torch.inference_mode():
            output = self.model(input_ids=ids, attention_mask=mask, **options)
            return output.logits[:, -keep:].float().cpu(), output.get(self._cache_name)

    def generate(
        self, prompts: TokenLists, *, max_tokens: int, sampling: Sampling = GREEDY, drafts: TokenLists = (),
        enough: Enough = never_enough, reordered: bool = False,
    ) -> Iterator[tuple[int, Generation]]:  # fmt: skip
        """Answer many token lists at once; yield (index, answer) as they finish.

        Drafts are not used, and the order of sums stays the same.

        Raises:
            InputError: a prompt is empty or does not fit the context, or the model has no cache.
        """
        if not prompts:
            return
        seed_of = seeds(prompts, sampling.seed)
        lengths = [length + max_tokens for length in self._checked_lengths(prompts, max_tokens)]
        for group in self._groups(lengths, self._cached_tokens):
            draws = {i: np.random.default_rng(seed_of[i]) for i in group}
            yield from self._answer(group, prompts, max_tokens, sampling, draws, enough)

    def _answer(
        self, group: list[int], prompts: TokenLists, max_tokens: int, sampling: Sampling,
        draws: Mapping[int, np.random.Generator], enough: Enough,
    ) -> Iterator[tuple[int, Generation]]:  # fmt: skip
        ids, mask = weights.pad_left(self.device, [prompts[i] for i in group])
        answers: dict[int, list[int]] = {i: [] for i in group}
        cache = None
        while group:
            logits, cache = self._forward(ids, mask, use_cache=True, cache=cache)
            if cache is None:
                raise InputError(
                    f"cannot answer: architecture {self.architecture!r} has no key/value cache in "
                    "transformers. Give the model as a GGUF file to the llama.cpp engine."
                )
            rows = []
            for row, i in enumerate(group):
                drawn = draw(logits[row, -1].numpy(), sampling, draws[i])
                finished = drawn in self.ends
                if not finished:
                    answers[i].append(drawn)
                if finished or len(answers[i]) >= max_tokens or enough(i, answers[i]):
                    yield i, Generation(answers[i], self.detokenize(answers[i]), finished)
                else:
                    rows.append(row)
            if len(rows) < len(group):  # finished sequences leave the batch
                group = [group[row] for row in rows]
                mask = mask[rows]
                # Models with a state have no other method to drop rows. The indices are on the CPU, because
                # the caches of the layers may be on several devices.
                cache.reorder_cache(torch.tensor(rows, dtype=torch.long))
            ids = torch.tensor([[answers[i][-1]] for i in group], dtype=torch.long, device=self.device)
            mask = torch.cat([mask, mask.new_ones((len(group), 1))], dim=1)

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, logits [V]) for the token after each prompt. The array is a view: copy to keep it."""
        if not prompts:
            return
        for group in self._groups(self._checked_lengths(prompts), self._read_tokens):
            logits, _ = self._forward(*weights.pad_left(self.device, [prompts[i] for i in group]))
            for row, i in enumerate(group):
                yield i, logits[row, -1].numpy()

    def token_logprobs(self, pairs: Pairs) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Return log-probabilities [T] in nats and top-1 flags [T] of each (prompt, continuation)."""
        results: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        for i, predicted in self._predicted(pairs):
            logits_of_answer = predicted.gather(1, torch.tensor(pairs[i][1])[:, None])[:, 0]
            results[i] = (
                (logits_of_answer - predicted.logsumexp(dim=1)).numpy(),
                (logits_of_answer == predicted.amax(dim=1)).numpy(),
            )
        return [results[i] for i in range(len(pairs))]

    def answer_logits(self, pairs: Pairs) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield (index, step, logits [V]) that predict each token of the continuations; see `Engine`."""
        for i, predicted in self._predicted(pairs):
            for step, logits in enumerate(predicted.numpy()):
                yield i, step, logits

    def _predicted(self, pairs: Pairs) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, logits [T, V]) of the T tokens of each continuation."""
        if not pairs:
            return
        sequences = join(pairs)
        budget = min(self._read_tokens, _LOGPROB_BATCH_TOKENS)
        for group in self._groups(self._checked_lengths(sequences), budget):
            longest = max(len(pairs[i][1]) for i in group)
            logits, _ = self._forward(
                *weights.pad_left(self.device, [sequences[i] for i in group]), keep=longest
            )
            for row, i in enumerate(group):
                yield i, logits[row, -len(pairs[i][1]) :]

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        tensors: Sequence[str] = ("l_out",),
        matrices: Sequence[str] = (),
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.float32]]]]:
        """Yield (index, position, {"l_out": [L, D]}) for each of `positions[index]` of each sequence.

        See `Engine.read`.

        Raises:
            InputError: a sequence is empty or has no position, the model lacks a layer, a tensor other than
                `l_out` is wanted, or the model's residual consists of several streams.
        """
        if not sequences:
            return
        if (*tensors, *matrices) != ("l_out",):
            raise InputError(
                f"cannot read tensors {[*tensors, *matrices]} in PyTorch, which reads only activations, "
                "['l_out']. For other tensors, give the model as a GGUF file to the llama.cpp engine."
            )
        if not layers or not all(0 <= layer < self.n_layer for layer in layers):
            raise InputError(
                f"cannot read layers {list(layers)}: this model has layers 0 to {self.n_layer - 1}. Name at "
                "least one of them."
            )
        lengths = self._checked_lengths(sequences)
        if not all(positions):
            raise InputError("nothing to read: every sequence needs at least one position.")
        for group in self._groups(lengths, self._read_tokens):
            places = [(i, position) for i in group for position in positions[i]]
            rows = [row for row, i in enumerate(group) for _ in positions[i]]
            columns = [position - lengths[i] for i, position in places]  # from the right end
            with weights.read_activations(self.model, set(layers), rows, columns) as activations:
                self._forward(*weights.pad_left(self.device, [sequences[i] for i in group]))
            for k, (i, position) in enumerate(places):
                yield i, position, {"l_out": np.stack([activations[layer][k] for layer in layers])}
