"""Valid addresses, and the servers that a key is sent to."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from fixtures.endpoints import Server, said, without_proxy_or_key

from rs_gguf.engines.server import exchange as exchange_module
from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.exchange import (
    KEY_VARIABLE,
    SERVER_KEY_VARIABLE,
    TryFailedError,
    checked_url,
    event_lines,
    exchange,
)
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.engines.server.replies import served_models
from rs_gguf.errors import InputError

KEY = "sk-do-not-tell-anybody"
ASK = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    without_proxy_or_key(monkeypatch)
    started = [Server(lambda body: said("yes"), ["m"]) for _ in range(2)]
    yield started
    for server in started:
        server.stop()


@pytest.mark.parametrize("variable", [KEY_VARIABLE, SERVER_KEY_VARIABLE])
@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8080", "127.0.0.1", "127.8.9.10:1", "[::1]:8080"),
        *("10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.2:80", "169.254.7.7"),
        *("[fd00::1]", "[fe80::1]"),
    ],
)
def test_a_key_may_cross_this_machine_and_private_networks(
    monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, KEY)
    assert checked_url(f"http://{host}/v1/", variable) == f"http://{host}/v1"


@pytest.mark.parametrize("variable", [KEY_VARIABLE, SERVER_KEY_VARIABLE])
@pytest.mark.parametrize(
    "host",
    [
        *("api.example.com", "gpu-box:8080", "localhost.example.com", "localhost.", "my.localhost"),
        *("8.8.8.8", "172.32.0.1", "192.169.0.1", "11.0.0.1", "100.64.0.1", "192.0.2.1", "0.0.0.0"),
        *("127.1", "2130706433", "0x7f000001", "127.0.0.1.example.com"),
        *("[2001:4860:4860::8888]", "[::]", "[::ffff:8.8.8.8]", "[64:ff9b::a00:1]"),
    ],
)
def test_a_key_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch, host: str, variable: str) -> None:
    without_proxy_or_key(monkeypatch)
    address = f"http://{host}/v1"
    client = EndpointClient([address], "m", EndpointOptions(key_variable=variable))  # allowed without a key
    monkeypatch.setenv(variable, KEY)
    monkeypatch.setattr(exchange_module, "_http", lambda **_: pytest.fail("a request was sent"))
    messages = []
    for attempt in (
        lambda: client.complete(ASK),
        lambda: EndpointClient([address], "m", EndpointOptions(key_variable=variable)),
        lambda: EndpointClient([address], None, EndpointOptions(key_variable=variable)),
    ):
        with pytest.raises(InputError, match="unencrypted") as error:
            attempt()
        messages.append(str(error.value))
    assert KEY not in "".join(messages)
    for part in (variable, address, "Keys are sent over https", "localhost", "unset"):
        assert part in messages[0]
    assert checked_url(f"https://{host}/v1", variable) == f"https://{host}/v1"


def test_the_key_of_an_answering_server_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxy_or_key(monkeypatch)
    monkeypatch.setenv(SERVER_KEY_VARIABLE, KEY)
    with pytest.raises(InputError, match=f"{SERVER_KEY_VARIABLE} would travel unencrypted"):
        LlamaServer("http://gpu-box:8080#m", [])


@pytest.mark.parametrize("location", ["{}/chat/completions", "//{}", "http://[", "/v1/elsewhere"])
def test_no_request_follows_a_redirect(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server, other = servers
    server.moved_to = location.format(other.url)
    for path, data in (("/models", None), ("/chat/completions", b"{}")):
        with pytest.raises(InputError, match=r"HTTP 307|Invalid URL in location header"):
            exchange(server.url, path, data, 30.0, KEY_VARIABLE)
    assert server.health_checks == len(server.asked) == 1
    assert other.keys == set()


def test_a_path_is_sent_as_utf8(servers: list[Server]) -> None:
    servers[0].chat_path = "/v1/%C3%A9/chat/completions"
    client = EndpointClient([f"{servers[0].url}/\u00e9"], "m", EndpointOptions())
    assert client.complete(ASK).text == "yes"


def test_an_answer_that_is_too_long_is_not_read_to_its_end(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "_MAX_BODY", 1 << 20)
    servers[0].behave = lambda body: (200, b" " * (1 << 20) + b"{}")
    with pytest.raises(InputError, match="more than 1 MiB"):
        exchange(servers[0].url, "/chat/completions", b"{}", 30.0, KEY_VARIABLE)
    servers[0].behave = lambda body: (200, b"data: x\n\n" * (1 << 18))
    lines = event_lines(servers[0].url, "/chat/completions", b"{}", 30.0, KEY_VARIABLE)
    with pytest.raises(InputError, match="more than 1 MiB"):
        list(lines)


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("http://localhost:8080/v1", False),
        ("http://192.168.1.2/v1", False),
        ("http://gpu-box/v1", True),
        ("https://192.168.1.2/v1", True),
    ],
)
def test_a_key_does_not_pass_a_proxy_unencrypted(
    monkeypatch: pytest.MonkeyPatch, url: str, proxied: bool
) -> None:
    asked = []

    def client(*, proxied: bool) -> httpx.Client:
        asked.append(proxied)
        return httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, json={})))

    monkeypatch.setattr(exchange_module, "_http", client)
    exchange(url, "/models", None, 30.0, KEY_VARIABLE)
    assert asked == [proxied]


def test_a_proxy_that_cannot_be_used_is_an_error(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
    monkeypatch.setattr(exchange_module, "_http", exchange_module._http.__wrapped__)
    with pytest.raises(InputError, match=r"cannot use the proxy.*socks://.*ALL_PROXY"):
        served_models("http://gpu-box:8080/v1", KEY_VARIABLE)
    assert served_models(servers[0].url, KEY_VARIABLE)  # no proxy is used on this machine


def test_a_missing_server_may_be_tried_again(servers: list[Server]) -> None:
    with pytest.raises(TryFailedError, match="refused"):
        exchange("http://127.0.0.1:1", "/models", None, 30.0, KEY_VARIABLE)
