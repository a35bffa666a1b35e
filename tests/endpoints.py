"""A stand-in for an OpenAI-compatible server in this process: the test's function is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rs_gguf.judging.exchange import KEY_VARIABLE, SERVER_KEY_VARIABLE

Reply = tuple[int, Any]  # status and JSON body, or bytes sent as they are
Behaviour = Callable[[dict[str, Any]], Reply]


def without_proxy_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go straight to the address that they name, and carry no key, whatever this machine sets."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", KEY_VARIABLE, SERVER_KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Counts what is asked of it, and answers as the test says."""

    def __init__(self, behave: Behaviour, models: list[str]) -> None:
        self.behave, self.models = behave, models
        self.healthy, self.tells_models = True, True
        self.adapters: list[dict[str, Any]] = []  # as a llama-server tells them
        self.meta: dict[str, int] = {}  # of each model, as a llama-server tells it
        self.asked: list[dict[str, Any]] = []
        self.health_checks = 0
        self.keys: set[str | None] = set()
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with outer.lock:
                    outer.health_checks += 1
                    outer.keys.add(self.headers["Authorization"])
                if not outer.healthy:
                    self.reply((503, {"error": "loading"}))
                elif not outer.tells_models:
                    self.reply((404, {"error": "no such path"}))
                elif self.path == "/lora-adapters":
                    self.reply((200, outer.adapters))
                else:
                    told = {"meta": outer.meta} if outer.meta else {}
                    self.reply((200, {"data": [{"id": name, **told} for name in outer.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append(body)
                    outer.keys.add(self.headers["Authorization"])
                assert self.path == "/v1/chat/completions"
                self.reply(outer.behave(body))

            def reply(self, reply: Reply) -> None:
                status, value = reply
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status, "the reason")
                for name, text in outer.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def said(text: str, tokens: list[dict[str, Any]] | None = None, *, finish: str = "stop") -> Reply:
    choice = {
        "message": {"content": text},
        "finish_reason": finish,
        "logprobs": tokens and {"content": tokens},
    }
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}


def entry(text: str, logprob: float, top: dict[str, float] | None = None) -> dict[str, Any]:
    likeliest = [{"token": t, "logprob": v} for t, v in (top or {}).items()]
    return {"token": text, "logprob": logprob, "top_logprobs": likeliest}
