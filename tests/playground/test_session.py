"""Sessions of the page on a tiny model: both answers at once, gate activations, prompts to offer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fixtures.adapters import factors
from fixtures.architectures import llama
from fixtures.endpoints import Server, without_proxy_or_key
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Steering
from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.errors import InputError
from rs_gguf.evaluation.gate_activation import gate_activations
from rs_gguf.playground.session import LoadedModel, ServedModel, examples, side_by_side
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

ASKING = Asking(None, 12)
QUESTION = "What is a republic?"
ADAPTER = LoraAdapter(
    {
        "blk.1.attn_output.weight": factors(1, 32, 32, 0),
        "blk.2.attn_output.weight": factors(1, 32, 32, 1),
        "blk.2.ffn_down.weight": factors(1, 64, 32, 2),
    },
    "qwen2",
    {"estimator": GATED_ADAPTER},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("playground")
    write_tiny_qwen2(folder / "tiny.gguf")
    lora_file.write(ADAPTER, folder / "adapter.gguf")
    direction = np.linspace(-30, 30, 32, dtype=np.float32)
    vector_file.write(SteeringVector({1: direction}, architecture="qwen2"), folder / "vector.gguf")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LlamaModel]:
    with llama(folder / "tiny.gguf", n_ctx=1024) as model:
        yield model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_answers_are_the_ones_of_the_engine(model: LlamaModel, folder: Path, temperature: float) -> None:
    asking = Asking(None, 12, Sampling(temperature=temperature, seed=3))
    session = LoadedModel(model, [(folder / "vector.gguf", 0.5), (folder / "adapter.gguf", 2.0)], asking)
    steps = list(session.answers(QUESTION, 2.0))
    (tokens,) = chat_tokens(model, [Prompt(QUESTION, "benign")])
    directions = vector_file.read(folder / "vector.gguf").directions
    steering = Steering(directions, [(folder / "adapter.gguf", 4.0)])
    expected = []
    for steered in (NO_STEERING, steering):
        with model.steered(steered):
            [(_, answer)] = model.generate([tokens], max_tokens=12, sampling=asking.sampling)
        expected.append(answer.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert steps[-1] == tuple(expected)
    assert expected[0] != expected[1]
    # They grow in turns, a token at a time.
    lengths = [(len(unsteered), len(steered)) for unsteered, steered in steps]
    assert lengths == sorted(lengths)
    assert len(steps) >= 20


def test_at_scale_0_both_answers_agree(model: LlamaModel, folder: Path) -> None:
    session = LoadedModel(model, [(folder / "vector.gguf", 1.0)], ASKING)
    *_, (unsteered, steered) = session.answers(QUESTION, 0.0)
    assert unsteered == steered != ""


def test_an_answer_can_be_left(model: LlamaModel, folder: Path) -> None:
    session = LoadedModel(model, [(folder / "vector.gguf", 1.0)], ASKING)
    answers = session.answers(QUESTION, 1.0)
    next(answers)
    answers.close()
    assert list(session.answers(QUESTION, 1.0))


def test_gates_are_read_by_token_and_by_layer(model: LlamaModel, folder: Path) -> None:
    session = LoadedModel(model, [(folder / "adapter.gguf", 1.0)], ASKING)
    reading = session.gates(QUESTION, 0.5)
    assert reading is not None
    (tokens,) = chat_tokens(model, [Prompt(QUESTION, "benign")])
    assert [text for text, _ in reading.tokens] == [model.token_text(token) for token in tokens]
    steering = Steering(adapters=[(folder / "adapter.gguf", 0.5)])
    ((expected, _),) = gate_activations(model, steering, ADAPTER.gates, [(tokens, [])])
    assert reading.tokens[-1][1] == pytest.approx(expected, rel=1e-5)
    assert list(reading.layers) == [1, 2]
    # Layer 2 has two of the three matrices.
    assert (reading.layers[1] + 2 * reading.layers[2]) / 3 == pytest.approx(expected, rel=1e-5)
    assert LoadedModel(model, [(folder / "vector.gguf", 1.0)], ASKING).gates(QUESTION, 1.0) is None


def test_too_long_a_prompt_is_refused(model: LlamaModel, folder: Path) -> None:
    session = LoadedModel(model, [(folder / "vector.gguf", 1.0)], ASKING)
    with pytest.raises(InputError, match="only 1024 fit"):
        list(session.answers("long " * 2000, 1.0))
    with pytest.raises(InputError, match="at least one token"):
        list(model.stream([], NO_STEERING, max_tokens=1))


def test_closing_waits_for_a_token_and_ends_the_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, go_on = threading.Event(), threading.Event()
    with llama(folder / "tiny.gguf", n_ctx=1024) as model:
        session = LoadedModel(model, [(folder / "adapter.gguf", 1.0)], ASKING)
        answers = session.answers(QUESTION, 1.0)
        next(answers)
        advance, stream = model.detokenize, list[tuple[str, str]]()

        def slow(tokens: Sequence[int]) -> str:
            computing.set()
            assert go_on.wait(60)
            return advance(tokens)

        monkeypatch.setattr(model, "detokenize", slow)
        page = threading.Thread(target=lambda: stream.extend(answers))
        page.start()
        assert computing.wait(60)
        closing = threading.Thread(target=session.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive(), "llama.cpp may still compute"
        go_on.set()
        closing.join(60)
        page.join(60)
        assert len(stream) <= 2
        assert session.gates(QUESTION, 1.0) is None
        assert list(session.answers(QUESTION, 1.0)) == []


def test_texts_grow_in_turns() -> None:
    steps = list(side_by_side(iter(["a", "ab"]), iter(["x"])))
    assert steps == [("a", ""), ("a", "x"), ("ab", "x")]


def test_a_server_streams_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(body: dict[str, object]) -> tuple[int, bytes]:
        word = "no" if body["lora"] == [{"id": 0, "scale": 0.0}] else "yes"
        pieces = [{"role": "assistant"}, {"content": word}, {"content": "!"}]
        events = [json.dumps({"choices": [{"delta": piece}]}) for piece in pieces]
        return 200, "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()

    without_proxy_or_key(monkeypatch)
    server = Server(reply, ["m"])
    server.adapters = [{"id": 0, "path": "/m/a.gguf", "scale": 0.0}]
    try:
        session = ServedModel(LlamaServer(server.url, [(Path("a.gguf"), 1.0)]), ASKING)
        assert list(session.answers(QUESTION, 0.5))[-1] == ("no!", "yes!")
        assert session.gates(QUESTION, 0.5) is None
        assert [body["stream"] for body in server.asked] == [True, True]
        assert [body["lora"][0]["scale"] for body in server.asked] == [0.0, 0.5]
        for broken in (
            b"data: {\n\n",
            b'data: {"error": "out of memory"}\n\n',
            b'data: {"choices": [7]}\n\n',
        ):

            def broken_reply(body: dict[str, object], data: bytes = broken) -> tuple[int, bytes]:
                return 200, data

            server.behave = broken_reply
            with pytest.raises(InputError, match="broke off an answer") as error:
                list(session.answers(QUESTION, 0.5))
            assert b"memory" not in broken or "out of memory" in str(error.value)
        server.behave = lambda body: (400, {"error": "too long"})
        with pytest.raises(InputError, match="too long"):
            list(session.answers(QUESTION, 0.5))
    finally:
        server.stop()


def test_prompts_of_the_run_folder_are_offered(tmp_path: Path) -> None:
    own = examples([tmp_path / "a.gguf"])
    assert {prompt.kind for prompt in own} == set(KINDS)
    assert {prompt.split for prompt in own} == {"validation"}
    assert len(own) == 36
    rows = [{"prompt": f"What is {k}?", "kind": "sensitive"} for k in range(3)]
    (tmp_path / "test_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.prompt for prompt in examples([tmp_path / "a.gguf"])] == [row["prompt"] for row in rows]
