"""A client of OpenAI-compatible servers (llama-server, vLLM, hosted ones) that sends many requests at once.

Bodies for `/chat/completions` go in; numbered completions come out, each once. Several servers of one model
share the work. A server that fails is left out for a pause, which doubles with each failure, and must then
pass a health check. Its request goes to another server.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rs_gguf.engines.server.exchange import (
    KEY_VARIABLE,
    LOOKUP_TIMEOUT,
    ForbiddenError,
    RequestRefusedError,
    TryFailedError,
    checked_url,
    exchange,
)
from rs_gguf.engines.server.replies import Completion, Usage, parse_completion, served_models
from rs_gguf.errors import InputError

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds that a failed server is left out

Body = Mapping[str, Any]


@dataclass(frozen=True)
class EndpointOptions:
    """How servers are used.

    Attributes:
        concurrency: concurrent requests, over all servers.
        per_minute: the most requests started in a minute, over all servers; None means no limit.
        attempts: tries of one request before the client raises an error.
        timeout: seconds without a byte after which a try fails. One second per allowed token is added: a
            server sends nothing before the last token, and a large model on a CPU may need that long.
        price: the price of a million prompt tokens, and of a million completion tokens.
        key_variable: the environment variable that holds the key.
    """

    concurrency: int = 8
    per_minute: float | None = None
    attempts: int = 8
    timeout: float = 600.0
    price: tuple[float, float] = (0.0, 0.0)
    key_variable: str = KEY_VARIABLE


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    answers: int = 0
    failures: int = 0  # in a row
    failed_at: float = float("-inf")  # never
    out_until: float = float("-inf")  # not left out


class EndpointClient:
    """A client for one model on one or several servers.

    Args:
        urls: base addresses, such as `http://localhost:8080/v1`.
        model: the model's name at the servers; None uses the only model of the first reachable server.
        clock: returns the time in seconds; tests replace it.
        sleep: waits for some seconds; None waits until the time is over or the caller stops.

    Raises:
        InputError: an address is wrong, the key may not be sent to it, or `model` is None and the server does
            not have exactly one model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        options: EndpointOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.urls = [checked_url(url, options.key_variable) for url in dict.fromkeys(urls)]
        self._servers = [_Server(url) for url in self.urls]
        self._options, self._clock, self._sleep = options, clock, sleep
        self._lock = threading.Lock()
        self._next_start = float("-inf")
        self._answered: bytes | None = None  # the last request that was answered; None before the first
        self.usage = Usage()
        self.model = model or self._only_model()

    @classmethod
    def of(cls, spec: str, options: EndpointOptions) -> EndpointClient:
        """Return the client for `ADDRESS[,ADDRESS…][#MODEL]`. Raises as the class does."""
        addresses, _, model = spec.partition("#")
        return cls(addresses.split(","), model or None, options)

    def complete(self, body: Body) -> Completion:
        """Return one completion. The client adds `model` to the body.

        Raises:
            RequestRefusedError: a server refused this request or failed on it twice, but still answers the
                last request that was answered.
            InputError: no server can be used, all tries failed, or the server now also refuses the last
                request that was answered.
        """
        [(_, result)] = self.complete_all([body])
        if isinstance(result, RequestRefusedError):
            raise result
        return result

    def complete_all(self, bodies: Iterable[Body]) -> Iterator[tuple[int, Completion | RequestRefusedError]]:
        """Yield (index, completion or refusal) once for each body, in the order in which they finish.

        Bodies are consumed as needed, so a million bodies need no more memory than a hundred. Raises
        `InputError` as `complete` does.
        """
        stop = threading.Event()
        done: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()

        def work(i: int, body: Body) -> None:
            try:
                done.put((i, self._complete(body, stop)))
            except Exception as error:
                done.put((i, error))

        waiting, n_running = enumerate(bodies), 0
        try:
            while True:
                for item in itertools.islice(waiting, self._options.concurrency - n_running):
                    # A thread pool would keep the process alive until all running requests were answered.
                    threading.Thread(target=work, args=item, daemon=True).start()
                    n_running += 1
                if not n_running:
                    return
                i, result = done.get()
                n_running -= 1
                if isinstance(result, Exception) and not isinstance(result, RequestRefusedError):
                    raise result
                yield i, result
        finally:
            stop.set()  # a caller that stops early (error, Ctrl-C, leaving the loop) does not wait

    def _complete(self, body: Body, stop: threading.Event) -> Completion:
        data = json.dumps({"model": self.model, **body}).encode()
        timeout = self._options.timeout + body.get("max_tokens", 0)
        problems: list[str] = []
        try:
            completion = self._try(data, timeout, stop, problems, may_refuse=True)
        except RequestRefusedError:
            # Is it the request or the server? A server that now refuses everything must not cost all rows.
            if self._answered is not None:
                try:
                    self._try(self._answered, timeout, stop, problems)
                except RequestRefusedError as error:
                    raise InputError(
                        f"{error} That very request was answered before. Check the server and the account, "
                        "then run the same command again."
                    ) from None
            raise
        self._answered = data
        return completion

    def _try(
        self,
        data: bytes,
        timeout: float,
        stop: threading.Event,
        problems: list[str],
        *,
        may_refuse: bool = False,
    ) -> Completion:
        """Try until a server answers or all tries are used. Each failed try adds an entry to `problems`.

        Raises:
            RequestRefusedError: as in `exchange`. With `may_refuse`, also if a server failed on the request
                twice, or forbids it after answering others.
            InputError: no server can be used, or all tries failed.
        """
        key_variable = self._options.key_variable
        crashes = 0
        server: _Server | None = None
        while len(problems) < self._options.attempts:
            server = self._take(stop, avoid=server)
            started, sent, n_answers = self._clock(), False, server.answers
            try:
                if server.failures:
                    # Any answer except "not now" shows that the server works; some servers lack this path.
                    with contextlib.suppress(InputError):
                        exchange(server.url, "/models", None, LOOKUP_TIMEOUT, key_variable)
                self._wait_for_turn(stop)
                started, sent = self._clock(), True
                answer = exchange(server.url, "/chat/completions", data, timeout, key_variable)
                completion, n_tokens = parse_completion(answer)
            except TryFailedError as error:
                self._failed(server, started, error.pause)
                # A busy server that answered others in the meantime will answer this one too.
                if not error.busy or server.answers == n_answers:
                    problems.append(f"{server.url}: {error}")
                crashes += sent and error.suspect
                if may_refuse and crashes == 2:
                    raise RequestRefusedError(f"{server.url} failed on a request twice: {error}.") from None
            except ForbiddenError as error:
                if not may_refuse or self._answered is None:
                    raise
                problems.append(f"{server.url}: {error.reply}")
                raise RequestRefusedError(f"{server.url} refuses the request: {error.reply}.") from None
            else:
                self._succeeded(server, *n_tokens)
                return completion
            finally:
                with self._lock:
                    server.in_flight -= 1
        raise InputError(
            f"no answer after {len(problems)} tries; the last error was: {problems[-1]}. Check that the "
            "server runs and has room, then run the same command again."
        )

    def _take(self, stop: threading.Event, *, avoid: _Server | None) -> _Server:
        """Wait for a server that is not left out, and take the least busy one. Take `avoid` only if alone."""
        while True:
            with self._lock:
                now = self._clock()
                ready = [server for server in self._servers if server.out_until <= now]
                if ready:
                    best = min(ready, key=lambda server: (server is avoid, server.in_flight))
                    best.in_flight += 1
                    return best
                pause = min(server.out_until for server in self._servers) - now
            self._pause(pause, stop)

    def _wait_for_turn(self, stop: threading.Event) -> None:
        with self._lock:
            now = self._clock()
            turn = max(now, self._next_start)
            self._next_start = turn + 60.0 / (self._options.per_minute or math.inf)
        self._pause(turn - now, stop)

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        if seconds > 0:
            (self._sleep or stop.wait)(seconds)
        if stop.is_set():
            raise InputError("the requests were cancelled.")

    def _failed(self, server: _Server, started: float, pause: float | None) -> None:
        with self._lock:
            self.usage = replace(self.usage, retries=self.usage.retries + 1)
            # Concurrent requests fail together: that counts as one failure.
            if started >= server.failed_at:
                server.failures += 1
            default = min(_FIRST_PAUSE * 2.0 ** min(server.failures - 1, 64), _LONGEST_PAUSE)
            server.failed_at = self._clock()
            server.out_until = max(server.out_until, server.failed_at + max(default, pause or 0.0))

    def _succeeded(self, server: _Server, prompt: int, completion: int) -> None:
        with self._lock:
            server.failures = 0
            server.answers += 1
            price, usage = self._options.price, self.usage
            self.usage = replace(
                usage,
                requests=usage.requests + 1,
                prompt_tokens=usage.prompt_tokens + prompt,
                completion_tokens=usage.completion_tokens + completion,
                cost=usage.cost + (prompt * price[0] + completion * price[1]) / 1e6,
            )

    def _only_model(self) -> str:
        """Return the only model of the first server that responds. Raise `InputError` if there is not one."""
        for server in self._servers:
            try:
                names = [model.name for model in served_models(server.url, self._options.key_variable)]
            except TryFailedError as error:
                message = f"{server.url} does not list its models ({error}). Name one: ADDRESS#MODEL."
                continue
            if len(names) != 1:
                raise InputError(
                    f"{server.url} has {len(names)} models; exactly one is needed. Name one as "
                    f"{server.url}#MODEL: {', '.join(names[:20])}."
                )
            return names[0]
        raise InputError(message)
