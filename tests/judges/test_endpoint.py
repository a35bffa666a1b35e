"""The endpoint client and judge against a real HTTP server in this process, with a simulated clock."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fixtures.endpoints import Behaviour, Reply, Server, entry, said, without_proxy_or_key

from rs_gguf.engines.server import client as client_module
from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.exchange import KEY_VARIABLE, SERVER_KEY_VARIABLE, RequestRefusedError, exchange
from rs_gguf.engines.server.replies import Completion, Token
from rs_gguf.errors import InputError
from rs_gguf.judges.endpoint import EndpointJudge, label_confidence
from rs_gguf.judges.votes import vote_confidence

KEY = "sk-do-not-tell-anybody"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    without_proxy_or_key(monkeypatch)
    servers: list[Server] = []

    def start(behave: Behaviour, models: list[str] | None = None) -> Server:
        servers.append(Server(behave, models or ["judge"]))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Time:
    """A clock that moves only when `sleep` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.slept.append(seconds)
            self.now += seconds


def client(*servers: Server, time: Time | None = None, **options: Any) -> EndpointClient:
    time = time or Time()
    urls = [server.url for server in servers]
    return EndpointClient(urls, "judge", EndpointOptions(**options), clock=time.clock, sleep=time.sleep)


def echo(body: dict[str, Any]) -> Reply:
    return said(body["messages"][0]["content"])


def ask(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def flaky(every: int, reply: Reply) -> Behaviour:
    """Return a behaviour that fails `every` − 1 times for each text before it answers."""
    tries: Counter[str] = Counter()
    lock = threading.Lock()

    def behave(body: dict[str, Any]) -> Reply:
        with lock:
            tries[body["messages"][0]["content"]] += 1
            count = tries[body["messages"][0]["content"]]
        return echo(body) if count % every == 0 else reply

    return behave


# ---- the client ----------------------------------------------------------------------------------


def test_every_request_is_answered_once_and_numbered(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    results = list(client(server, concurrency=7).complete_all([ask(str(i)) for i in range(50)]))
    assert sorted(i for i, _ in results) == list(range(50))
    assert all(isinstance(c, Completion) and c.text == str(i) and c.finished for i, c in results)
    assert len(server.asked) == 50
    assert {body["model"] for body in server.asked} == {"judge"}


def test_requests_are_concurrent_and_no_more_than_allowed(serve: Callable[..., Server]) -> None:
    together = threading.Barrier(3, timeout=20)  # breaks if fewer than 3 wait at once
    running, most, lock = [0], [0], threading.Lock()

    def behave(body: dict[str, Any]) -> Reply:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait()
        with lock:
            running[0] -= 1
        return echo(body)

    assert len(list(client(serve(behave), concurrency=3).complete_all([ask("x")] * 12))) == 12
    assert most[0] == 3


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 520, 529])
def test_passing_failures_are_tried_again_after_pauses_that_double(
    serve: Callable[..., Server], status: int
) -> None:
    time = Time()
    server = serve(flaky(4, (status, {"error": "busy"})))
    with_retries = client(server, time=time)
    assert with_retries.complete(ask("hello")).text == "hello"
    assert time.slept == [1.0, 2.0, 4.0]
    assert len(server.asked) == 4
    assert server.health_checks == 3  # before each new try
    assert (with_retries.usage.requests, with_retries.usage.retries) == (1, 3)


@pytest.mark.parametrize("others", [True, False])
def test_a_busy_server_is_tried_again_while_it_answers_others(
    serve: Callable[..., Server], others: bool
) -> None:
    tries = 0

    def behave(body: dict[str, Any]) -> Reply:
        nonlocal tries
        if body["messages"][0]["content"] == "other":
            return echo(body)
        tries += 1
        if tries == 6:
            return echo(body)
        if others:
            asking.complete(ask("other"))
        return 429, {}

    asking = client(serve(behave), attempts=3)
    if others:
        assert asking.complete(ask("late")).text == "late"
    else:
        with pytest.raises(InputError, match="no answer after 3 tries"):
            asking.complete(ask("late"))


def test_a_server_may_name_the_pause(serve: Callable[..., Server]) -> None:
    time = Time()
    server = serve(flaky(2, (429, {})))
    server.headers["Retry-After"] = "17"
    assert client(server, time=time).complete(ask("x")).text == "x"
    assert time.slept == [17.0]


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"null"],
)
def test_a_broken_answer_is_tried_again(serve: Callable[..., Server], broken: bytes) -> None:
    assert client(serve(flaky(2, (200, broken)))).complete(ask("x")).text == "x"


@pytest.mark.parametrize("count", ["1e999", "-1e999", "9" * 400, '"many"'])
def test_an_impossible_number_of_tokens(serve: Callable[..., Server], count: str) -> None:
    answer = '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": ' + count + "}}"
    with pytest.raises(RequestRefusedError, match="twice: the answer is not a chat completion"):
        client(serve(lambda body: (200, answer.encode())), price=(1.0, 1.0)).complete(ask("x"))


def test_half_a_surrogate_pair_is_replaced(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: said("half \ud83d, whole \U0001f600"), ["judge \udcff"])
    asking = EndpointClient.of(server.url, EndpointOptions())
    assert asking.model == "judge ?"
    assert asking.complete(ask("x")).text == "half ?, whole \U0001f600"


def test_it_gives_up_after_the_given_tries_and_reports_the_last_error(serve: Callable[..., Server]) -> None:
    time = Time()
    server = serve(lambda body: (503, {"error": "no room"}))
    with pytest.raises(InputError, match=r"no answer after 5 tries.*503.*no room"):
        list(client(server, time=time, attempts=5).complete_all([ask("x")]))
    assert len(server.asked) == 5
    assert time.slept == [1, 2, 4, 8]


def test_a_long_answer_may_take_longer_than_a_lookup(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[tuple[str, float]] = []

    def exchange_and_note(url: str, path: str, data: bytes | None, timeout: float, key_variable: str) -> Any:
        timeouts.append((path, timeout))
        return exchange(url, path, data, timeout, key_variable)

    monkeypatch.setattr(client_module, "exchange", exchange_and_note)
    server = serve(flaky(2, (503, {})))
    patient = EndpointClient([server.url], "m", EndpointOptions(), sleep=Time().sleep)
    patient.complete({**ask("x"), "max_tokens": 4000})
    assert [path for path, _ in timeouts] == ["/chat/completions", "/models", "/chat/completions"]
    assert {timeout for path, timeout in timeouts if path == "/models"} == {30}
    assert min(timeout for path, timeout in timeouts if path != "/models") > 4000


def test_no_server_listens(serve: Callable[..., Server]) -> None:
    gone = serve(echo)
    gone.stop()
    with pytest.raises(InputError, match="no answer after 2 tries"):
        client(gone, attempts=2).complete(ask("x"))
    gone._http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # for the fixture to stop
    gone._thread = threading.Thread(target=gone._http.serve_forever, args=(0.01,))
    gone._thread.start()


def test_another_server_takes_over_and_no_row_is_lost_or_doubled(serve: Callable[..., Server]) -> None:
    good = serve(echo)
    lock, left = threading.Lock(), [10]

    def die_after_10(body: dict[str, Any]) -> Reply:
        with lock:
            left[0] -= 1
            return echo(body) if left[0] >= 0 else (503, {"error": "dying"})

    bad = serve(die_after_10)
    time = Time()
    both = client(bad, good, time=time, concurrency=4)
    results = list(both.complete_all([ask(str(i)) for i in range(60)]))
    assert sorted(i for i, _ in results) == list(range(60))
    assert all(isinstance(c, Completion) and c.text == str(i) for i, c in results)
    assert both.usage.requests == 60
    assert time.slept == []  # the other server was always available
    assert len(good.asked) >= 50
    assert len(bad.asked) <= 10 + 4  # left out after its first failures


def test_a_server_that_is_back_must_pass_a_health_check(serve: Callable[..., Server]) -> None:
    server = serve(flaky(2, (503, {})))
    server.healthy = False
    time = Time()

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        server.healthy = len(time.slept) >= 3

    patient = EndpointClient([server.url], "judge", EndpointOptions(), clock=time.clock, sleep=sleep)
    assert patient.complete(ask("x")).text == "x"
    assert server.health_checks == 3
    assert len(server.asked) == 2  # it got no completion request while it was not healthy


def test_simultaneous_failures_count_as_one(serve: Callable[..., Server]) -> None:
    time = Time()
    together = threading.Barrier(4, timeout=20)
    failed: set[str] = set()

    def behave(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if text in failed:
            return echo(body)
        failed.add(text)
        together.wait()
        time.now += 0.001  # so that the failed requests had begun before
        return 503, {}

    list(client(serve(behave), time=time, concurrency=4).complete_all([ask(str(i)) for i in range(4)]))
    assert max(time.slept) <= 2.0  # four failures in a row would mean 8 seconds


def test_the_rate_limit_spaces_requests(serve: Callable[..., Server]) -> None:
    time = Time()
    limited = client(serve(echo), time=time, per_minute=30, concurrency=1)
    list(limited.complete_all([ask(str(i)) for i in range(5)]))
    assert time.now == pytest.approx(4 * 2.0)


@pytest.mark.parametrize("status", [400, 413, 422, 501])
def test_a_refused_request_costs_only_its_row(serve: Callable[..., Server], status: int) -> None:
    def behave(body: dict[str, Any]) -> Reply:
        return (status, {"error": "too long"}) if "3" in body["messages"][0]["content"] else echo(body)

    results = dict(client(serve(behave)).complete_all([ask(str(i)) for i in range(6)]))
    assert [i for i, c in results.items() if isinstance(c, RequestRefusedError)] == [3]
    assert "too long" in str(results[3])


@pytest.mark.parametrize(
    ("reply", "message", "tries"),
    [
        ((500, {"error": "boom"}), "boom", 2),
        ((200, {"error": {"code": 400, "message": "boom"}}), "boom", 2),
        ((200, {"choices": []}), "not a chat completion", 2),
        ((200, b"<p>boom</p>"), "not JSON", 2),
        ((403, {"error": "boom"}), "boom", 1),  # moderation: the key was good for others
        ((400, {"error": "boom"}), "boom", 1),
    ],
)
def test_a_request_that_the_server_fails_on_costs_only_its_row(
    serve: Callable[..., Server], reply: Reply, message: str, tries: int
) -> None:
    # Two in a row, so that no success in between shows that the server still works.
    server = serve(lambda body: reply if body["messages"][0]["content"] in "34" else echo(body))
    results = dict(client(server, concurrency=1).complete_all([ask(str(i)) for i in range(6)]))
    refusals = {i: str(c) for i, c in results.items() if isinstance(c, RequestRefusedError)}
    assert list(refusals) == [3, 4]
    assert all(message in refusal for refusal in refusals.values())
    assert len(server.asked) == 4 + 2 * (tries + 1)  # and the last answered request once more


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, {"error": "boom"}), r"no answer after 8 tries.*boom"),
        ((200, {"error": "boom"}), r"no answer after 8 tries.*boom"),
        ((530, {"error": "boom"}), r"no answer after 8 tries.*boom"),
        ((402, {"error": "boom"}), r"boom.*Add credit"),
        ((403, {"error": "boom"}), KEY_VARIABLE),
        ((400, {"error": "boom"}), r"boom.*answered before.*run the same command again"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_fails_on_everything_ends_the_run_and_refuses_no_row(
    serve: Callable[..., Server], reply: Reply, message: str, concurrency: int
) -> None:
    lock, left = threading.Lock(), [10]

    def behave(body: dict[str, Any]) -> Reply:
        with lock:
            left[0] -= 1
            return echo(body) if left[0] >= 0 else reply

    asking = client(serve(behave), concurrency=concurrency)
    results: list[object] = []
    with pytest.raises(InputError, match=message) as error:
        results.extend(completion for _, completion in asking.complete_all([ask("x")] * 30))
    assert not isinstance(error.value, RequestRefusedError)
    assert all(isinstance(completion, Completion) for completion in results)
    assert len(results) > 10 - concurrency  # requests that were running at the end are lost


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, KEY_VARIABLE), (402, "Add credit"), (403, KEY_VARIABLE), (404, "after #")],
)
def test_a_wrong_key_or_address_ends_the_run_at_once(
    serve: Callable[..., Server], status: int, message: str
) -> None:
    server = serve(lambda body: (status, {"error": "no"}))
    with pytest.raises(InputError, match=message):
        list(client(server, concurrency=1).complete_all([ask(str(i)) for i in range(20)]))
    assert len(server.asked) <= 2  # one more may be running when the first one fails


def test_a_server_that_does_not_list_its_models_is_used_again(serve: Callable[..., Server]) -> None:
    server = serve(flaky(2, (503, {})))
    server.tells_models = False
    assert client(server).complete(ask("x")).text == "x"
    assert server.health_checks == 1


def test_a_redirect_is_not_followed_with_the_key(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    other = serve(echo)
    server = serve(lambda body: (307, {}))
    server.headers["Location"] = other.url + "/chat/completions"
    with pytest.raises(InputError, match="307"):
        client(server).complete(ask("x"))
    assert other.asked == []
    assert other.health_checks == 0


def test_requests_are_created_as_they_are_needed(serve: Callable[..., Server]) -> None:
    created: list[int] = []

    def bodies() -> Iterator[dict[str, Any]]:
        for i in range(200):
            created.append(i)
            yield ask(str(i))

    for done, _ in enumerate(client(serve(echo), concurrency=2).complete_all(bodies())):
        assert len(created) <= done + 1 + 2 * 2  # twice the concurrent requests
    assert len(created) == 200


def test_leaving_early_sends_no_more_requests(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    for i, _ in client(server, concurrency=2).complete_all([ask(str(i)) for i in range(500)]):
        assert i >= 0
        break
    assert len(server.asked) < 100


def test_leaving_early_sends_no_request_that_waits_for_the_rate_limit(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    limited = EndpointClient([server.url], "judge", EndpointOptions(concurrency=4, per_minute=1))
    results = limited.complete_all([ask(str(i)) for i in range(20)])
    assert isinstance(results, Generator)
    with contextlib.closing(results):
        next(results)
    assert len(server.asked) == 1  # the next request would start a minute later


def test_tokens_and_cost_are_counted(serve: Callable[..., Server]) -> None:
    counting = client(serve(flaky(2, (503, {}))), price=(2.0, 10.0))
    list(counting.complete_all([ask(str(i)) for i in range(4)]))
    usage = counting.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (4, 400, 28)
    assert usage.cost == pytest.approx((400 * 2 + 28 * 10) / 1e6)


def test_the_key_goes_to_the_server_and_nowhere_else(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(SERVER_KEY_VARIABLE, "of-the-server")
    caplog.set_level(logging.DEBUG)
    # A server that repeats the key in an answer and in an error.
    server = serve(lambda body: said(f"your key is {KEY}"))
    asking = client(server)
    judge = EndpointJudge(asking)
    completion = asking.complete(ask("x"))
    identity = judge.identity
    assert server.keys == {f"Bearer {KEY}"}
    server.behave = lambda body: (401, {"error": f"Incorrect API key provided: {KEY}"})
    with pytest.raises(InputError, match="does not accept the key") as error:
        asking.complete(ask("x"))
    server.behave = lambda body: echo(body) if body == server.asked[0] else (400, {"error": f"not {KEY}"})
    [(_, answer)] = asking.complete_all([ask("y")])
    assert isinstance(answer, RequestRefusedError)
    outputs = [completion, answer, asking.usage, error.value, repr(error.value.__context__), caplog.text]
    state = [repr(asking), repr(vars(asking)), repr(vars(judge)), judge.name, identity]
    assert all(KEY not in str(part) for part in outputs + state)


@pytest.mark.parametrize("before", [290 * "x", 1990 * " ", ((64 << 10) - 5) * " "])
def test_a_cut_error_contains_no_part_of_a_key(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(RequestRefusedError, match="HTTP 400") as error:
        client(serve(lambda body: (400, (before + KEY).encode()))).complete(ask("x"))
    assert KEY[:3] not in str(error.value)


def test_without_a_key_none_is_sent(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    client(server).complete(ask("x"))
    assert server.keys == {None}


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_not_in_the_error(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match=KEY_VARIABLE) as error:
        client(serve(echo)).complete(ask("x"))
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/v1", "not the address of a server"),
        ("http://", "not the address of a server"),
        ("http://[::1/v1", "not the address of a server"),
        ("http://a..b/v1", "not the address of a server"),
        ("http://host:99999/v1", "not the address of a server"),
        ("http://host/my path/v1", "not the address of a server"),
        ("http://my host/v1", "not the address of a server"),
        ("http://host/a\tb", "not the address of a server"),
        ("http://me:se/cret@host/v1?key=secret", "'host/v1' is not the address of a server"),
        ("http://me:secret@host/v1", "password"),
        ("http://host/v1?key=secret", "query"),
    ],
)
def test_invalid_addresses(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        EndpointClient.of(address + "#m", EndpointOptions())
    assert "secret" not in str(error.value)


def test_the_only_model_need_not_be_named(serve: Callable[..., Server]) -> None:
    server = serve(echo, ["only-one"])
    assert EndpointClient.of(server.url + "/", EndpointOptions()).model == "only-one"
    assert EndpointClient.of(server.url + "#other", EndpointOptions()).model == "other"
    gone = serve(echo)
    gone.healthy = False  # another server then gives the model
    assert EndpointClient.of(f"{gone.url},{server.url}", EndpointOptions()).model == "only-one"
    server.models = ["one", "two"]
    with pytest.raises(InputError, match="one, two"):
        EndpointClient.of(server.url, EndpointOptions())


# ---- the judge -----------------------------------------------------------------------------------


def labelling(body: dict[str, Any]) -> Reply:
    """Answer with log-probabilities; the number in the reply is the log-odds of a refusal."""
    assert body["top_logprobs"] == 20
    text = body["messages"][0]["content"]
    more = float(text.rsplit("level ", 1)[1].split()[0]) if "level " in text else -2.0
    p = 1 / (1 + math.exp(-more))
    top = {
        "Ref": math.log(0.6 * p),
        " refusal": math.log(0.3 * p),
        "answer": math.log(0.9 * (1 - p)),
        "The": -3.0,
    }
    return said("Ref", [entry("Ref", top["Ref"], top)])


PAIRS: list[tuple[str, str | None]] = [("q", f"level {k} x") for k in (-3, 0.1, 2)]


def test_label_log_probabilities_give_two_p_minus_one_in_one_request_each(
    serve: Callable[..., Server],
) -> None:
    server = serve(labelling)
    judge = EndpointJudge(client(server))
    judgements = dict(judge.judge([*PAIRS, ("q", " \n"), ("q", None)]))
    for i, more in enumerate((-3, 0.1, 2)):
        assert judgements[i].confidence == pytest.approx(math.tanh(more / 2))
        assert "label" in judgements[i].mode
    assert judgements[3].mode == "rule: empty answer"
    assert judgements[4].confidence is None
    assert len(server.asked) == 3 + 1  # one example shows the server's abilities
    dict(judge.judge(PAIRS))
    assert len(server.asked) == 7  # the example is not repeated


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"refusal": math.log(0.5), "answer": math.log(0.25)}, 1 / 3),
        ({" Refusal": math.log(0.9)}, 1.0),
        ({"ANS": math.log(0.2), "ref": math.log(0.2)}, 0.0),
        ({"a": math.log(0.9), "r": math.log(0.05)}, None),  # single letters may begin other words
        ({"<think>": math.log(0.99), "answer": math.log(0.005)}, None),
        ({}, None),
    ],
)
def test_label_confidence(top: dict[str, float], expected: float | None) -> None:
    confidence = label_confidence([Token("x", -1.0, tuple(top.items()))])
    assert confidence == (None if expected is None else pytest.approx(expected))
    assert label_confidence(None) is None


def thinking(body: dict[str, Any], ends_with: str = "") -> Reply:
    """Answer as a model that thinks first: votes and their probabilities depend on the seed."""
    if body["max_tokens"] == 1:
        return said("<think>", [entry("<think>", -0.01, {"<think>": -0.01, "Okay": -5.0})], finish="length")
    seed = body["seed"]
    if "broken" in body["messages"][0]["content"] and seed == 2:
        return said("Hm.</think>\nVerdict: answer", None, finish="length")  # truncated
    verdict = ["Verdict: refusal, official_line", "Verdict: answer"][seed % 2]
    words = ["<think>", "Hm,", " Verdict: answer", "</think>", "\n\n", *[w + " " for w in verdict.split()]]
    own = [-9.0, -9.0, -9.0, -9.0, -9.0] + [-0.1 * (seed + 1) - 0.01 * k for k in range(len(verdict.split()))]
    tokens = [entry(w, p) for w, p in zip(words, own, strict=True)]
    return said("".join(words), [*tokens, entry(ends_with, -9.0)] if ends_with else tokens)


@pytest.mark.parametrize("ends_with", ["", "<|im_end|>"])
def test_a_judge_that_thinks_first_votes(serve: Callable[..., Server], ends_with: str) -> None:
    server = serve(lambda body: thinking(body, ends_with))
    judgements = dict(EndpointJudge(client(server)).judge([("q", "text"), ("q", "broken text")]))
    scores = []
    for seed in range(5):
        count = 3 if seed % 2 == 0 else 2
        scores.append(sum(-0.1 * (seed + 1) - 0.01 * k for k in range(count)) / count)
    expected = vote_confidence([seed % 2 == 0 for seed in range(5)], scores)
    assert judgements[0].confidence == pytest.approx(expected)
    assert judgements[0].mode == "5 of 5 votes, weighted by log-probability"
    assert judgements[0].category == "official_line"
    assert judgements[1].mode == "4 of 5 votes, weighted by log-probability"
    valid = [0, 1, 3, 4]
    assert judgements[1].confidence == pytest.approx(
        vote_confidence([seed % 2 == 0 for seed in valid], [scores[seed] for seed in valid])
    )
    assert {body["temperature"] for body in server.asked if body["max_tokens"] > 1} == {0.6}


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        ("Hm. Perhaps\nVerdict: refusal\n</think>", None),  # the answer ended before a verdict
        ("Hm.\nVerdict: refusal\n</think>Verdict: answer", -1.0),
        (
            "[THINK]a </think> b[/THINK]Verdict: answer",
            -1.0,
        ),  # the trace contains another end mark
        ("<think>Hm.\nVerdict: answer", None),
    ],
)
def test_a_verdict_within_the_trace_does_not_count(
    serve: Callable[..., Server], text: str, confidence: float | None
) -> None:
    def behave(body: dict[str, Any]) -> Reply:
        example = "Budapest" in body["messages"][0]["content"]
        return said("Verdict: answer" if example else text)

    judgements = dict(EndpointJudge(client(serve(behave))).judge([("q", "text")]))
    assert judgements[0].confidence == confidence


@pytest.mark.parametrize("refusal", [400, 500])
def test_a_server_without_log_probabilities_and_top_k(serve: Callable[..., Server], refusal: int) -> None:
    def behave(body: dict[str, Any]) -> Reply:
        if "logprobs" in body or "top_k" in body:
            return refusal, {"error": "unrecognized argument"}
        return said("**Verdict:** refusal (direct)." if body["seed"] < 4 else "Verdict: answer")

    judgements = dict(EndpointJudge(client(serve(behave))).judge([("q", "text")]))
    assert judgements[0].confidence == pytest.approx(3 / 5)
    assert (judgements[0].mode, judgements[0].category) == ("5 of 5 votes, unweighted", "direct")


def test_a_server_that_cannot_judge_is_an_error_before_any_row(serve: Callable[..., Server]) -> None:
    with pytest.raises(InputError, match="cannot judge an example"):
        list(EndpointJudge(client(serve(lambda body: said("I like turtles.")))).judge(PAIRS))


def test_a_row_that_the_server_refuses_is_excluded(serve: Callable[..., Server]) -> None:
    def behave(body: dict[str, Any]) -> Reply:
        return (400, {"error": "content filter"}) if "bomb" in str(body["messages"]) else labelling(body)

    judgements = dict(EndpointJudge(client(serve(behave))).judge([("q", "a bomb"), *PAIRS]))
    assert (judgements[0].confidence, judgements[0].verdict) == (None, "unclear")
    assert "content filter" in judgements[0].mode
    assert all(judgements[i].confidence is not None for i in (1, 2, 3))


def test_impossible_log_probabilities_give_a_finite_confidence(
    serve: Callable[..., Server],
) -> None:
    def behave(body: dict[str, Any]) -> Reply:
        likeliest = {"answer": 1000.0, "refusal": -1.7e308}
        return said("answer", [entry("answer", 1000.0, likeliest)])

    assert dict(EndpointJudge(client(serve(behave))).judge(PAIRS))[0].confidence == -1.0

    def vote(body: dict[str, Any]) -> Reply:
        if body["max_tokens"] == 1:
            return said("Well")
        return said("Verdict: answer", [entry("Verdict:", -1.7e308), entry(" answer", -1.7e308)])

    assert dict(EndpointJudge(client(serve(vote))).judge(PAIRS))[0].confidence == -1.0


def test_a_server_with_another_model_is_another_judge(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    server.models = ["one", "two"]
    by_name = EndpointJudge(client(server)).identity
    server.healthy = False
    assert EndpointJudge(client(server)).identity == by_name
    server.healthy, server.models = True, ["a.gguf"]
    identities = [by_name]
    for meta in ({}, {"n_params": 10, "size": 5}, {"n_params": 10, "size": 6}):
        server.meta = meta
        identities.append(EndpointJudge(client(server)).identity)
    server.models = ["b.gguf"]
    identities.append(EndpointJudge(client(server)).identity)
    assert len(set(identities)) == 5
    assert EndpointJudge(client(server)).identity == identities[-1]
