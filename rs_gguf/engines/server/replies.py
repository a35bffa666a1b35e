"""Parse the JSON of an OpenAI-compatible server: completions with their tokens, and lists of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rs_gguf.engines.server.exchange import LOOKUP_TIMEOUT, TryFailedError, exchange, shortened

# Nats. A server that gives less means probability 0, and sums of such values might overflow.
_LEAST_LOGPROB = -1e4


@dataclass(frozen=True)
class Token:
    """A token of an answer, its log-probability in nats, and the likeliest tokens at its position."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Completion:
    """An answer of a server. `tokens` is None if the server gives no log-probabilities.

    `trace`: the thinking trace, if the server gives it apart from the text; else empty.
    """

    text: str
    finished: bool  # ended with `finish_reason: stop`, not truncated
    tokens: tuple[Token, ...] | None
    trace: str = ""


@dataclass(frozen=True)
class ServedModel:
    """A model in a server's list. Only a llama-server gives `figures` (n_params, n_vocab and others)."""

    name: str
    figures: Mapping[str, Any]


def served_models(url: str, key_variable: str) -> list[ServedModel]:
    """Return the models that the server at base `url` lists.

    Raises:
        TryFailedError, InputError: as in `exchange`; `TryFailedError` also if the reply is not a model list.
    """
    reply = exchange(url, "/models", None, LOOKUP_TIMEOUT, key_variable)
    try:
        return [ServedModel(utf8(entry["id"]), dict(entry.get("meta") or {})) for entry in reply["data"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TryFailedError(f"the answer is not a list of models ({reason})") from None


def parse_completion(answer: Any) -> tuple[Completion, tuple[int, int]]:
    """Return the completion in a response and its numbers of (prompt, completion) tokens.

    Raises:
        TryFailedError: the response is not a completion.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text = utf8(message.get("content") or "")
        # llama-server calls it `reasoning_content`; vLLM and others `reasoning`.
        trace = utf8(message.get("reasoning_content") or message.get("reasoning") or "")
        usage = answer.get("usage") or {}
        content = (choice.get("logprobs") or {}).get("content")
        tokens = None if not content else tuple(_token(entry) for entry in content)
        completion = Completion(text, choice.get("finish_reason") == "stop", tokens, trace)
        return completion, (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        # Some providers report an error with status 200.
        said = answer.get("error") if isinstance(answer, dict) else None
        reason = shortened(utf8(said)) if said else f"{type(error).__name__}: {error}"
        raise TryFailedError(f"the answer is not a chat completion ({reason})", suspect=True) from None


def utf8(value: Any) -> str:
    """Return a server's text with a question mark for each lone surrogate, which UTF-8 cannot encode."""
    return str(value).encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    number = int(value or 0)
    if abs(number) >= 2**53:  # multiplied by a price, the number might overflow a float
        raise ValueError("an impossible number of tokens")
    return number


def _token(entry: Mapping[str, Any]) -> Token:
    top = tuple((str(t["token"]), _logprob(t["logprob"])) for t in entry.get("top_logprobs") or ())
    return Token(str(entry["token"]), _logprob(entry["logprob"]), top)


def _logprob(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("a log-probability is NaN")
    return min(max(number, _LEAST_LOGPROB), 0.0)


@dataclass(frozen=True)
class Usage:
    """Requests and tokens of an endpoint so far. `cost` is in the currency of the given prices."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
