"""Several llama-servers as one model: all are asked, each with its scales, and they must be alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import Reply, Server, said, without_proxy_or_key

from rs_gguf.errors import InputError
from rs_gguf.prompts import Prompt
from rs_gguf.server import LlamaServer

PROMPTS = [Prompt(str(k), "benign") for k in range(40)]
ADAPTERS = [{"id": 0, "path": "/m/style.gguf", "scale": 0.75}, {"id": 1, "path": "/m/a.gguf", "scale": 0.0}]


def echo(body: dict[str, Any]) -> Reply:
    return said("It is " + body["messages"][-1]["content"])


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    without_proxy_or_key(monkeypatch)
    started = [Server(echo, ["m"]) for _ in range(3)]
    for server in started:
        server.adapters = ADAPTERS
    yield started
    for server in started:
        server.stop()


def test_all_servers_answer_in_the_order_of_the_prompts(servers: list[Server]) -> None:
    address = ", ".join(server.url.removesuffix("/v1") for server in servers) + "/#m"
    advanced: list[int] = []
    model = LlamaServer(address, [(Path("a.gguf"), 0.5)])
    found, tokens, _ = model.answers(PROMPTS, 2.0, max_tokens=5, advance=advanced.append)
    assert [answer.text for answer in found] == [f"It is {p.prompt}" for p in PROMPTS]
    assert advanced == [1] * 40
    assert tokens == 40 * 7
    asked = [body for server in servers for body in server.asked]
    assert sorted(int(body["messages"][0]["content"]) for body in asked) == list(range(40))
    assert min(len(server.asked) for server in servers) > 0
    assert all(body["lora"] == [{"id": 0, "scale": 0.75}, {"id": 1, "scale": 1.0}] for body in asked)


@pytest.mark.parametrize("number", [float("inf"), "first", None])
def test_numbers_of_adapters_that_are_none(servers: list[Server], number: Any) -> None:
    servers[0].adapters = [ADAPTERS[1] | {"id": number}]
    with pytest.raises(InputError, match="does not tell its adapters"):
        LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])


@pytest.mark.parametrize(
    "other",
    [
        [ADAPTERS[0] | {"id": 1}, ADAPTERS[1] | {"id": 0}],
        [ADAPTERS[0] | {"scale": 1.0}, ADAPTERS[1]],
        [ADAPTERS[1]],
    ],
    ids=["numbered otherwise", "scaled otherwise", "one less"],
)
def test_servers_that_differ_are_refused(servers: list[Server], other: list[dict[str, Any]]) -> None:
    servers[2].adapters = other
    with pytest.raises(InputError, match=f"{servers[0].url[:-3]} and {servers[2].url[:-3]} differ"):
        LlamaServer(",".join(server.url for server in servers), [(Path("a.gguf"), 0.5)])
    LlamaServer(",".join(server.url for server in servers), [])  # no adapter is asked for: none matters
