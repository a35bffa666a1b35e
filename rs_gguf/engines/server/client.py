"""A client of OpenAI-compatible servers (llama-server, vLLM, hosted ones): many requests at once.

Bodies of `/chat/completions` go in, numbered completions come out, each once. Several servers of one model
share the work: each failure of a server keeps it out for a while that doubles, after which it must pass a
health check, and the request goes on at another one.
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

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds

Body = Mapping[str, Any]


@dataclass(frozen=True)
class EndpointOptions:
    """How servers are used.

    Attributes:
        concurrency: requests under way at once, over all servers.
        per_minute: most requests begun in a minute, over all servers; None is no limit.
        attempts: tries of one request before the run is given up.
        timeout: seconds without a byte after which a try has failed, and one more for each token that may be
            answered: a server sends none before the last one, and a large model on a CPU is that slow.
        price: money for a million prompt tokens, and for a million completion tokens.
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
    failed_at: float = float("-inf")
    out_until: float = float("-inf")


class EndpointClient:
    """Requests to one model on one or several servers.

    Args:
        urls: base addresses, such as `http://localhost:8080/v1`.
        model: the model's name at the servers; None takes the only one that the first server has.
        clock, sleep: time in seconds, and waiting for it; tests give their own.

    Raises:
        InputError: no usable address, a key that may not be sent to one, or no model was named and the server
            has not just one.
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
        self._answered: bytes | None = None  # the last request that was
        self.usage = Usage()
        self.model = model or self._only_model()

    @classmethod
    def of(cls, spec: str, options: EndpointOptions) -> EndpointClient:
        """The client for `ADDRESS[,ADDRESS…][#MODEL]`."""
        addresses, _, model = spec.partition("#")
        return cls(addresses.split(","), model or None, options)

    def complete(self, body: Body) -> Completion:
        """Return one completion; `model` is added to the body.

        Raises:
            RequestRefusedError: a server took offence at this request, or failed on it twice, but answers the
                one that was last answered when it is asked again.
            InputError: no server can be used, all tries failed, or the one that was last answered is refused
                as well.
        """
        [(_, found)] = self.complete_all([body])
        if isinstance(found, RequestRefusedError):
            raise found
        return found

    def complete_all(self, bodies: Iterable[Body]) -> Iterator[tuple[int, Completion | RequestRefusedError]]:
        """Yield (index, completion) of each body once, as they come; a refused request is yielded as such.

        Bodies are taken as they are needed, so that a million of them need no more memory than a hundred.
        """
        stop = threading.Event()
        done: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()

        def work(i: int, body: Body) -> None:
            try:
                done.put((i, self._complete(body, stop)))
            except Exception as error:
                done.put((i, error))

        waiting, under_way = enumerate(bodies), 0
        try:
            while True:
                for item in itertools.islice(waiting, self._options.concurrency - under_way):
                    # Threads of a pool would keep the process until all that is under way was answered.
                    threading.Thread(target=work, args=item, daemon=True).start()
                    under_way += 1
                if not under_way:
                    return
                i, found = done.get()
                under_way -= 1
                if isinstance(found, Exception) and not isinstance(found, RequestRefusedError):
                    raise found
                yield i, found
        finally:
            stop.set()  # whoever stops early, by an error, Ctrl-C or leaving the loop, waits for nothing

    def _complete(self, body: Body, stop: threading.Event) -> Completion:
        data = json.dumps({"model": self.model, **body}).encode()
        timeout = self._options.timeout + body.get("max_tokens", 0)
        said: list[str] = []
        try:
            completion = self._ask(data, timeout, stop, said, may_blame=True)
        except RequestRefusedError:
            # A server that takes nothing any more must not cost one row after the other: is it the request?
            if self._answered is not None:
                try:
                    self._ask(self._answered, timeout, stop, said)
                except RequestRefusedError as error:
                    raise InputError(
                        f"{error} That very request was answered before. Check the server and the account, "
                        "then run the same command again."
                    ) from None
            raise
        self._answered = data
        return completion

    def _ask(
        self, data: bytes, timeout: float, stop: threading.Event, said: list[str], *, may_blame: bool = False
    ) -> Completion:
        """Try until a server answers, or `said`, what went wrong each time, is as long as tries are allowed.

        Raises:
            RequestRefusedError: as of `exchange`; if `may_blame`, also where a server failed on the request
                twice, or forbids it where others were answered.
            InputError: no server can be used, or all tries failed.
        """
        key_variable = self._options.key_variable
        crashes = 0
        server: _Server | None = None
        while len(said) < self._options.attempts:
            server = self._take(stop, avoid=server)
            started, asking, answered = self._clock(), False, server.answers
            try:
                if server.failures:
                    # Any answer but "not now" is a sign of life; not every server has this path.
                    with contextlib.suppress(InputError):
                        exchange(server.url, "/models", None, LOOKUP_TIMEOUT, key_variable)
                self._wait_for_turn(stop)
                started, asking = self._clock(), True
                answer = exchange(server.url, "/chat/completions", data, timeout, key_variable)
                completion, counted = parse_completion(answer)
            except TryFailedError as error:
                self._failed(server, started, error.pause)
                # Where others were answered in the meantime, this one's turn will come.
                if not error.busy or server.answers == answered:
                    said.append(f"{server.url}: {error}")
                crashes += asking and error.suspect
                if may_blame and crashes == 2:
                    raise RequestRefusedError(f"{server.url} failed on a request twice: {error}.") from None
            except ForbiddenError as error:
                if not may_blame or self._answered is None:
                    raise
                said.append(f"{server.url}: {error.said}")
                raise RequestRefusedError(f"{server.url} refuses the request: {error.said}.") from None
            else:
                self._succeeded(server, *counted)
                return completion
            finally:
                with self._lock:
                    server.in_flight -= 1
        raise InputError(
            f"no answer after {len(said)} tries; the last said: {said[-1]}. Check that the server runs "
            "and has room, then run the same command again."
        )

    def _take(self, stop: threading.Event, *, avoid: _Server | None) -> _Server:
        """Wait for a server that is not kept out. Take the least busy one, `avoid` only if it is the last."""
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
            raise InputError("the requests were called off.")

    def _failed(self, server: _Server, started: float, pause: float | None) -> None:
        with self._lock:
            self.usage = replace(self.usage, retries=self.usage.retries + 1)
            # Requests that were under way together fail together: that is one failure.
            if started >= server.failed_at:
                server.failures += 1
            own = min(_FIRST_PAUSE * 2.0 ** min(server.failures - 1, 64), _LONGEST_PAUSE)
            server.failed_at = self._clock()
            server.out_until = max(server.out_until, server.failed_at + max(own, pause or 0.0))

    def _succeeded(self, server: _Server, prompt: int, completion: int) -> None:
        with self._lock:
            server.failures = 0
            server.answers += 1
            price, past = self._options.price, self.usage
            self.usage = replace(
                past,
                requests=past.requests + 1,
                prompt_tokens=past.prompt_tokens + prompt,
                completion_tokens=past.completion_tokens + completion,
                cost=past.cost + (prompt * price[0] + completion * price[1]) / 1e6,
            )

    def _only_model(self) -> str:
        """The model of the first server that is there."""
        for server in self._servers:
            try:
                names = [model.name for model in served_models(server.url, self._options.key_variable)]
            except TryFailedError as error:
                said = f"{server.url} does not tell its models ({error}). Name one: ADDRESS#MODEL."
                continue
            if len(names) != 1:
                raise InputError(
                    f"{server.url} has {len(names)} models. Name one, {server.url}#MODEL: "
                    f"{', '.join(names[:20])}."
                )
            return names[0]
        raise InputError(said)
