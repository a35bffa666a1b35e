"""The page of `rs-export try` in a real browser: answers stream, markup stays text, nothing leaves."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from fixtures import browser
from playwright.sync_api import Browser, Page, expect

from rs_gguf.errors import InputError
from rs_gguf.playground.session import Answers, GateReading, side_by_side
from rs_gguf.records.conversation import Prompt

expect.set_options(timeout=60_000)  # a busy machine loads the page slowly

# Gradio and its requirements warn of each other's changes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> ${document.title='taken'} {{value}} </textarea>"


class Echo:
    """A session whose steered answer repeats the prompt. `hold` delays the end of an answer."""

    name = f"model {HOSTILE}"

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.hold.set()
        self.factors: list[float] = []
        self.closed = 0

    def answers(self, prompt: str, factor: float) -> Answers:
        if prompt == "fail":
            raise InputError(f"cannot answer {HOSTILE}")
        self.factors.append(factor)
        try:
            yield from side_by_side(iter(["No", "No."]), iter([f"Yes: {prompt}"]))
            if not self.hold.wait(60):
                raise AssertionError("nobody let the answer end")
            yield "No. (end)", f"Yes: {prompt} (end)"
        finally:
            self.closed += 1

    def gates(self, prompt: str, factor: float) -> GateReading | None:
        return GateReading([("<b>", 0.1), (prompt, 0.9)], {3: 0.5, 4: 1.5}) if prompt != "plain" else None


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def session() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def address(session: Echo) -> Iterator[str]:
    from rs_gguf.playground.page import build, launch

    page = build(session, [Prompt("plain", "benign"), Prompt(HOSTILE, "sensitive")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "")
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy that does not answer must not matter
        started = launch(page, None)
    yield started
    page.close()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    faults: list[str] = []
    context = chromium.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else faults.append(asked.url))  # fmt: skip  # noqa: E501
    page.goto(address)
    yield page
    assert page.title() == "rs-export try"  # no markup was run
    context.close()
    assert faults == []


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_label("Steered", exact=True)).to_have_value(f"Yes: {HOSTILE} (end)")
    expect(page.get_by_label("Unsteered")).to_have_value("No. (end)")
    expect(page.get_by_text(HOSTILE, exact=True)).to_have_attribute("title", "0.90")
    expect(page.get_by_text("<b>", exact=True)).to_have_attribute("title", "0.10")
    expect(page.get_by_role("img", name="Gate activation: layer 3 0.50, layer 4 1.50")).to_be_visible()
    expect(page.get_by_text(f"model {HOSTILE}", exact=True)).to_be_visible()
    assert page.locator("img").count() == 0


def test_a_prompt_can_be_chosen_and_the_scale_set(page: Page, session: Echo) -> None:
    page.get_by_label("Prompts").click()
    page.get_by_role("option", name="benign: plain").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("plain")
    page.get_by_role("spinbutton").fill("0.25")
    page.get_by_role("spinbutton").press("Tab")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_label("Steered", exact=True)).to_have_value("Yes: plain (end)")
    expect(page.get_by_text("No gate activations")).to_be_visible()
    assert session.factors[-1] == 0.25


def test_an_answer_streams_and_can_be_stopped(page: Page, session: Echo) -> None:
    session.hold.clear()
    page.get_by_label("Prompt", exact=True).fill("first")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_label("Steered", exact=True)).to_have_value("Yes: first")  # before its end
    page.get_by_role("button", name="Stop").click()
    session.hold.set()
    page.get_by_label("Prompt", exact=True).fill("second")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_label("Steered", exact=True)).to_have_value("Yes: second (end)")


def test_a_new_question_ends_the_answers_under_way(page: Page, session: Echo) -> None:
    session.hold.clear()
    for prompt in ("first", "second"):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Answer").click()
        if prompt == "first":
            expect(page.get_by_label("Steered", exact=True)).to_have_value("Yes: first")
    session.hold.set()
    expect(page.get_by_label("Steered", exact=True)).to_have_value("Yes: second (end)")


def test_an_error_is_shown_as_text(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("fail")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_text(f"cannot answer {HOSTILE}")).to_be_visible()
    assert page.locator("img").count() == 0


def test_only_this_machine_is_served(address: str) -> None:
    from rs_gguf.playground.page import build, launch

    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rpartition(":")[2])
    own = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
    for host in own - {"127.0.0.1"}:
        if not str(host).startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((str(host), port), timeout=5)
    # A page elsewhere cannot reach it under a host name of its own.
    foreign = httpx.get(address, headers={"Host": "elsewhere.example"}, trust_env=False)
    assert foreign.status_code == 400
    ours = httpx.get(address, trust_env=False)
    assert "default-src 'self'" in ours.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in ours.headers["content-security-policy"]
    with pytest.raises(InputError, match=f"cannot serve on port {port}"):
        launch(build(Echo(), []), port)


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://127.0.0.1:1"])
def test_other_sites_can_neither_ask_nor_store_files(address: str, session: Echo, origin: str) -> None:
    asked = len(session.factors)
    with httpx.Client(base_url=address, headers={"Origin": origin}, trust_env=False) as client:
        # A browser sends the first of these from any site, without asking this server before.
        stored = client.post("gradio_api/upload", files={"files": ("x.txt", b"x")})
        answer = client.post("gradio_api/queue/join", json={"data": ["hi", 1], "fn_index": 1})
    assert (stored.status_code, answer.status_code) == (403, 403)
    assert len(session.factors) == asked
