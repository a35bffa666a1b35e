"""The commands for files work without the extras, and the other commands name the extra that they need."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.tiny_gguf import write_tiny_qwen2
from safetensors.torch import save_file

from rs_gguf.cli.extras import EXTRAS, missing_extra
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.lora_file import write as write_adapter
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector_file import write as write_vector

ROOT = Path(__file__).parents[2]

# A command in a process that has no module of an extra, as after `pip install rs-gguf`.
_WITHOUT = """
import sys
from rs_gguf.cli.extras import EXTRAS

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = {name for modules in EXTRAS.values() for name in modules}
sys.meta_path.insert(0, Missing())
from rs_gguf.cli.main import main
main(sys.argv[1:], prog_name="rs-export")
"""


def without_extras(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", _WITHOUT, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    row = np.linspace(-1, 1, 32, dtype=np.float32)
    write_vector(SteeringVector({1: row}, architecture="qwen2"), folder / "v.gguf")
    factors = {"blk.1.attn_output.weight": (row[np.newaxis], row[:, np.newaxis])}
    write_adapter(LoraAdapter(factors, "qwen2"), folder / "a.gguf")
    write_tiny_qwen2(folder / "tiny.gguf")
    save_file({"layer_1": torch.ones(8, dtype=torch.bfloat16)}, folder / "foreign.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "check v.gguf",
        "check a.gguf",
        "inspect v.gguf --against v.gguf",
        "inspect a.gguf --json",
        "combine v.gguf v.gguf:-0.5 --output sum.gguf",
        "convert --from huggingface --architecture qwen2 foreign.safetensors --output converted.gguf",
        "merge a.gguf --model tiny.gguf --output merged.gguf --no-check",
        "models list",
    ],
)
def test_the_commands_for_files_need_no_extra(command: str, files: Path) -> None:
    code, output = without_extras(files, *command.split())
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "run",
        "plan",
        "report",
        "judge",
        "eval --model m.gguf --prompts p.txt",
        "remeasure .",
        "check v.gguf --model foreign.safetensors",
        "convert --to peft --model m.gguf a.gguf --output peft",
        "merge a.gguf --model tiny.gguf --output merged.gguf",
    ],
)
def test_other_commands_name_the_extra(command: str, files: Path) -> None:
    code, output = without_extras(files, *command.split())
    assert code == 2
    assert re.match(r"Error: the Python package \w+ is not installed; this command needs .*\n$", output), (
        output
    )
    assert "pip install 'rs-gguf[run]'" in output


def test_a_module_of_no_extra_is_a_fault_of_the_program() -> None:
    with pytest.raises(ModuleNotFoundError, match="gone"):
        missing_extra(ModuleNotFoundError("gone", name="rs_gguf.gone"))


@pytest.mark.parametrize("extra", EXTRAS)
def test_modules_are_the_ones_that_the_extra_installs(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.split(r"[>=\[]", text)[0] for text in project["optional-dependencies"][extra]}
    distributions = packages_distributions()
    installs = {
        name.lower().replace("_", "-") for module in EXTRAS[extra] for name in distributions.get(module, [])
    }
    assert installs - {"pydantic-core"} == required - {"rs-gguf"}
    small = {re.split(r"[>=\[]", text)[0] for text in project["dependencies"]}
    assert not small & required
