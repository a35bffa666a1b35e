"""Commands that run a model have llama.cpp's options, which become engine settings or recipe overrides."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.engine_options import EngineOption, EngineOptions, engine_options
from rs_gguf.cli.main import main
from rs_gguf.engines.settings import DEFAULTS, EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.pipeline import recipe
from rs_gguf.records.artefacts import STAGES
from rs_gguf.steering import vector_file
from rs_gguf.steering.vector import SteeringVector

SHORT = "-ngl 20 -t 3 -c 512 -b 64 -fa on -ctk q8_0 -ctv q4_0 -sm row -ts 3,1 -mg 1"
LONG = (
    "--gpu-layers 20 --threads 3 --ctx-size 512 --batch-size 64 --flash-attn on --cache-type-k q8_0 "
    "--cache-type-v q4_0 --split-mode row --tensor-split 3,1 --main-gpu 1"
)
SETTINGS = EngineSettings(
    gpu_layers="20", threads=3, ctx_size=512, batch_size=64, flash_attn="on", cache_type_k="q8_0",
    cache_type_v="q4_0", split_mode="row", tensor_split="3,1", main_gpu=1,
)  # fmt: skip


def parsed(*arguments: str) -> EngineOptions:
    """Return what a command gets."""
    got: list[EngineOptions] = []

    @click.command()
    @engine_options
    def command(engine: EngineOptions) -> None:
        got.append(engine)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return got[0]


def options_of(command: click.Command) -> dict[str, EngineOption]:
    return {str(part.name): part for part in command.params if isinstance(part, EngineOption)}


@pytest.mark.parametrize("arguments", [SHORT, LONG], ids=["short", "long"])
def test_options_are_the_same_settings_with_and_without_a_recipe(arguments: str) -> None:
    engine = parsed(*arguments.split())
    assert engine.settings() == SETTINGS
    assert recipe.load(None, engine.overrides()).engine == SETTINGS


def test_without_options_nothing_is_overridden() -> None:
    assert parsed().settings() == DEFAULTS
    assert parsed().overrides() == ()
    assert parsed("-t", "-1").overrides() == ('engine.threads="-1"',)


def test_options_say_what_the_settings_accept() -> None:
    options = options_of(main.commands["eval"])
    assert list(options) == list(EngineSettings.model_fields)
    for name, field in EngineSettings.model_fields.items():
        option = options[name]
        assert option.opts[-1] == f"--{name.replace('_', '-')}"
        assert field.default == "" or f"[default: {field.default}" in str(option.help)
        if choices := get_args(field.annotation):
            assert isinstance(option.type, click.Choice)
            assert set(option.type.choices) == set(choices)


def test_every_command_that_runs_a_model_has_them() -> None:
    having = {name for name, command in main.commands.items() if options_of(command)}
    assert having == {"run", *STAGES, "eval", "remeasure", "judge", "try", "check", "merge", "scan", "plan"}


def test_values_that_do_not_go_together_are_one_error() -> None:
    with pytest.raises(InputError, match="needs flash attention"):
        parsed("-fa", "off", "-ctv", "q8_0").settings()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    vector = SteeringVector({1: np.ones(32, np.float32)}, {}, "qwen2")
    vector_file.write(vector, tmp_path / "v.gguf")
    return tmp_path


def test_a_command_runs_the_model_with_them(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int, int, int]] = []
    make = llama_cpp.llama_init_from_model

    def kept(model: object, params: llama_cpp.llama_context_params) -> object:
        sizes.append((params.n_ctx, params.n_batch, params.n_threads, params.flash_attn_type))
        return make(model, params)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", kept)
    command = ["check", str(files / "v.gguf"), "--model", str(files / "tiny.gguf")]
    result = CliRunner().invoke(main, [*command, "-c", "512", "-b", "64", "-t", "1", "-fa", "off"])
    assert result.exit_code == 0, result.output
    assert set(sizes) == {(512, 64, 1, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)}
    result = CliRunner().invoke(main, [*command, "-ctk", "q8_0"])
    assert result.exit_code == 2
    assert "llama.cpp cannot make a context" in result.stderr
    assert "Traceback" not in result.stderr
