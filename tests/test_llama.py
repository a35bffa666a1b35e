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


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Where the sequence of each token will be noted, a list for each step."""
    steps: list[list[int]] = []

    def decode(context: Any, batch: Any, decode: Any = llama_cpp.llama_decode) -> int:
        steps.append([batch.seq_id[i][0] for i in range(batch.n_tokens)])
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", decode)
    return steps


def test_answers_that_end_at_any_step_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(3)
    prompts = [[7, 7, *rng.integers(5, 250, length).tolist()] for length in rng.integers(1, 30, 40)]
    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        alone = [dict(model.generate([prompt], max_tokens=TOKENS))[0] for prompt in prompts]
        steps = watched(monkeypatch)
        together = dict(model.generate(prompts, max_tokens=TOKENS))
    assert len({len(answer.tokens) for answer in alone}) > 5, "they should end at different steps"
    assert [together[i] for i in range(len(prompts))] == alone
    # Sequences whose numbers do not follow one another are computed one after another: twice the time.
    shared, *answering = steps
    assert set(shared) == {0}
    assert all(step == sorted(step) and {*step} == {*range(1, max(step) + 1)} for step in answering)


def test_a_long_prompt_does_not_slow_those_that_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    steps = watched(monkeypatch)
    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        for prompt, at_once in (([5] * 400, 4), ([5] * 7, 8)):
            steps.clear()
            list(model.generate([[*prompt, 6 + i] for i in range(10)], max_tokens=2))
            assert max(max(step) for step in steps) == at_once
