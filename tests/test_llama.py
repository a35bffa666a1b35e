"""Answers do not depend on who shares the batch, and the batch is one that llama.cpp computes in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from architectures import llama
from tiny_gguf import write_tiny_qwen2

from rs_gguf.errors import InputError

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


def test_a_prompt_of_several_batches_is_read_where_it_was_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch in which nothing is read has no rows in the last block."""
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompt = np.random.default_rng(1).integers(5, 250, 1100).tolist()
    with llama(tmp_path / "tiny.gguf", n_ctx=2048) as model:
        layers = list(range(model.n_layer))
        found = {
            p: rows["l_out"] for _, p, rows in model.token_activations([prompt], [[4, 1099]], layers=layers)
        }
        for position in (4, 1099):
            ((_, rows),) = model.activations([prompt[: position + 1]], layers=layers)
            np.testing.assert_allclose(found[position], rows["l_out"], atol=2e-3)
    assert "Exception" not in capfd.readouterr().err


def test_a_refused_adapter_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompts = [[5, 6, 7]]
    with llama(tmp_path / "tiny.gguf", n_ctx=512) as model:
        plain = next(logits.copy() for _, logits in model.next_logits(prompts))
        directions = {1: np.ones(model.n_embd, np.float32)}
        refusals = iter([1])
        with monkeypatch.context() as patched:
            real = llama_cpp.llama_set_adapters_lora
            patched.setattr(
                llama_cpp, "llama_set_adapters_lora", lambda *arguments: next(refusals, 0) or real(*arguments)
            )
            with pytest.raises(InputError, match="refused the adapter"), model.steered(directions):
                pass
        np.testing.assert_array_equal(next(logits for _, logits in model.next_logits(prompts)), plain)


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
