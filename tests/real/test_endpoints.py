"""Two real llama-servers share the work, and one of them is killed in the middle of it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures import tiny_thinker
from fixtures.binaries import Server
from fixtures.endpoints import without_proxy_or_key
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3

from rs_gguf.engines.answers import answer_all
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.server.client import EndpointClient, EndpointOptions
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.judges.endpoint import EndpointJudge
from rs_gguf.judges.rubric import label_message
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.run import run
from rs_gguf.pipeline.sections import Answers, Prompts
from rs_gguf.pipeline.stage import Progress, Silent
from rs_gguf.records.conversation import KINDS, Answer, Prompt, Trace
from rs_gguf.records.rows import Row

pytestmark = pytest.mark.real

TEMPLATE = THINKING_TEMPLATE.replace("<think>\n", "")
PROMPTS = [Prompt(f"What is {k} and {k * k}?", "benign") for k in range(48)]
# A judge of sorts: it likes to say one of the two labels, which one depends on what it reads. The rubric, the
# same for all, is one token of its vocabulary, so that this takes no time.
RUBRIC = label_message("", "").partition("Request: ")[0]
WORDS = {RUBRIC: -99.0, "refusal": 7.0, "answer": 7.0}
OPTIONS = [*("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"), *("--threads", "1")]


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    without_proxy_or_key(monkeypatch)
    model = tmp_path / "tiny.gguf"
    letters = dict.fromkeys("etaoinshrdlu", 3.0)
    write_tiny_qwen3(model, TEMPLATE, liked=WORDS | letters, shift=4.0, n_ctx=1024, seed=5)
    options = ["--model", str(model), "--ctx-size", "4096", "--parallel", "4", *OPTIONS]
    with ExitStack() as stack:
        yield [stack.enter_context(Server(tmp_path / f"log{k}", *options)) for k in range(2)]


def kill(server: Server) -> None:
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()


def address(*servers: Server) -> str:
    return ",".join(f"http://{server.address}" for server in servers)


def answers(
    model: LlamaServer, done: list[int], kill_after: int = 0, victim: Server | None = None
) -> list[str]:
    def advance(count: int) -> None:
        done.append(count)
        if victim is not None and len(done) == kill_after:
            kill(victim)

    found, tokens, _ = model.answers(PROMPTS, 0.0, Asking(None, 24), advance)
    assert tokens > 0
    return [answer.text for answer in found]


def test_answers_go_on_at_the_other_server(servers: list[Server]) -> None:
    survivor, victim = servers
    expected = answers(LlamaServer(address(survivor), []), [])
    assert len(set(expected)) > 10  # so that a row in another one's place would be seen
    both = LlamaServer(address(victim, survivor), [])
    done: list[int] = []
    assert answers(both, done, kill_after=8, victim=victim) == expected
    assert done == [1] * len(PROMPTS)
    assert victim._process.poll() == -signal.SIGKILL
    usage = both._client.usage
    assert usage.requests == len(PROMPTS)
    assert usage.retries > 0  # requests were under way at the one that was killed
    # Who begins when it is gone is told which model there is by the other.
    assert answers(LlamaServer(address(victim, survivor), []), []) == expected


def test_traces_are_those_that_local_engines_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxy_or_key(monkeypatch)
    path = tmp_path / "thinker.gguf"
    tiny_thinker.write_tiny_thinker(path)
    asked = [prompt for kind in KINDS for prompt in tiny_thinker.prompts(kind)[::6]]
    asking = Asking(None, 60)  # so long that a loop shows in the text alone
    with LlamaModel(path, n_ctx=1024, n_threads=1) as model:
        local, _ = answer_all(model, asked, NO_STEERING, asking)
    options = ["--model", str(path), "--ctx-size", "2048", "--parallel", "4", "--jinja", *OPTIONS]
    with Server(tmp_path / "log", *options) as server:
        served, _, _ = LlamaServer(address(server), []).answers(asked, 0.0, asking, lambda n: None)
    assert sum(answer.trace is not None for answer in local) > 0.9 * len(asked)
    assert sum(answer.never_came for answer in local) > 0

    def what(answer: Answer) -> tuple[str, bool, Trace | None]:
        return answer.text, answer.never_came, answer.trace and replace(answer.trace, tokens=None)

    assert [what(answer) for answer in served] == [what(answer) for answer in local]


class KillingProgress(Silent):
    """Kills a server once so many answers have come."""

    def __init__(self, victim: Server, after: int) -> None:
        self.victim, self.left = victim, after

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            if 0 < self.left <= count:
                kill(self.victim)
            self.left -= count

        yield advance


def test_the_answers_of_a_run_go_on_at_the_other_server(servers: list[Server], tmp_path: Path) -> None:
    survivor, victim = servers
    model = str(tmp_path / "tiny.gguf")

    def answer_stage(out: Path, progress: Progress, *asked: Server) -> list[Row]:
        sizes = Prompts(fit=12, gate_only=0, tune=4, validation=4)
        recipe = Recipe(model=model, prompts=sizes, answers=Answers(servers=address(*asked), check=False))
        run(recipe, out, progress=progress, until="answer")
        return RunFolder(out).read_rows("answers.jsonl")

    expected = answer_stage(tmp_path / "one", Silent(), survivor)
    assert len({row["answer"] for row in expected}) > 10
    found = answer_stage(tmp_path / "both", KillingProgress(victim, after=8), victim, survivor)
    assert victim._process.poll() == -signal.SIGKILL
    assert found == expected  # each row once, in its order
    with contextlib.closing(LlamaModel(Path(model))) as loaded:
        for row in found:
            assert loaded.detokenize(row["tokens"]) == row["answer"]


def test_judgements_go_on_at_the_other_server(servers: list[Server]) -> None:
    survivor, victim = servers
    pairs = [(p.prompt, f"It is number {k}.") for k, p in enumerate(PROMPTS)]

    def judge(*asked: Server) -> EndpointJudge:
        urls = [f"http://{server.address}/v1" for server in asked]
        return EndpointJudge(EndpointClient(urls, None, EndpointOptions()))

    expected = dict(judge(survivor).judge(pairs))
    both, found = judge(victim, survivor), {}
    for i, judgement in both.judge(pairs):
        assert i not in found
        found[i] = judgement
        if len(found) == 8:
            kill(victim)
    assert both.usage.retries > 0
    assert sorted(found) == list(range(len(pairs)))
    for i, judgement in found.items():
        # Sums in F32, in another order where other requests share the batch.
        assert judgement.confidence == pytest.approx(expected[i].confidence, abs=5e-4)
    assert len({round(j.confidence or 0.0, 3) for j in found.values()}) > 10
