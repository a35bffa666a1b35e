"""What a model takes of the machine's memory, where Linux tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from rs_gguf.models import header as gguf_header
from rs_gguf.models import q8_copy as widening

pytestmark = pytest.mark.real

# A process of its own: what others have read and given back does not count.
LOAD = """
import json, sys
from rs_gguf.engines.llama.model import LlamaModel

def status():
    return dict(line.split(":", 1) for line in open("/proc/self/status"))

def megabytes(name):
    return int(status()[name].split()[0]) / 1e3

before = megabytes("VmHWM")
with LlamaModel(sys.argv[1]):
    print(json.dumps({"grown": megabytes("VmHWM") - before, "mapped": megabytes("RssFile")}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it this way")
@pytest.mark.skipif(llama_cpp.llama_supports_gpu_offload(), reason="a GPU maps files")
def test_the_weights_are_in_memory_once(real_model: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(real_model)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = widening.size_to_load(real_model, gguf_header.read(real_model)) / 1e6
    assert found["grown"] < size + 250  # a cache of 8,192 tokens, and what is computed in
    assert found["mapped"] < 100  # libraries
