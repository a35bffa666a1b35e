"""Use running llama-servers as the measured model, steered by the scales of their LoRA adapters.

Addresses and adapters go in; answers under a scale factor come out. Each request carries the scale of every
adapter, so one server gives the unsteered and the steered answers. Several servers of one model share the
prompts; if one fails, another answers. A server fixes its control vectors when it starts, and it gives no
log-probabilities of given text, so neither is supported.
"""

from __future__ import annotations

import filecmp
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import Any

from rs_gguf.engines.answers import Advance
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.exchange import (
    LOOKUP_TIMEOUT,
    SERVER_KEY_VARIABLE,
    RequestRefusedError,
    TryFailedError,
    event_lines,
    exchange,
    shortened,
)
from rs_gguf.engines.server.replies import Completion, served_models
from rs_gguf.errors import InputError
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import HELLO, ChatFormat
from rs_gguf.prompts.trace import opens_thinking, split_trace
from rs_gguf.records.conversation import Answer, Generation, Prompt, Trace

_SILENCE = 600.0  # seconds without a byte after which a stream fails
_REQUESTS = 8  # concurrent requests for each server
# Raised if a server gives no information, or none that can be parsed.
_NO_INFORMATION = (TryFailedError, KeyError, TypeError, ValueError, OverflowError)


class LlamaServer:
    """The model of one or several llama-servers that were started with `--lora-scaled FILE:0`.

    Args:
        address: `http://host:port[/v1][,http://host:port…][#MODEL]`.
        adapters: pairs (file, scale), with the file names that the servers got. Other adapters keep their
            scales.

    Raises:
        InputError: a server is missing, has not loaded an adapter or has another file of its name, or the
            servers differ.
    """

    def __init__(self, address: str, adapters: Sequence[tuple[Path, float]]) -> None:
        urls, _, name = address.partition("#")
        roots = [url.strip().rstrip("/").removesuffix("/v1") for url in urls.split(",")]
        self.name = address
        options = EndpointOptions(concurrency=_REQUESTS * len(roots), key_variable=SERVER_KEY_VARIABLE)
        self._client = EndpointClient([f"{root}/v1" for root in roots], name or None, options)
        self._fixed, self._scaled = _common_scales(roots, adapters) if adapters else ({}, {})
        formats = [found for root in roots if (found := _chat_format(root))]
        self._thinks = any(found.thinks_in_server for found in formats)
        self._opens_trace = any(opens_thinking(found.render(HELLO)) for found in formats)
        self._may_open_trace = self._opens_trace or self._thinks or len(formats) < len(roots)

    def check(self) -> None:
        """Do nothing: the constructor has checked the adapters."""

    def expect_model(self, figures: Mapping[str, int]) -> None:
        """Compare `figures` (n_vocab, n_params) with the figures of the servers' models.

        A server passes if it cannot be reached now or does not give these figures.

        Raises:
            InputError: a server has another model.
        """
        for url in self._client.urls:
            try:
                models = served_models(url, SERVER_KEY_VARIABLE)
                (model,) = (m for m in models if len(models) == 1 or m.name == self._client.model)
                served = {name: model.figures[name] for name in figures}
            except (TryFailedError, InputError, KeyError, ValueError):
                continue
            if served != figures:
                actual, expected = (", ".join(f"{k} = {v}" for k, v in f.items()) for f in (served, figures))
                raise InputError(
                    f"{url} has another model ({actual}) than the recipe ({expected}). Start the server with "
                    "the recipe's file."
                )

    def expect_unsteered(self) -> None:
        """Check that no server applies an adapter to requests that name none.

        A server passes if it cannot be reached now or does not list its adapters.

        Raises:
            InputError: a server applies an adapter.
        """
        for url in self._client.urls:
            try:
                loaded = _loaded(url.removesuffix("/v1")).values()
            except (InputError, *_NO_INFORMATION):
                continue
            active = ", ".join(path for path, scale in loaded if scale != 0)
            if active:
                raise InputError(
                    f"{url} answers under {active}, but unsteered answers are needed. Start the server "
                    "without adapters, or with `--lora-scaled FILE:0`."
                )

    def answers(
        self,
        prompts: Sequence[Prompt],
        factor: float,
        asking: Asking,
        advance: Advance,
        drafts: Sequence[Answer] = (),
    ) -> tuple[list[Answer], int, float]:
        """Return the answers in order, the number of their tokens, and the seconds that they took.

        Drafts are not used.
        """
        answers: dict[int, Answer] = {}
        tokens_before, start = self._client.usage.completion_tokens, time.perf_counter()
        for i, reply in self.answer(prompts, factor, asking):
            answers[i] = reply
            advance(1)
        seconds = time.perf_counter() - start
        n_tokens = self._client.usage.completion_tokens - tokens_before
        return [answers[i] for i in range(len(prompts))], n_tokens, seconds

    def answer(
        self, prompts: Sequence[Prompt], factor: float, asking: Asking
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index, answer) in the order in which they finish; `Answer.tokens` stays empty.

        The server samples in the same way as `generation.draw`.

        Raises:
            InputError: no server can be used, or one refuses a prompt.
        """
        for i, completion in self._client.complete_all(self._body(p, factor, asking) for p in prompts):
            if isinstance(completion, RequestRefusedError):
                raise InputError(f"the prompt {prompts[i].prompt[:60]!r} was not answered: {completion}")
            yield i, self._answer(completion)

    def stream(self, prompt: Prompt, factor: float, asking: Asking) -> Iterator[str]:
        """Yield the text of an answer of the first server, as far as it has come, each time that it grows.

        Raises:
            InputError: the server cannot be used, refuses the prompt or breaks off.
        """
        body = {**self._body(prompt, factor, asking), "model": self._client.model, "stream": True}
        url, text = self._client.urls[0], ""
        data = json.dumps(body).encode()
        try:
            for line in event_lines(url, "/chat/completions", data, _SILENCE, SERVER_KEY_VARIABLE):
                event = line.removeprefix("data:").strip()
                if event in (line, "[DONE]"):  # a comment or an empty line between events; the end
                    continue
                reply = json.loads(event)
                if "error" in reply:
                    raise TryFailedError(shortened(str(reply["error"])))
                choices = reply["choices"]
                if choices and (piece := choices[0]["delta"].get("content")):
                    text += str(piece)
                    yield text
        except (*_NO_INFORMATION, IndexError, AttributeError) as error:
            raise InputError(f"{url} broke off an answer ({error}). Check the server and its log.") from None

    def answer_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], factor: float, asking: Asking
    ) -> None:
        """Return None: a server gives no log-probabilities of given text."""

    def text_logprobs(self, texts: Sequence[str], factor: float, system: str | None) -> None:
        """Return None: a server gives no log-probabilities of given text."""

    def kl_divergences(self, factors: Sequence[float], system: str | None) -> None:
        """Return None: the server gives no full logits."""

    def _answer(self, completion: Completion) -> Answer:
        """Return the answer of a completion, without tokens, which a server does not give."""
        # Cut off, the text may lack an end marker. Else a marker shows whether a trace precedes the answer.
        inside = True if self._opens_trace and not completion.finished else None
        if completion.trace or not self._may_open_trace:
            inside = False
        parts = split_trace(completion.text, inside=inside)
        text, finished = parts.answer, completion.finished
        if not (trace := completion.trace.strip() or parts.trace):
            # Without text, an unfinished answer is a truncated trace that the server hides: not degenerate.
            degenerate = is_degenerate(Generation([], text, finished)) and bool(text or finished)
            return Answer([], text, finished, degenerate)
        loops = is_degenerate(Generation([], trace, finished))
        degenerate = is_degenerate(Generation([], text, finished)) if text else loops
        return Answer([], text, finished, degenerate, Trace(trace, None, bool(text), loops))

    def _body(self, prompt: Prompt, factor: float, asking: Asking) -> dict[str, Any]:
        sampling = asking.sampling
        body: dict[str, Any] = {
            "messages": asking.context.conversation(prompt.prompt, asking.system),
            "max_tokens": asking.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        }  # fmt: skip
        if sampling.temperature > 0:  # greedy decoding does not need these, and some servers do not know them
            body |= {"top_k": sampling.top_k, "samplers": ["top_k", "temperature", "top_p"]}
        if self._thinks:  # the local engines render the chat template without thinking too
            body["chat_template_kwargs"] = {"enable_thinking": False}
        scales = {**self._fixed, **{id_: factor * scale for id_, scale in self._scaled.items()}}
        if not scales:
            return body
        # An adapter that a request leaves out gets scale 0, whatever the server's own scale is. The cache is
        # off because the server might reuse the cached cells of a prompt from another scale.
        lora = [{"id": i, "scale": s} for i, s in sorted(scales.items())]
        return {**body, "lora": lora, "cache_prompt": False}


def _chat_format(root: str) -> ChatFormat | None:
    """Return the chat template of a server; None if it gives none that renders."""
    try:
        template = exchange(root, "/props", None, LOOKUP_TIMEOUT, SERVER_KEY_VARIABLE)["chat_template"]
        found = ChatFormat(str(template))
        found.render(HELLO)
    except (InputError, *_NO_INFORMATION):
        return None
    return found


def _common_scales(
    roots: Sequence[str], adapters: Sequence[tuple[Path, float]]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the `_scales` of every server, which must be equal: a request may go to any server."""
    first, *others = [_scales(root, adapters) for root in roots]
    for root, scales in zip(roots[1:], others, strict=True):
        if scales != first:
            raise InputError(
                f"{roots[0]} and {root} differ in their adapters, or in the numbers or scales of their "
                "adapters. Start all servers with the same options."
            )
    return first


def _scales(root: str, adapters: Sequence[tuple[Path, float]]) -> tuple[dict[int, float], dict[int, float]]:
    """Return {number: fixed scale} and {number: scale that a factor multiplies} of a server's adapters."""
    try:
        loaded = _loaded(root)
    except _NO_INFORMATION as error:
        raise InputError(
            f"{root} does not list its adapters ({error}). Give the address of a llama-server."
        ) from None
    scaled: dict[int, float] = {}
    files: dict[int, Path] = {}  # {number: the first local file for it}
    for path, scale in adapters:
        start = f"llama-server --lora-scaled {shlex.quote(f'{path}:0')}"
        # Many files have the same name (`remove-adapter.gguf`), so their folders are compared too.
        shared = {i: _parts_shared(there, path) for i, (there, _) in loaded.items()}
        numbers = [i for i, parts in shared.items() if parts and parts == max(shared.values())]
        if len(numbers) != 1:
            names = ", ".join(there for there, _ in loaded.values()) or "none"
            raise InputError(
                f"{root} has loaded {len(numbers)} adapters named {path.name} (all: {names}); exactly one is "
                f"needed. Start it with `{start}`."
            )
        (number,) = numbers
        there, _ = loaded[number]
        for other in (there, str(files.setdefault(number, path))):
            if other != str(path) and _differ(other, path):
                raise InputError(
                    f"{root} has loaded {there} for {path}, but {other} is another file. Give the path that "
                    f"the server got, or start it with `{start}`."
                )
        scaled[number] = scaled.get(number, 0.0) + scale
    fixed = {i: scale for i, (_, scale) in loaded.items() if i not in scaled and math.isfinite(scale)}
    return fixed, scaled


def _loaded(root: str) -> dict[int, tuple[str, float]]:
    """Return {number: (path, scale)} of a server's adapters. Raises `_NO_INFORMATION` or `InputError`."""
    entries = exchange(root, "/lora-adapters", None, LOOKUP_TIMEOUT, SERVER_KEY_VARIABLE)
    return {int(entry["id"]): (str(entry["path"]), float(entry["scale"])) for entry in entries}


def _parts_shared(there: str, here: Path) -> int:
    """Return the number of equal path parts, counted from the end, of a server's path and a local path."""
    # The server may run on Windows; PureWindowsPath accepts both separators.
    parts = (reversed(PureWindowsPath(path).parts) for path in (there, here.absolute()))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False)))


def _differ(there: str, here: Path) -> bool:
    """Return whether two files differ; False if one is not on this machine or cannot be read."""
    try:
        return not filecmp.cmp(there, here, shallow=False)
    except (OSError, ValueError):  # a path with a null byte raises ValueError
        return False
