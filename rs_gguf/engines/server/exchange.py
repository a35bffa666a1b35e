"""Make one HTTP exchange with an OpenAI-compatible server.

An address and a JSON body go in; the server's JSON comes out, or an error that says whether another try may
help. The API key is read from the environment for each exchange and is not stored. If a server repeats the
key, it is replaced by `***`. The key is never sent over plain HTTP to another network. Redirects are not
followed, because they would carry the key to an address that the user did not name. Judges and answering
servers have separate variables, so neither gets the other's key.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import ssl
from collections.abc import Iterator
from typing import Any

import httpx

from rs_gguf.errors import InputError
from rs_gguf.version import __version__

KEY_VARIABLE = "RS_GGUF_API_KEY"  # for judges
SERVER_KEY_VARIABLE = "RS_GGUF_SERVER_KEY"  # for servers whose model is measured

LOOKUP_TIMEOUT = 30.0  # seconds, for a request that a server answers at once

_MAX_BODY = 64 << 20  # bytes of a response; a completion is always smaller
# Another try may succeed after passing statuses and after every 5xx (proxies add some) except lasting ones.
_PASSING, _LASTING = frozenset({408, 409, 425, 429}), frozenset({501, 505})
# A key may cross these networks unencrypted: loopback, private and link-local (RFC 1918, 3927, 4193, 4291).
_NEAR = [
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("::1", "fc00::/7", "fe80::/10"),
    )
]


class RequestRefusedError(InputError):
    """A server refuses this one request from any user (too long, an unknown option)."""


class ForbiddenError(InputError):
    """HTTP 403: the server refuses the key or this request (moderation). `reply` is the server's text."""

    def __init__(self, message: str, reply: str) -> None:
        super().__init__(message)
        self.reply = reply


class TryFailedError(Exception):
    """Another try may succeed.

    Attributes:
        pause: seconds to wait, if the server named them; else None.
        suspect: the server responded and may have failed because of this very request.
        busy: the server responded but has too many requests.
    """

    def __init__(
        self, problem: str, *, pause: float | None = None, suspect: bool = False, busy: bool = False
    ) -> None:
        super().__init__(problem)
        self.pause, self.suspect, self.busy = pause, suspect, busy


@functools.cache
def _http(*, proxied: bool) -> httpx.Client:
    """Return the HTTP client of all threads. Its connections live as long as the process.

    proxied: use the proxy of the environment, if there is one.
    """
    try:
        return httpx.Client(
            trust_env=proxied,
            verify=ssl.create_default_context(),  # the system's certificates, not httpx's own
            # The caller limits the concurrent requests. Many servers close a connection after 5 idle
            # seconds, so one that is almost as old might be gone when it is used.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        )
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"cannot use the proxy of the environment: {error}. Set HTTP_PROXY, HTTPS_PROXY and ALL_PROXY "
            "to addresses like http://proxy:3128, or unset them."
        ) from None


def exchange(url: str, path: str, data: bytes | None, timeout: float, key_variable: str) -> Any:
    """Return the JSON of a server at base `url` plus `path`: POST if there is `data`, else GET.

    The request carries the key in the environment variable `key_variable`, if it is set.

    Raises:
        TryFailedError: there is no connection, the server is busy or broken, or its answer is not JSON.
        RequestRefusedError: the server refuses this request, but not the address or the key.
        InputError: the key, the address or a redirect is wrong, or the account is empty. It is a
            `ForbiddenError` if the request may also be the reason.
    """
    key = _key(url, key_variable)
    with _response(url, path, data, timeout, key, key_variable) as response:
        raw = _body(url, response)
    try:
        return json.loads(_without(key, raw.decode("utf-8")))
    except (ValueError, RecursionError):
        raise TryFailedError("the answer is not JSON", suspect=True) from None


def event_lines(url: str, path: str, data: bytes, timeout: float, key_variable: str) -> Iterator[str]:
    """Yield the lines of a server's answer to `data` as they arrive. Raises as `exchange` does."""
    key = _key(url, key_variable)
    with _response(url, path, data, timeout, key, key_variable) as response:
        size = 0
        for line in response.iter_lines():
            size += len(line)
            _check_size(url, size)
            yield _without(key, line)


@contextlib.contextmanager
def _response(
    url: str, path: str, data: bytes | None, timeout: float, key: str, key_variable: str
) -> Iterator[httpx.Response]:
    """Yield a successful response whose body is not read yet. Raises as `exchange` does."""
    headers = {"Content-Type": "application/json", "User-Agent": f"rs-gguf/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    method = "POST" if data else "GET"
    # A proxy would read a key that is sent unencrypted, and seldom reaches a private network.
    client = _http(proxied=url.startswith("https:") or not _is_private(httpx.URL(url)))
    try:
        with client.stream(method, url + path, content=data, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                # The key is removed before the text is cut: half a key would not be recognised.
                text = shortened(_without(key, _body(url, response).decode("utf-8", "replace")))
                status = _without(key, f"HTTP {response.status_code} {response.reason_phrase}")
                raise _failure(url, response, f"{status} ({text})" if text else status, key, key_variable)
            yield response
    except httpx.RequestError as error:
        problem = _without(key, str(error) or type(error).__name__)
        # Another try cannot succeed after these two: the address is wrong, or a redirect of it.
        if any(sign in problem for sign in ("CERTIFICATE_VERIFY_FAILED", "Invalid URL in location header")):
            raise InputError(
                f"cannot send a request to {url} ({problem}). Check the address and its certificate."
            ) from None
        raise TryFailedError(problem) from None


def _body(url: str, response: httpx.Response) -> bytes:
    """Return the body of a response. Raise `RequestRefusedError` if it is too long."""
    raw = bytearray()
    for chunk in response.iter_bytes():
        raw += chunk
        _check_size(url, len(raw))
    return bytes(raw)


def _check_size(url: str, size: int) -> None:
    if size > _MAX_BODY:
        raise RequestRefusedError(
            f"the answer of {url} has more than {_MAX_BODY >> 20} MiB, the most that is read."
        )


def _failure(
    url: str, response: httpx.Response, problem: str, key: str, key_variable: str
) -> InputError | TryFailedError:
    """Return the error for a status other than success."""
    status = response.status_code
    if status in _PASSING or (status // 100 == 5 and status not in _LASTING):
        pause = _seconds(response.headers.get("Retry-After"))
        return TryFailedError(problem, pause=pause, suspect=status == 500, busy=status in (429, 503, 529))
    if status in (401, 403):
        demand = "does not accept the key in" if key else "needs a key; put it into"
        message = f"{url} {demand} {key_variable}: {problem}."
        return ForbiddenError(message, problem) if status == 403 else InputError(message)
    if status == 402:
        return InputError(f"{url} demands payment: {problem}. Add credit and run the same command again.")
    if status == 404 or status < 400:
        return InputError(
            f"{url}: {problem}. Give the address that ends before /chat/completions, usually in /v1, "
            "and the model's name after #."
        )
    return RequestRefusedError(f"{url} refuses the request: {problem}.")


def checked_url(url: str, key_variable: str) -> str:
    """Return a base address without a slash at its end.

    Raises:
        InputError: `url` is not an address, may contain a key, or the key may not be sent to it.
    """
    url = url.strip().rstrip("/")
    try:
        parts = httpx.URL(url)
        parts.raw_host.decode().encode("idna")  # raises ValueError if a label is empty or too long
        valid = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) < 1 << 16
    except (httpx.InvalidURL, ValueError):
        valid = False
    if not valid or any(letter.isspace() for letter in url):
        shown = url.rpartition("@")[2].partition("?")[0]  # without user name, password and query
        raise InputError(f"{shown!r} is not the address of a server. Give one like http://localhost:8080/v1.")
    if parts.userinfo or parts.query:
        # The message does not repeat the address, which may contain a key.
        raise InputError(
            f"the address of {parts.host} contains a user name, password or query, which it may not. Keys go "
            f"into {key_variable} only."
        )
    _key(url, key_variable)
    return url


def _key(url: str, variable: str) -> str:
    """Return the key for `url`, "" for none. Raise `InputError` if it may not be sent there."""
    key = os.environ.get(variable, "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise InputError(
            f"{variable} contains characters that a key cannot have (spaces, line breaks, letters outside "
            "ASCII). Set it to the key alone."
        )
    if key and not _is_private(httpx.URL(url)):
        raise InputError(
            f"the key in {variable} would travel unencrypted to {url}. Keys are sent over https, or over "
            "http to this machine (localhost) or to a private or link-local IP address. Give an address with "
            f"https:// or of a tunnel that begins at localhost, or unset {variable}."
        )
    return key


def _is_private(url: httpx.URL) -> bool:
    """Return whether outsiders cannot read along. Names except `localhost` may lead anywhere."""
    if url.scheme == "https" or url.host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return False
    return any(address in network for network in _NEAR)


def _without(key: str, text: str) -> str:
    # A placeholder such as "x" is not secret and occurs in many words. Some servers write "/" as "\\/".
    for spelling in (key, key.replace("/", "\\/")) if len(key) >= 8 else ():
        text = text.replace(spelling, "***")
    return text


def shortened(text: str) -> str:
    return " ".join(text.split())[:300]


def _seconds(header: str | None) -> float | None:
    with contextlib.suppress(ValueError):
        return min(max(0.0, float(header or "")), 600.0)
    return None  # no header, or a date: the client then uses its own pause
