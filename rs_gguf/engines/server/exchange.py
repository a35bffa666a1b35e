"""One exchange with one OpenAI-compatible server, and what can come of it.

An address and a JSON body go in; the server's JSON comes out, or an error that says whether another try may
help. The key is read from the environment for each exchange and kept nowhere; should a server say it back, it
is blotted out. Judges and models that answer each have a variable of their own: the key of one is not sent to
the other.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from rs_gguf.errors import InputError
from rs_gguf.version import __version__

KEY_VARIABLE = "RS_GGUF_API_KEY"  # of judges
SERVER_KEY_VARIABLE = "RS_GGUF_SERVER_KEY"  # of servers whose model is measured

LOOKUP_TIMEOUT = 30.0  # seconds, of a question that a server answers at once

_MAX_BODY = 64 << 20  # bytes of a response; more is no completion
_MAX_ERROR = 64 << 10  # bytes of a response that says what went wrong; more is not looked at
# Statuses that another try may cure: these, and each 5xx (proxies have their own) but for the lasting ones.
_PASSING, _LASTING = frozenset({408, 409, 425, 429}), frozenset({501, 505})
_LEAST_LOGPROB = -1e4  # nats; a server that says less means none, and sums of its own might overflow


@dataclass(frozen=True)
class Token:
    """A token that was answered, its log-probability and those of the likeliest tokens at its place."""

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


class RequestRefusedError(InputError):
    """A server does not take this one request, whoever asks (too long, an option it does not know)."""


class ForbiddenError(InputError):
    """HTTP 403: the key is not accepted, or this request is not (moderation). `said` is by the server."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class TryFailedError(Exception):
    """Another try may help, after `pause` seconds if the server named them.

    `suspect`: the server was there, and may have failed because of this very request. `busy`: it was there,
    and has too much to do.
    """

    def __init__(
        self, what: str, *, pause: float | None = None, suspect: bool = False, busy: bool = False
    ) -> None:
        super().__init__(what)
        self.pause, self.suspect, self.busy = pause, suspect, busy


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to an address that nobody named."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def exchange(url: str, path: str, data: bytes | None, timeout: float, key_variable: str) -> Any:
    """The JSON that a server answers with at base `url` plus `path`: POST with `data`, else GET.

    The key in the environment's `key_variable`, if any, goes with it.

    Raises:
        TryFailedError: no connection, a busy or broken server, an answer that is no JSON.
        RequestRefusedError: this request, and not the address or key, is what the server does not take.
        InputError: the key is wrong, or the address, or one that it leads to, or the account is empty; a
            `ForbiddenError` where it may also be the request.
    """
    key = _key(key_variable)
    headers = {"Content-Type": "application/json", "User-Agent": f"rs-gguf/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url + path, data, headers)
        with _opener.open(request, timeout=timeout) as response:
            raw = response.read(_MAX_BODY + 1)
    except urllib.error.HTTPError as error:
        with error:
            _raise_for(url, error, key, key_variable)
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = _without(key, str(error) or type(error).__name__)
        unproven = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
        # Of the address, or of the one that a redirect names.
        if unproven or isinstance(error, ValueError | http.client.InvalidURL):
            raise InputError(f"{url} cannot be asked ({said}).") from None
        raise TryFailedError(said) from None
    if len(raw) > _MAX_BODY:
        raise RequestRefusedError(f"{url} answers with more than {_MAX_BODY >> 20} MiB.")
    try:
        return json.loads(_without(key, raw.decode("utf-8")))
    except (ValueError, RecursionError):
        raise TryFailedError("the answer is no JSON", suspect=True) from None


def served_models(url: str, key_variable: str) -> list[ServedModel]:
    """The models that the server at base `url` lists.

    Raises:
        TryFailedError, InputError: as of `exchange`; the former also where the answer is no such list.
    """
    found = exchange(url, "/models", None, LOOKUP_TIMEOUT, key_variable)
    try:
        return [ServedModel(utf8(entry["id"]), dict(entry.get("meta") or {})) for entry in found["data"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TryFailedError(f"the answer is no list of models ({type(error).__name__}: {error})") from None


def _raise_for(url: str, error: urllib.error.HTTPError, key: str, key_variable: str) -> NoReturn:
    try:
        raw = error.read(_MAX_ERROR + 1)
    except (OSError, http.client.HTTPException):
        raw = b""
    # Blotted out before it is cut, and not looked at where the read cut it: half a key would not be known.
    said = _shortened(_without(key, raw.decode("utf-8", "replace"))) if len(raw) <= _MAX_ERROR else ""
    what = _without(key, f"HTTP {error.code} {error.reason}") + (f" ({said})" if said else "")
    if error.code in _PASSING or (error.code // 100 == 5 and error.code not in _LASTING):
        pause = _seconds(error.headers["Retry-After"])
        busy = error.code in (429, 503, 529)
        raise TryFailedError(what, pause=pause, suspect=error.code == 500, busy=busy) from None
    if error.code in (401, 403):
        held = "does not accept the key in" if key else "wants a key; put it into"
        message = f"{url} {held} {key_variable}: {what}."
        raise (ForbiddenError(message, what) if error.code == 403 else InputError(message)) from None
    if error.code == 402:
        raise InputError(
            f"{url} wants to be paid: {what}. Add credit and run the same command again."
        ) from None
    if error.code == 404 or error.code < 400:
        raise InputError(
            f"{url}: {what}. Give the address that ends before /chat/completions, usually in /v1, "
            "and the model's name after #."
        ) from None
    raise RequestRefusedError(f"{url} refuses the request: {what}.") from None


def checked_url(url: str, key_variable: str) -> str:
    """A base address without its last slash. `InputError` if it is none, or holds what may be a key."""
    url = url.strip().rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # a ValueError where it is no number of a port
        if parts.scheme not in ("http", "https") or not (parts.hostname or "").encode("idna"):
            raise ValueError
    except ValueError:  # brackets that do not close, labels of a name that are empty or too long
        raise InputError(
            f"{_without_secrets(url)!r} is no address of a server. Give one like http://localhost:8080/v1."
        ) from None
    if parts.username or parts.password or parts.query:
        # Not repeated here: it may hold a key.
        raise InputError(
            f"the address of {parts.hostname} holds a user name, password or query. Keys go into "
            f"{key_variable} only."
        )
    return url


def _without_secrets(url: str) -> str:
    """What of an address may be repeated: no user name, password or query."""
    return url.rpartition("@")[2].partition("?")[0]


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise InputError(f"{variable} holds characters that no key has (spaces, line breaks, other letters).")
    return key


def _without(key: str, text: str) -> str:
    # A placeholder such as "x" is no secret, and is part of many a word. Some servers write "/" as "\\/".
    for spelling in (key, key.replace("/", "\\/")) if len(key) >= 8 else ():
        text = text.replace(spelling, "***")
    return text


def _shortened(text: str) -> str:
    return " ".join(text.split())[:300]


def _seconds(header: str | None) -> float | None:
    try:
        return min(max(0.0, float(header)), 600.0) if header else None
    except ValueError:
        return None  # a date; our own pause will do


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
        why = _shortened(utf8(said)) if said else f"{type(error).__name__}: {error}"
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
