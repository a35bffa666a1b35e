"""Running llama-servers as the model that is measured, steered by the scales of their LoRA adapters.

Addresses and adapters go in; answers under a factor come out. A server takes the scale of an adapter with each
request, so one server gives both sides. Several of the same model share the prompts, and what one does not
answer goes to another. Their control vectors are fixed when they start, and they tell no log-probabilities of
given text: neither can be had here.
"""

from __future__ import annotations

import filecmp
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import Any

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.exchange import (
    LOOKUP_TIMEOUT,
    SERVER_KEY_VARIABLE,
    RequestRefusedError,
    TryFailedError,
    exchange,
)
from rs_gguf.engines.server.replies import served_models
from rs_gguf.errors import InputError
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.prompts.trace import final_answer
from rs_gguf.records.conversation import Answer, Generation, Prompt

_REQUESTS = 8  # under way at once, for each server
# What is raised where a server tells nothing of its adapters, or what nobody understands.
_UNTOLD = (TryFailedError, KeyError, TypeError, ValueError, OverflowError)


class LlamaServer:
    """The model of one or several llama-servers that were started with `--lora-scaled F:0`.

    Args:
        address: `http://host:port[/v1][,http://host:port…][#MODEL]`.
        adapters: files, named as the servers were given them, and scales; the others stay as they are.

    Raises:
        InputError: no such server, one that has not loaded one of the adapters or has another file of its
            name, or servers that differ.
    """

    def __init__(
        self, address: str, adapters: Sequence[tuple[Path, float]], system: str | None = None
    ) -> None:
        urls, _, name = address.partition("#")
        roots = [url.strip().rstrip("/").removesuffix("/v1") for url in urls.split(",")]
        self.name = address
        self._system = system
        options = EndpointOptions(concurrency=_REQUESTS * len(roots), key_variable=SERVER_KEY_VARIABLE)
        self._client = EndpointClient([f"{root}/v1" for root in roots], name or None, options)
        self._kept, self._scaled = _common_scales(roots, adapters) if adapters else ({}, {})
        self._thinks = any(_thinks(root) for root in roots)

    def check(self) -> None:
        """The adapters were looked up when this was made."""

    def expect_model(self, figures: Mapping[str, int]) -> None:
        """Compare `figures` (n_vocab, n_params) with what llama-servers tell of their model.

        A server that cannot be reached now, or does not tell them, passes.

        Raises:
            InputError: a server has another model.
        """
        for url in self._client.urls:
            try:
                models = served_models(url, SERVER_KEY_VARIABLE)
                (model,) = (m for m in models if len(models) == 1 or m.name == self._client.model)
                told = {name: model.figures[name] for name in figures}
            except (TryFailedError, InputError, KeyError, ValueError):
                continue
            if told != figures:
                there, here = (", ".join(f"{k} = {v}" for k, v in f.items()) for f in (told, figures))
                raise InputError(
                    f"{url} has another model ({there}) than the recipe ({here}). Start the server with the "
                    "recipe's file."
                )

    def expect_unsteered(self) -> None:
        """Ask llama-servers whether an adapter is in force for requests that name none.

        A server that cannot be reached now, or does not tell, passes.

        Raises:
            InputError: one is.
        """
        for url in self._client.urls:
            try:
                loaded = _loaded(url.removesuffix("/v1")).values()
            except (InputError, *_UNTOLD):
                continue
            in_force = ", ".join(path for path, scale in loaded if scale != 0)
            if in_force:
                raise InputError(
                    f"{url} answers under {in_force}, but the model by itself is asked for. Start the server "
                    "without adapters, or with `--lora-scaled FILE:0`."
                )

    def answers(
        self,
        asked: Sequence[Prompt],
        factor: float,
        *,
        max_tokens: int,
        advance: Advance,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Answer], int, float]:
        """The answers in order, the number of their tokens, and the seconds that they took."""
        answers: dict[int, Answer] = {}
        counted, start = self._client.usage.completion_tokens, time.perf_counter()
        for i, found in self.answer(asked, factor, max_tokens=max_tokens, sampling=sampling):
            answers[i] = found
            advance(1)
        seconds = time.perf_counter() - start
        tokens = self._client.usage.completion_tokens - counted
        return [answers[i] for i in range(len(asked))], tokens, seconds

    def answer(
        self, asked: Sequence[Prompt], factor: float, *, max_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index, answer) as they come.

        Drawn ones are drawn as by `generation.draw`. The tokens of an answer are not told.
        """
        bodies = (self._body(prompt, factor, max_tokens, sampling) for prompt in asked)
        for i, found in self._client.complete_all(bodies):
            if isinstance(found, RequestRefusedError):
                raise InputError(f"the prompt {asked[i].prompt[:60]!r} was not answered: {found}")
            # The tokens themselves are not told; a loop shows in the text.
            text = final_answer(found.text, finished=found.finished) or ""
            # Nothing but a trace that the server keeps to itself, cut off: not broken, not there yet.
            broken = is_degenerate(Generation([], found.text, found.finished)) and bool(
                text or found.finished
            )
            yield i, Answer([], text, found.finished, broken)

    def answer_logprobs(self, asked: Sequence[Prompt], answers: Sequence[Answer], factor: float) -> None:
        """A server does not tell them."""

    def text_logprobs(self, texts: Sequence[str], factor: float) -> None:
        """A server does not tell them."""

    def _body(self, prompt: Prompt, factor: float, max_tokens: int, sampling: Sampling) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt.prompt}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        body: dict[str, Any] = {
            "messages": messages, "max_tokens": max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        }  # fmt: skip
        if sampling.temperature > 0:  # else nothing is drawn, and not every server knows these
            body |= {"top_k": sampling.top_k, "samplers": ["top_k", "temperature", "top_p"]}
        if self._thinks:  # else it reads another prompt than models do here
            body["chat_template_kwargs"] = {"enable_thinking": False}
        scales = {**self._kept, **{id_: factor * scale for id_, scale in self._scaled.items()}}
        if not scales:
            return body
        # An adapter that a request leaves out counts as 0, whatever the server was started with, and what a
        # prompt left in the server's cache under another scale may be taken for this one's.
        lora = [{"id": i, "scale": s} for i, s in sorted(scales.items())]
        return {**body, "lora": lora, "cache_prompt": False}


def _thinks(root: str) -> bool:
    """`ChatFormat.thinks_in_server` of a server's chat template; False where it does not tell that."""
    try:
        template = exchange(root, "/props", None, LOOKUP_TIMEOUT, SERVER_KEY_VARIABLE)["chat_template"]
        return ChatFormat(str(template)).thinks_in_server
    except (InputError, *_UNTOLD):
        return False


def _common_scales(
    roots: Sequence[str], adapters: Sequence[tuple[Path, float]]
) -> tuple[dict[int, float], dict[int, float]]:
    """What `_scales` says of every server: a request may go to any of them."""
    first, *others = [_scales(root, adapters) for root in roots]
    for root, found in zip(roots[1:], others, strict=True):
        if found != first:
            raise InputError(
                f"{roots[0]} and {root} differ in their adapters, or in the numbers or scales of these. "
                "Start all servers with the same options."
            )
    return first


def _scales(root: str, adapters: Sequence[tuple[Path, float]]) -> tuple[dict[int, float], dict[int, float]]:
    """By the server's numbers: the scales that stay, and those that a factor multiplies."""
    try:
        loaded = _loaded(root)
    except _UNTOLD as error:
        raise InputError(f"{root} does not tell its adapters ({error}). Is it a llama-server?") from None
    scaled: dict[int, float] = {}
    given: dict[int, Path] = {}
    for path, scale in adapters:
        start = f"llama-server --lora-scaled {shlex.quote(f'{path}:0')}"
        # Many files have one name (`remove-adapter.gguf`): the folders tell them apart.
        shared = {i: _parts_shared(there, path) for i, (there, _) in loaded.items()}
        numbers = [i for i, parts in shared.items() if parts and parts == max(shared.values())]
        if len(numbers) != 1:
            names = ", ".join(there for there, _ in loaded.values()) or "none"
            raise InputError(
                f"{root} has loaded {len(numbers)} adapters named {path.name} (all: {names}). Start it with "
                f"`{start}`."
            )
        (number,) = numbers
        there, _ = loaded[number]
        for other in (there, str(given.setdefault(number, path))):
            if other != str(path) and _differ(other, path):
                raise InputError(
                    f"{root} has loaded {there} for {path}, but {other} is another file. Name the adapter as "
                    f"the server was given it, or start it with `{start}`."
                )
        scaled[number] = scaled.get(number, 0.0) + scale
    kept = {i: scale for i, (_, scale) in loaded.items() if i not in scaled and math.isfinite(scale)}
    return kept, scaled


def _loaded(root: str) -> dict[int, tuple[str, float]]:
    """Path and scale of a server's adapters by its numbers. Raises one of `_UNTOLD`, or `InputError`."""
    found = exchange(root, "/lora-adapters", None, LOOKUP_TIMEOUT, SERVER_KEY_VARIABLE)
    return {int(entry["id"]): (str(entry["path"]), float(entry["scale"])) for entry in found}


def _parts_shared(there: str, here: Path) -> int:
    """How many of their last parts are the same, of a server's path and one of this machine."""
    # The server may be under Windows; PureWindowsPath takes both separators.
    parts = (reversed(PureWindowsPath(path).parts) for path in (there, here.absolute()))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False)))


def _differ(there: str, here: Path) -> bool:
    """Whether two files hold other bytes. What is not on this machine, or not to be read, is not known to."""
    try:
        return not filecmp.cmp(there, here, shallow=False)
    except (OSError, ValueError):  # a path with a null byte is the latter
        return False
