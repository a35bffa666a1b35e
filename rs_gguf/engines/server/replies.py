"""What the JSON of an OpenAI-compatible server says: completions with their tokens, and lists of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rs_gguf.engines.server.exchange import LOOKUP_TIMEOUT, TryFailedError, exchange, shortened

_LEAST_LOGPROB = -1e4  # nats; a server that says less means none, and sums of its own might overflow


@dataclass(frozen=True)
class Token:
    """A token of an answer, with its log-probability and the likeliest tokens at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Completion:
    """What a server answered. `tokens` is None where it gives no log-probabilities."""

    text: str
    finished: bool  # by itself, not at the token limit
    tokens: tuple[Token, ...] | None


@dataclass(frozen=True)
class ServedModel:
    """A model as a server lists it. `figures` (n_params, n_vocab and others) are a llama-server's own."""

    name: str
    figures: Mapping[str, Any]


def served_models(url: str, key_variable: str) -> list[ServedModel]:
    """Return the models that the server at base `url` lists.

    Raises:
        TryFailedError, InputError: as in `exchange`; the former also if it is not a list of models.
    """
    found = exchange(url, "/models", None, LOOKUP_TIMEOUT, key_variable)
    try:
        return [ServedModel(utf8(entry["id"]), dict(entry.get("meta") or {})) for entry in found["data"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TryFailedError(f"the answer is no list of models ({type(error).__name__}: {error})") from None


def parse_completion(answer: Any) -> tuple[Completion, tuple[int, int]]:
    """The completion in a response, and its (prompt, completion) tokens. `TryFailedError` if it has none."""
    try:
        choice = answer["choices"][0]
        text = utf8(choice["message"].get("content") or "")
        usage = answer.get("usage") or {}
        content = (choice.get("logprobs") or {}).get("content")
        tokens = None if not content else tuple(_token(entry) for entry in content)
        completion = Completion(text, choice.get("finish_reason") == "stop", tokens)
        return completion, (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        # Some providers say what went wrong with status 200.
        said = answer.get("error") if isinstance(answer, dict) else None
        why = shortened(utf8(said)) if said else f"{type(error).__name__}: {error}"
        raise TryFailedError(f"the answer is no chat completion ({why})", suspect=True) from None


def utf8(value: Any) -> str:
    """A server's text with a question mark for each half of a surrogate pair, which UTF-8 does not have."""
    return str(value).encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    number = int(value or 0)
    if abs(number) >= 2**53:  # times a price, it might leave the floats
        raise ValueError("a number of tokens that none can be")
    return number


def _token(entry: Mapping[str, Any]) -> Token:
    top = tuple((str(t["token"]), _logprob(t["logprob"])) for t in entry.get("top_logprobs") or ())
    return Token(str(entry["token"]), _logprob(entry["logprob"]), top)


def _logprob(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("a log-probability of nan")
    return min(max(number, _LEAST_LOGPROB), 0.0)


@dataclass(frozen=True)
class Usage:
    """What an endpoint has counted so far. `cost` is in the money that the prices were given in."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
