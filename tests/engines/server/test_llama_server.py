"""Several llama-servers as one model: all get requests with the scales, and they must be alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.endpoints import Reply, Server, said, without_proxy_or_key
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3

from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.server import llama_server as server_module
from rs_gguf.engines.server.exchange import KEY_VARIABLE, SERVER_KEY_VARIABLE
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.errors import InputError
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Answers
from rs_gguf.pipeline.stages import answers as answering
from rs_gguf.prompts import contexts
from rs_gguf.records.conversation import Answer, Prompt, Trace

PROMPTS = [Prompt(str(k), "benign") for k in range(40)]
SHORT = Asking(None, 5)
LOOP = ("So I wait and see. " * 200).strip()
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


def give_template(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """Let every server give this chat template."""
    plain: Callable[..., Any] = vars(server_module)["exchange"]

    def exchange(root: str, path: str, *arguments: Any) -> Any:
        return {"chat_template": template} if path == "/props" else plain(root, path, *arguments)

    monkeypatch.setattr(server_module, "exchange", exchange)


def test_all_servers_answer_in_the_order_of_the_prompts(servers: list[Server]) -> None:
    address = ", ".join(server.url.removesuffix("/v1") for server in servers) + "/#m"
    steps: list[int] = []
    model = LlamaServer(address, [(Path("a.gguf"), 0.5)])
    answers, tokens, _ = model.answers(PROMPTS, 2.0, SHORT, steps.append)
    assert [answer.text for answer in answers] == [f"It is {p.prompt}" for p in PROMPTS]
    assert steps == [1] * 40
    assert tokens == 40 * 7
    bodies = [body for server in servers for body in server.asked]
    assert sorted(int(body["messages"][0]["content"]) for body in bodies) == list(range(40))
    assert min(len(server.asked) for server in servers) > 0
    assert all(body["lora"] == [{"id": 0, "scale": 0.75}, {"id": 1, "scale": 1.0}] for body in bodies)


@pytest.mark.parametrize(
    ("switch", "sent"),
    [
        ("{% if enable_thinking %}<think>{% endif %}", {"enable_thinking": False}),
        ("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}", None),
        ("", None),
        ("{% if %}", None),
    ],
    ids=["undefined means off", "undefined means on", "no switch", "no template"],
)
def test_thinking_is_switched_off_as_in_local_engines(
    servers: list[Server], switch: str, sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_template(monkeypatch, "{{ messages[0].content }}" + switch)
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])
    list(model.answer(PROMPTS[:1], 2.0, SHORT))
    assert servers[0].asked[0].get("chat_template_kwargs") == sent
    assert servers[0].asked[0]["lora"][1] == {"id": 1, "scale": 1.0}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("trace", "text", "finish", "expected"),
    [
        (
            "A river? Yes.",
            "The Danube.",
            "stop",
            Answer([], "The Danube.", True, False, Trace("A river? Yes.", None, True, False)),
        ),
        ("A river? Y", "", "length", Answer([], "", False, False, Trace("A river? Y", None, False, False))),
        (LOOP, "", "length", Answer([], "", False, True, Trace(LOOP, None, False, True))),
        (LOOP, "Buda", "length", Answer([], "Buda", False, False, Trace(LOOP, None, True, True))),
        ("", "", "length", Answer([], "", False, False)),
        ("", "", "stop", Answer([], "", True, True)),
    ],
    ids=["answered", "cut", "loop", "loop, then an answer", "hidden", "empty"],
)
def test_the_trace_that_a_server_gives_apart_is_kept(
    servers: list[Server], name: str, trace: str, text: str, finish: str, expected: Answer
) -> None:
    servers[0].behave = lambda body: said(text, finish=finish, more={name: trace})
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])
    ((_, found),) = model.answer(PROMPTS[:1], 1.0, SHORT)
    assert found == expected
    assert Answer.from_row(found.to_row()) == expected


def test_the_trace_that_a_server_leaves_in_the_text_is_kept(servers: list[Server]) -> None:
    servers[0].behave = lambda body: said("<think>A river?</think>The Danube.")
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])
    ((_, found),) = model.answer(PROMPTS[:1], 1.0, SHORT)
    assert found == Answer([], "The Danube.", True, False, Trace("A river?", None, True, False))


@pytest.mark.parametrize(
    ("trace", "text", "finish", "expected"),
    [
        ("", "A river? Y", "length", Answer([], "", False, False, Trace("A river? Y", None, False, False))),
        ("", LOOP, "length", Answer([], "", False, True, Trace(LOOP, None, False, True))),
        ("", "A river?</think>Buda", "length",
         Answer([], "Buda", False, False, Trace("A river?", None, True, False))),
        ("A river?", "Buda", "length",
         Answer([], "Buda", False, False, Trace("A river?", None, True, False))),
        ("", "The Danube.", "stop", Answer([], "The Danube.", True, False)),
    ],
    ids=["cut", "loop", "answer cut", "apart", "no trace"],
)  # fmt: skip
def test_text_that_is_cut_off_within_a_trace_that_the_template_opens_is_a_trace(
    servers: list[Server],
    trace: str,
    text: str,
    finish: str,
    expected: Answer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_template(monkeypatch, "{{ messages[0].content }}<think>\n")
    servers[0].behave = lambda body: said(text, finish=finish, more={"reasoning_content": trace})
    ((_, found),) = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)]).answer(PROMPTS[:1], 1.0, SHORT)
    assert found == expected


def test_an_end_marker_in_an_answer_is_its_text(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Qwen closes its trace with </think> and answers."
    servers[0].behave = lambda body: said(text, more={"reasoning_content": "A marker?"})
    ((_, found),) = LlamaServer(servers[0].url, []).answer(PROMPTS[:1], 1.0, SHORT)
    assert found == Answer([], text, True, False, Trace("A marker?", None, True, False))
    # Without a trace apart, the template shows whether one may precede the answer.
    servers[0].behave = lambda body: said(text)
    give_template(monkeypatch, "{{ messages[0].content }}\n")
    ((_, found),) = LlamaServer(servers[0].url, []).answer(PROMPTS[:1], 1.0, SHORT)
    assert found == Answer([], text, True, False)


def test_a_server_samples_as_local_engines_do(servers: list[Server]) -> None:
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])
    list(model.answer(PROMPTS[:1], 1.0, SHORT))
    list(model.answer(PROMPTS[:1], 1.0, Asking(None, 5, Sampling(temperature=0.8, seed=3))))
    greedy, drawn = servers[0].asked
    assert greedy["temperature"] == 0
    assert not {"top_k", "samplers"} & greedy.keys()
    expected = {"temperature": 0.8, "seed": 3, "top_k": 20, "top_p": 0.95}
    assert {name: drawn[name] for name in expected} == expected
    assert drawn["samplers"] == ["top_k", "temperature", "top_p"]


def test_a_server_gets_the_messages_of_a_context(servers: list[Server]) -> None:
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5)])
    (role, second) = contexts.named(["role", "second-turn"])[::-1]
    list(model.answer(PROMPTS[:1], 1.0, Asking("Be brief.", 5).within(second)))
    list(model.answer(PROMPTS[:1], 1.0, Asking("Be brief.", 5).within(role)))
    asked = [body["messages"] for body in servers[0].asked]
    last = {"role": "user", "content": PROMPTS[0].prompt}
    assert [message["role"] for message in asked[0]] == ["system", "user", "assistant", "user"]
    assert asked[0][0]["content"] == "Be brief."
    assert asked[0][-1] == last
    assert asked[1] == [{"role": "system", "content": role.system}, last]


def test_scales_of_one_adapter_add_up(servers: list[Server]) -> None:
    model = LlamaServer(servers[0].url, [(Path("a.gguf"), 0.5), (Path("a.gguf"), 0.25)])
    list(model.answer(PROMPTS[:1], 2.0, SHORT))
    assert servers[0].asked[0]["lora"] == [{"id": 0, "scale": 0.75}, {"id": 1, "scale": 1.5}]


@pytest.mark.parametrize("file", ["a.gguf", "C:\\mine\\a.gguf", "mine/a.gguf"])
def test_an_adapter_is_found_by_its_name_in_any_folder(servers: list[Server], file: str) -> None:
    servers[0].adapters = [ADAPTERS[0], ADAPTERS[1] | {"path": "C:\\models\\a.gguf"}]
    model = LlamaServer(servers[0].url, [(Path(file), 0.5)])
    list(model.answer(PROMPTS[:1], 2.0, SHORT))
    assert servers[0].asked[0]["lora"] == [{"id": 0, "scale": 0.75}, {"id": 1, "scale": 1.0}]
    with pytest.raises(InputError, match=r"0 adapters named b\.gguf \(all: /m/style\.gguf, C:\\models"):
        LlamaServer(servers[0].url, [(Path("b.gguf"), 0.5)])


def test_folders_tell_adapters_of_one_name_apart(servers: list[Server]) -> None:
    paths = ["/m/one/a.gguf", "C:\\m\\two\\a.gguf", "/m/two/style.gguf"]
    servers[0].adapters = [{"id": i, "path": path, "scale": 0.0} for i, path in enumerate(paths)]
    model = LlamaServer(servers[0].url, [(Path("two/a.gguf"), 0.5), (Path("../one/a.gguf"), 0.25)])
    list(model.answer(PROMPTS[:1], 1.0, SHORT))
    assert [entry["scale"] for entry in servers[0].asked[0]["lora"]] == [0.25, 0.5, 0.0]
    with pytest.raises(InputError, match=r"2 adapters named a\.gguf"):
        LlamaServer(servers[0].url, [(Path("three/a.gguf"), 0.5)])


def test_another_file_of_the_same_name_is_an_error(servers: list[Server], tmp_path: Path) -> None:
    loaded, copy, other = files = [tmp_path / name / "a.gguf" for name in ("loaded", "copy", "other")]
    for file, content in zip(files, (b"1", b"1", b"2"), strict=True):
        file.parent.mkdir()
        file.write_bytes(content)
    servers[0].adapters = [{"id": 0, "path": str(loaded), "scale": 0.0}]
    LlamaServer(servers[0].url, [(loaded, 1.0), (copy, 1.0)])
    with pytest.raises(InputError, match=f"has loaded {loaded} for {other}.*another file"):
        LlamaServer(servers[0].url, [(other, 1.0)])
    servers[0].adapters = [{"id": 0, "path": "/of another machine/a.gguf", "scale": 0.0}]
    LlamaServer(servers[0].url, [(other, 1.0)])
    with pytest.raises(InputError, match=f"for {other}, but {copy} is another file"):
        LlamaServer(servers[0].url, [(copy, 1.0), (other, 1.0)])


def test_the_key_of_the_judge_is_not_sent(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of-the-judge")
    monkeypatch.setenv(SERVER_KEY_VARIABLE, "of-the-server")
    servers[0].adapters = [ADAPTERS[1]]
    model = LlamaServer(
        servers[0].url.removesuffix("/v1"), [(Path("a.gguf"), 0.5)]
    )  # requests the list of models
    model.expect_model({"n_vocab": 300})
    model.expect_unsteered()
    list(model.answer(PROMPTS[:1], 1.0, SHORT))
    assert servers[0].keys == {"Bearer of-the-server"}
    servers[0].behave = lambda body: (401, {"error": "no"})
    with pytest.raises(InputError, match=f"does not accept the key in {SERVER_KEY_VARIABLE}"):
        list(model.answer(PROMPTS[:1], 1.0, SHORT))
    with pytest.raises(InputError, match=f"Keys go into {SERVER_KEY_VARIABLE}"):
        LlamaServer("http://me:secret@host", [])


def test_a_server_with_another_model_is_an_error(servers: list[Server]) -> None:
    figures = {"n_vocab": 300, "n_params": 1000}
    model = LlamaServer(",".join(server.url for server in servers), [])
    model.expect_model(figures)  # the servers give no figures
    servers[0].meta = {**figures, "n_embd": 8}
    servers[1].tells_models = False
    model.expect_model(figures)
    servers[2].meta = {"n_vocab": 300, "n_params": 1001}
    with pytest.raises(InputError, match=f"{servers[2].url} has another model.*1001.*recipe.*1000"):
        model.expect_model(figures)
    servers[2].models = ["m", "other"]
    with pytest.raises(InputError, match="another model"):
        model.expect_model(figures)
    servers[2].healthy = False  # a server that cannot be reached passes
    model.expect_model(figures)


@pytest.mark.slow
def test_the_servers_of_a_run_answer_for_its_model(servers: list[Server], tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "plain.gguf", THINKING_TEMPLATE.replace("<think>\n", ""))
    write_tiny_qwen3(tmp_path / "thinking.gguf", THINKING_TEMPLATE)
    servers[0].adapters = [ADAPTERS[1]]
    recipe = Recipe(answers=Answers(servers=servers[0].url))
    with LlamaModel(tmp_path / "plain.gguf", n_ctx=256) as model:
        servers[0].meta = {"n_vocab": model.n_vocab, "n_params": model.n_params}
        replies = dict(answering.answers(model, PROMPTS[:2], recipe, 24))
        assert [model.detokenize(replies[i].tokens) for i in range(2)] == ["It is 0", "It is 1"]
        servers[0].meta["n_params"] += 1
        with pytest.raises(InputError, match="has another model"):
            list(answering.answers(model, PROMPTS[:2], recipe, 24))
    with (
        LlamaModel(tmp_path / "thinking.gguf", n_ctx=256) as model,
        pytest.raises(InputError, match=r"thinks before it answers.*answers\.servers=none"),
    ):
        list(answering.answers(model, PROMPTS[:2], recipe, 24))
    assert len(servers[0].asked) == 2


@pytest.mark.slow
def test_a_model_that_opens_the_trace_without_its_template_is_an_error(
    servers: list[Server], tmp_path: Path
) -> None:
    write_tiny_qwen3(
        tmp_path / "own.gguf", THINKING_TEMPLATE.replace("<think>\n", ""), liked={"<think>": 9.0, "t": 4.0}
    )
    with (
        LlamaModel(tmp_path / "own.gguf", n_ctx=256) as model,
        pytest.raises(InputError, match="thinks before it answers"),
    ):
        list(answering.answers(model, PROMPTS[:2], Recipe(answers=Answers(servers=servers[0].url)), 24))
    assert servers[0].asked == []


def test_a_server_with_an_active_adapter_is_not_unsteered(servers: list[Server]) -> None:
    for server in servers:
        server.adapters = [ADAPTERS[1]]
    model = LlamaServer(",".join(server.url for server in servers), [])
    model.expect_unsteered()
    servers[0].adapters = [{"id": 0}]  # the scale is missing
    servers[1].tells_models = False
    model.expect_unsteered()
    servers[2].adapters = ADAPTERS
    with pytest.raises(
        InputError, match=rf"{servers[2].url} answers under /m/style\.gguf, .*without adapters"
    ):
        model.expect_unsteered()


@pytest.mark.parametrize("number", [float("inf"), "first", None])
def test_adapter_numbers_that_are_not_numbers(servers: list[Server], number: Any) -> None:
    servers[0].adapters = [ADAPTERS[1] | {"id": number}]
    with pytest.raises(InputError, match="does not list its adapters"):
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
def test_servers_that_differ_are_an_error(servers: list[Server], other: list[dict[str, Any]]) -> None:
    servers[2].adapters = other
    with pytest.raises(InputError, match=f"{servers[0].url[:-3]} and {servers[2].url[:-3]} differ"):
        LlamaServer(",".join(server.url for server in servers), [(Path("a.gguf"), 0.5)])
    LlamaServer(",".join(server.url for server in servers), [])  # no adapter is used, so none matters
