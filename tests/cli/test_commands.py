"""llama.cpp's command lines: the measured prompt, quoted paths, and users without a home folder."""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.invented_run import figures_of_file, make_run
from fixtures.tiny_qwen3 import write_tiny_qwen3

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.settings import EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.models import q8_copy as widening
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import load
from rs_gguf.pipeline.stages.file_record import WrittenFile, llama_cpp_of
from rs_gguf.pipeline.stages.measure import measure
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.files import cache_folder
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.report.page import write_card, write_report
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.vector import SteeringVector

TRIAL = Trial(0, Candidate("vector", "wrmd", 1.0, 2, 2, 1.0), "short", 0.0, 1.0, feasible=True)
posix_only = pytest.mark.skipif(os.name == "nt", reason="quoted for a POSIX shell")


def llama_cpp(path: Path, estimator: str = "gate", *, reasoning_off: bool = False) -> dict[str, Any]:
    """Return the `llama_cpp` record of a file, for a model of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return figures_of_file(path, estimator, reasoning_off=reasoning_off).llama_cpp.model_dump()


@pytest.mark.parametrize(
    ("switch", "thinks"),
    [
        ("{% if enable_thinking %}<|think|>{% endif %}", True),  # Gemma 4
        ("{% if enable_thinking is true %}<think>{% endif %}", True),  # MiniCPM5
        ("{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}", False),  # Qwen3
        ("<think>", False),  # always
    ],
)
@pytest.mark.parametrize("content", ["{{ messages[0].content }}", "{{ messages[0].content[0].text }}"])
def test_a_template_that_thinks_only_in_llama_server(switch: str, thinks: bool, content: str) -> None:
    assert ChatFormat(content + switch).thinks_in_server == thinks


@pytest.mark.parametrize("estimator", ["gate", "wrmd"])
def test_the_command_switches_thinking_off(estimator: str, tmp_path: Path) -> None:
    plain = llama_cpp(tmp_path / "remove.gguf", estimator)
    off = llama_cpp(tmp_path / "remove.gguf", estimator, reasoning_off=True)
    assert off["command"] == plain["command"] + " --reasoning off"
    assert [plain["reasoning_off"], off["reasoning_off"]] == [False, True]


def test_the_command_has_the_engine_settings_that_change_results(tmp_path: Path) -> None:
    control_vector.write(SteeringVector({2: np.ones(32, np.float32)}, {}, "qwen3"), tmp_path / "v.gguf")
    file = WrittenFile("control vector", tmp_path / "v.gguf", TRIAL, {})
    plain, quantised = (
        llama_cpp_of(tmp_path / "m.gguf", file, engine, reasoning_off=False).command
        for engine in (EngineSettings(threads=3), EngineSettings(threads=3, cache_type_k="q8_0"))
    )
    assert quantised == f"{plain} --cache-type-k q8_0"


@pytest.mark.parametrize("thinks", [False, True])
def test_the_command_follows_the_models_template(thinks: bool, tmp_path: Path) -> None:
    template = "{{ messages[0].content }}" + "{% if enable_thinking %}<think>{% endif %}" * thinks
    write_tiny_qwen3(tmp_path / "m.gguf", template)
    direction = np.ones(32, dtype=np.float32)
    control_vector.write(SteeringVector({2: direction}, {"measured": False}, "qwen3"), tmp_path / "v.gguf")
    with LlamaModel(tmp_path / "m.gguf", n_threads=1, n_ctx=256) as model:
        record = measure(
            model, KeywordJudge(), [Prompt(kind, kind) for kind in KINDS],
            {"vector": WrittenFile("control vector", tmp_path / "v.gguf", TRIAL, {})}, (),
            load(None, ["answers.test_tokens=8"]),
            RunFolder(tmp_path / "run").log("measured.jsonl", "key"),
            advance=lambda n: None,
        )  # fmt: skip
    assert record.files["vector"].llama_cpp.command.endswith(" --reasoning off") == thinks


def test_page_and_card_show_the_option(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    value = json.loads((folder / "metrics.json").read_text())
    value["files"]["adapter"]["llama_cpp"]["command"] += " --reasoning off"
    value["files"]["adapter"]["llama_cpp"]["reasoning_off"] = True
    (folder / "metrics.json").write_text(json.dumps(value))
    card = write_card(folder).read_text(encoding="utf-8")
    assert "llama-server -m MODEL.gguf --lora remove-adapter.gguf --reasoning off\n" in card
    assert "llama-cli -m MODEL.gguf --lora remove-adapter.gguf --reasoning off\n" in card
    commands = [line for line in card.splitlines() if "llama-" in line and "MODEL.gguf" in line]
    for option, off in (("--lora", True), ("--control-vector", False)):
        matching = [line for line in commands if f"{option} " in line or f"{option}-scaled " in line]
        assert len(matching) >= 2
        assert [line for line in matching if line.endswith(" --reasoning off") != off] == []
    assert ">--reasoning<" in write_report(folder).read_text(encoding="utf-8")


@posix_only
@pytest.mark.parametrize("estimator", ["gate", "wrmd"])
@pytest.mark.parametrize("folder", ["qwen, politics", 'my "own", first', '"quoted"', "its own", 'a "b"'])
def test_a_file_is_one_field_whatever_its_name(
    estimator: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp splits the values of `--lora` and `--control-vector` at commas, as a row of CSV."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / folder / "remove.gguf", Path(folder, "remove.gguf")):
        _, _, model, _, file, *_ = shlex.split(llama_cpp(path, estimator)["command"])
        expanded = os.path.expanduser(file)  # noqa: PTH111 - as the shell does it
        assert next(csv.reader([expanded])) == [str(path)]
        assert os.path.expanduser(model) == str(path)  # noqa: PTH111


@posix_only
def test_a_user_without_a_home_folder_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    write_tiny_qwen3(tmp_path / "m.gguf", "")
    monkeypatch.setattr(widening, "_copy_helps", lambda: True)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        cache_folder()
    assert widening.file_to_load(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    file = tmp_path / "my run" / "remove.gguf"
    assert shlex.split(llama_cpp(file)["command"]) == ["llama-server", "-m", str(file), "--lora", str(file)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rs-gguf"
