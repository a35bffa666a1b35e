"""Both engines in one process, on the matrix tiles that processors with AMX have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

PROGRAM = """
import sys
from pathlib import Path
from rs_gguf.engines.llama.model import LlamaModel
import torch
with LlamaModel(Path(sys.argv[1]), n_ctx=512) as model:
    tokens = model.tokenize("The weather is fine today, and so it was the day before. " * 4)
    before = [g.tokens for _, g in model.generate([tokens], max_tokens=4)]
    for size in (16, 64, 300):
        matrix = torch.ones((size, size), dtype=torch.bfloat16)
        assert (matrix @ matrix == size).all()
        heads = torch.ones((1, 4, size, 64), dtype=torch.bfloat16)
        attention = torch.nn.functional.scaled_dot_product_attention
        assert (attention(heads, heads, heads, is_causal=True) == 1).all()
    assert [g.tokens for _, g in model.generate([tokens], max_tokens=4)] == before
"""


def test_llama_cpp_goes_on_after_pytorch_has_multiplied_bfloat16(real_model: Path) -> None:
    """Without AMX this says little; with it, llama.cpp would end in an illegal instruction."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(real_model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
