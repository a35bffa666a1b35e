"""llama-server offers the unsteered model and each steered one by name, from our preset.ini."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.binaries import Server
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.steering.file import write
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.preset import preset_ini
from rs_gguf.steering.vector import SteeringVector

pytestmark = pytest.mark.real


def test_a_server_offers_each_way_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "MODEL.gguf")
    rng = np.random.default_rng(0)
    row, column, direction = (rng.normal(size=size).astype(np.float32) for size in ((1, 64), (32, 1), 32))
    write(SteeringVector({1: 5 * direction}), tmp_path / "remove.gguf")
    adapter = LoraAdapter({"blk.1.ffn_down.weight": (row, 5 * column)}, "qwen2")
    write(adapter, tmp_path / "remove-adapter.gguf")
    files = {"remove.gguf": "--control-vector", "remove-adapter.gguf": "--lora"}
    (tmp_path / "preset.ini").write_text(preset_ini("tiny", None, files, reasoning_off=True))
    monkeypatch.chdir(tmp_path)
    question = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
    with Server(tmp_path / "log", "--models-preset", "preset.ini", "-c", "128") as server:
        answers = {
            name: server.post("/v1/chat/completions", {**question, "model": name})["choices"][0]["message"]
            for name in ("tiny", "tiny-remove", "tiny-remove-adapter")
        }
    assert len({answer["content"] for answer in answers.values()}) == 3
