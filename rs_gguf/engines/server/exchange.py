"""One exchange with one OpenAI-compatible server, and what can come of it.

An address and a JSON body go in; the server's JSON comes out, or an error that says whether another try may
help. The key is read from the environment for each exchange and kept nowhere; if a server repeats it, it is
blotted out. It is never sent over plain HTTP to another network, and redirects are not followed: one would
carry the key to an address that nobody named. Judges and models that answer each have a variable of their
own: the key of one is not sent to the other.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import ssl
from typing import Any

import httpx

from rs_gguf.errors import InputError
from rs_gguf.version import __version__

KEY_VARIABLE = "RS_GGUF_API_KEY"  # of judges
SERVER_KEY_VARIABLE = "RS_GGUF_SERVER_KEY"  # of servers whose model is measured

LOOKUP_TIMEOUT = 30.0  # seconds, of a question that a server answers at once

_MAX_BODY = 64 << 20  # bytes of a response; more is no completion
# Statuses that another try may cure: these, and each 5xx (proxies have their own) but for the lasting ones.
_PASSING, _LASTING = frozenset({408, 409, 425, 429}), frozenset({501, 505})
# Networks that a key may cross unencrypted: loopback, private and link-local (RFC 1918, 3927, 4193, 4291).
_NEAR = [
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("::1", "fc00::/7", "fe80::/10"),
    )
]


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


@functools.cache
def _http() -> httpx.Client:
    """Return the connections of all threads; they live as long as the process."""
    try:
        return httpx.Client(
            verify=ssl.create_default_context(),  # the system's certificates, not httpx's own
            # The caller limits how many requests are under way. Many servers close what was idle for 5
            # seconds, so a connection as old might be gone once it is used.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        )
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"cannot use the proxy that the environment names: {error}. Set HTTP_PROXY, HTTPS_PROXY and "
            "ALL_PROXY to addresses like http://proxy:3128, or unset them."
        ) from None


def exchange(url: str, path: str, data: bytes | None, timeout: float, key_variable: str) -> Any:
    """Return the JSON that a server answers with at base `url` plus `path`: POST with `data`, else GET.

    The key in the environment's `key_variable`, if any, goes with it.

    Raises:
        TryFailedError: no connection, a busy or broken server, an answer that is not JSON.
        RequestRefusedError: this request, and not the address or key, is what the server does not take.
        InputError: the key is wrong, or the address, or one that it leads to, or the account is empty; a
            `ForbiddenError` where it may also be the request.
    """
    key = _key(url, key_variable)
    headers = {"Content-Type": "application/json", "User-Agent": f"rs-gguf/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    method, raw = "POST" if data else "GET", bytearray()
    try:
        with _http().stream(method, url + path, content=data, headers=headers, timeout=timeout) as response:
            for chunk in response.iter_bytes():
                raw += chunk
                if len(raw) > _MAX_BODY:
                    raise RequestRefusedError(f"{url} answers with more than {_MAX_BODY >> 20} MiB.")
    except httpx.RequestError as error:
        said = _without(key, str(error) or type(error).__name__)
        # No other try cures these two: the first is of the address, the second of one that it leads to.
        if any(sign in said for sign in ("CERTIFICATE_VERIFY_FAILED", "Invalid URL in location header")):
            raise InputError(f"{url} cannot be asked ({said}).") from None
        raise TryFailedError(said) from None
    if not response.is_success:
        # Blotted out before it is cut: half a key would not be known.
        said = shortened(_without(key, raw.decode("utf-8", "replace")))
        what = _without(key, f"HTTP {response.status_code} {response.reason_phrase}")
        raise _failure(url, response, f"{what} ({said})" if said else what, key, key_variable)
    try:
        return json.loads(_without(key, raw.decode("utf-8")))
    except (ValueError, RecursionError):
        raise TryFailedError("the answer is no JSON", suspect=True) from None


def _failure(
    url: str, response: httpx.Response, what: str, key: str, key_variable: str
) -> InputError | TryFailedError:
    """Return the error for a status other than success."""
    status = response.status_code
    if status in _PASSING or (status // 100 == 5 and status not in _LASTING):
        pause = _seconds(response.headers.get("Retry-After"))
        return TryFailedError(what, pause=pause, suspect=status == 500, busy=status in (429, 503, 529))
    if status in (401, 403):
        held = "does not accept the key in" if key else "wants a key; put it into"
        message = f"{url} {held} {key_variable}: {what}."
        return ForbiddenError(message, what) if status == 403 else InputError(message)
    if status == 402:
        return InputError(f"{url} wants to be paid: {what}. Add credit and run the same command again.")
    if status == 404 or status < 400:
        return InputError(
            f"{url}: {what}. Give the address that ends before /chat/completions, usually in /v1, "
            "and the model's name after #."
        )
    return RequestRefusedError(f"{url} refuses the request: {what}.")


def checked_url(url: str, key_variable: str) -> str:
    """Return a base address without its last slash.

    Raises:
        InputError: it is not an address, holds what may be a key, or the key may not be sent there.
    """
    url = url.strip().rstrip("/")
    try:
        parts = httpx.URL(url)
        parts.raw_host.decode().encode("idna")  # a ValueError if a label of the name is empty or too long
        valid = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) < 1 << 16
    except (httpx.InvalidURL, ValueError):
        valid = False
    if not valid or any(letter.isspace() for letter in url):
        shown = url.rpartition("@")[2].partition("?")[0]  # without user name, password and query
        raise InputError(f"{shown!r} is no address of a server. Give one like http://localhost:8080/v1.")
    if parts.userinfo or parts.query:
        # Not repeated here: it may hold a key.
        raise InputError(
            f"the address of {parts.host} holds a user name, password or query. Keys go into "
            f"{key_variable} only."
        )
    _key(url, key_variable)
    return url


def _key(url: str, variable: str) -> str:
    """Return the key to send to `url`, empty for none. `InputError` if it may not be sent there."""
    key = os.environ.get(variable, "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise InputError(f"{variable} holds characters that no key has (spaces, line breaks, other letters).")
    if key and not _is_private(httpx.URL(url)):
        raise InputError(
            f"the key in {variable} would travel unencrypted to {url}. Keys are sent over https, or over "
            "http to a host on this machine (localhost) or with a private or link-local IP address. Give an "
            f"address with https://, one of a tunnel that begins at localhost, or unset {variable}."
        )
    return key


def _is_private(url: httpx.URL) -> bool:
    """Whether nobody outside reads along. A name may lead anywhere, so only `localhost` counts."""
    if url.scheme == "https" or url.host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return False
    return any(address in network for network in _NEAR)


def _without(key: str, text: str) -> str:
    # A placeholder such as "x" is no secret, and is part of many a word. Some servers write "/" as "\\/".
    for spelling in (key, key.replace("/", "\\/")) if len(key) >= 8 else ():
        text = text.replace(spelling, "***")
    return text


def shortened(text: str) -> str:
    return " ".join(text.split())[:300]


def _seconds(header: str | None) -> float | None:
    with contextlib.suppress(ValueError):
        return min(max(0.0, float(header or "")), 600.0)
    return None  # there is none, or it is a date; our own pause will do
