"""A full disk and too little memory: one clear error, exit code 2, and a run folder that can go on."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.full_disk import largest_file
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.main import main
from rs_gguf.engines.llama.log import build
from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy as widening
from rs_gguf.records.files import load_arrays, save_arrays

# Libraries are loaded first, so that the limit is met by the work and not by an import.
_LITTLE_MEMORY = """
import resource, sys
from rs_gguf.cli import main as cli
from rs_gguf.pipeline import run as pipeline
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.main(sys.argv[2:], prog_name="rs-export")
"""


def answers(out: Path, model: Path) -> list[str]:
    sets = (
        "prompts.fit=8",
        "prompts.tune=4",
        "prompts.validation=4",
        "answers.check=false",  # random weights answer no question
        "answers.fit_tokens=8",
        "answers.tokens=8",
        f"model={model}",
    )
    return ["answer", "--out", str(out), *(part for value in sets for part in ("--set", value))]


def error_of(stderr: str) -> str:
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error:")]
    return line


@pytest.mark.slow
def test_a_full_disk_stops_with_one_error_and_keeps_what_was_answered(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    arguments = answers(tmp_path / "out", tmp_path / "tiny.gguf")
    with largest_file(4096):
        stopped = CliRunner().invoke(main, arguments)
    assert stopped.exit_code == 2
    assert "answers.jsonl" in error_of(stopped.stderr)
    kept = (tmp_path / "out" / "answers.jsonl.part").read_bytes().count(b"\n") - 1
    assert kept > 0
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "answers.jsonl").read_text().count("\n") == 3 * (8 + 4)


def test_a_full_disk_leaves_no_half_shard_and_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "00000.safetensors"
    before = np.arange(4.0)
    save_arrays(path, {"a": before})
    with largest_file(4096), pytest.raises(InputError, match=r"cannot write .*00000.safetensors.*Free space"):
        save_arrays(path, {"a": np.zeros(10_000)})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(load_arrays(path)["a"], before)


def loaded_size(path: Path) -> int:
    """Bytes that the weights of the default model take in memory."""
    header = gguf_header.read(path)
    size = widening.size_to_load(path, header)
    if "AMX_INT8 = 1" not in build():
        return size
    # All that is multiplied is kept in another order, where a block of Q8_0 takes 38 bytes in place of 34.
    # The embedding, of Q5_0, is only looked up.
    (embedding,) = (tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    looked_up = math.prod(embedding.shape) // 32 * 22
    return looked_up + (size - looked_up) * 38 // 34


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size from /proc")
@pytest.mark.parametrize(
    ("beyond_weights", "said"),
    [(-200, "cannot load"), (150, "cannot make a context")],
    ids=["weights", "context"],
)
def test_too_little_memory(tmp_path: Path, real_model: Path, beyond_weights: int, said: str) -> None:
    extra = loaded_size(real_model) + beyond_weights * 2**20
    arguments = [str(extra), *answers(tmp_path / "out", real_model)]
    done = subprocess.run(
        [sys.executable, "-c", _LITTLE_MEMORY, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in error_of(done.stderr)
    assert not (tmp_path / "out" / "answers.jsonl").exists()
