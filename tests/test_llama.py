"""Answers do not depend on who shares the batch, and the batch is one that llama.cpp computes in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from architectures import llama
from tiny_gguf import write_tiny_qwen2

TOKENS = 24


def test_answers_that_end_at_any_step_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(3)
    prompts = [[7, 7, *rng.integers(5, 250, length).tolist()] for length in rng.integers(1, 30, 40)]
    steps: list[list[int]] = []

    def decode(context: Any, batch: Any, decode: Any = llama_cpp.llama_decode) -> int:
        steps.append([batch.seq_id[i][0] for i in range(batch.n_tokens)])
        return int(decode(context, batch))

    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        alone = [dict(model.generate([prompt], max_tokens=TOKENS))[0] for prompt in prompts]
        monkeypatch.setattr(llama_cpp, "llama_decode", decode)
        together = dict(model.generate(prompts, max_tokens=TOKENS))
    assert len({len(answer.tokens) for answer in alone}) > 5, "they should end at different steps"
    assert [together[i] for i in range(len(prompts))] == alone
    # Sequences whose numbers do not follow one another are computed one after another: twice the time.
    shared, *answering = steps
    assert set(shared) == {0}
    assert all(step == sorted(step) and {*step} == {*range(1, max(step) + 1)} for step in answering)
