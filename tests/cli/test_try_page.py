"""`rs-export try` opens the model, or the server, and serves the page; wrong files are one clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.endpoints import Server, said, without_proxy_or_key
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.main import main
from rs_gguf.playground.session import LoadedModel, ServedModel, Session
from rs_gguf.records.conversation import Prompt
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

# Gradio and its requirements warn of each other's changes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROW = np.linspace(-1, 1, 32, dtype=np.float32)


class FakePage:
    def block_thread(self) -> None:
        pass


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Replace the page, and return the sessions that it gets."""
    from rs_gguf.playground import page

    sessions: list[Session] = []

    def build(session: Session, prompts: list[Prompt]) -> FakePage:
        assert prompts
        assert list(session.answers("Hello", 1.0)) or isinstance(session, ServedModel)
        sessions.append(session)
        return FakePage()

    monkeypatch.setattr(page, "build", build)
    monkeypatch.setattr(page, "launch", lambda page, port: f"http://127.0.0.1:{port}/")
    return sessions


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["try", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("try")
    write_tiny_qwen2(folder / "tiny.gguf")
    vector_file.write(SteeringVector({1: ROW}, architecture="qwen2"), folder / "v.gguf")
    factors = {"blk.1.attn_output.weight": (ROW[np.newaxis], ROW[:, np.newaxis])}
    lora_file.write(LoraAdapter(factors, "qwen2"), folder / "a.gguf")
    return folder


def test_a_model_is_loaded_with_its_files(folder: Path, sessions: list[Session]) -> None:
    files = (folder / "v.gguf", f"{folder / 'a.gguf'}:0.5")
    code, stdout, stderr = invoke(*files, "--model", folder / "tiny.gguf", "--tokens", 4, "--port", 8765)
    assert code == 0, stderr
    assert stdout == "Open http://127.0.0.1:8765/ in a browser. Ctrl-C stops.\n"
    assert [type(session) for session in sessions] == [LoadedModel]


def test_a_server_takes_adapters_only(
    folder: Path, sessions: list[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_proxy_or_key(monkeypatch)
    server = Server(lambda body: said(""), ["m"])
    server.adapters = [{"id": 0, "path": str(folder / "a.gguf"), "scale": 0.0}]
    server.behave = lambda body: (200, b"data: [DONE]\n\n")
    try:
        code, _, stderr = invoke(folder / "a.gguf", "--model", server.url)
        assert code == 0, stderr
        assert [type(session) for session in sessions] == [ServedModel]
        code, _, stderr = invoke(folder / "v.gguf", "--model", server.url)
        assert code == 2
        assert "v.gguf is a control vector, and a running server keeps its own" in stderr
    finally:
        server.stop()


def test_a_missing_file_is_named(folder: Path, sessions: list[Session]) -> None:
    code, _, stderr = invoke("missing.gguf", "--model", folder / "tiny.gguf")
    assert code == 2
    assert "missing.gguf" in stderr
    assert not sessions
