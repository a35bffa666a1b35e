"""Answers that begin from a draft are those of plain decoding, in fewer steps and in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from fixtures.architectures import llama
from fixtures.families import write_gguf
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.engines.generation import GREEDY, Sampling, rest_of_draft
from rs_gguf.engines.llama import model as llama_model
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.records.conversation import Generation

TOKENS = 24
WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=4)
RNG = np.random.default_rng(3)
PROMPTS = [[7, 7, *RNG.integers(5, 250, length).tolist()] for length in RNG.integers(1, 30, 20)]
Answers = dict[int, Generation]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    path = tmp_path_factory.mktemp("drafts") / "tiny.gguf"
    write_tiny_qwen2(path)
    with llama(path, n_ctx=8 * 256) as model:
        yield model


class Steps:
    """What llama.cpp decodes: the tokens of each call, and how many of them have an output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.outputs: list[int] = []

        def decode(context: Any, batch: Any, decode: Any = llama_cpp.llama_decode) -> int:
            self.tokens.append(batch.n_tokens)
            self.outputs.append(sum(batch.logits[i] for i in range(batch.n_tokens)))
            return int(decode(context, batch))

        monkeypatch.setattr(llama_cpp, "llama_decode", decode)


def generated(engine: Engine, drafts: Sequence[Sequence[int]] = (), sampling: Sampling = GREEDY) -> Answers:
    return dict(engine.generate(PROMPTS, max_tokens=TOKENS, sampling=sampling, drafts=drafts))


def wrong_at(tokens: Sequence[int], place: int) -> list[int]:
    """Return the tokens with another one at a place."""
    return [token + (k == place) for k, token in enumerate(tokens)]


def drafts_of(answers: Mapping[int, Generation]) -> dict[str, list[list[int]]]:
    """Return by name drafts that agree with the answers in different ways."""
    tokens = [answers[i].tokens for i in range(len(PROMPTS))]
    return {
        "right": tokens,
        "wrong at once": [wrong_at(answer, 0) for answer in tokens],
        "wrong in the middle": [wrong_at(answer, len(answer) // 2) for answer in tokens],
        "wrong at the end": [wrong_at(answer, len(answer) - 1) for answer in tokens],
        "too short": [answer[: k % 5] for k, answer in enumerate(tokens)],
        "too long": [[*answer, *range(50, 80)] for answer in tokens],
        "of every sort": [
            (answer, wrong_at(answer, 3), [], [9] * 40)[k % 4] for k, answer in enumerate(tokens)
        ],
    }


KINDS = list(drafts_of({i: Generation([], "", True) for i in range(len(PROMPTS))}))


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_does_not_change_an_answer(model: LlamaModel, kind: str, sampling: Sampling) -> None:
    """There are fewer slots than prompts, and answers end at different steps, some before the limit."""
    plain = generated(model, sampling=sampling)
    assert {answer.finished for answer in plain.values()} == {True, False}
    assert generated(model, drafts_of(plain)[kind], sampling) == plain
    assert generated(model, sampling=sampling) == plain, "nothing of a draft stays in the cache"


def test_unsteered_answers_are_drafts_of_steered_ones(model: LlamaModel) -> None:
    drafts = [answer.tokens for _, answer in sorted(generated(model).items())]
    direction = np.random.default_rng(0).standard_normal(model.n_embd).astype(np.float32)
    with model.steered(Steering({1: 0.05 * direction})):
        plain = generated(model)
        assert [plain[i].tokens for i in range(len(PROMPTS))] != drafts
        assert generated(model, drafts) == plain


def test_draft_tokens_are_read_together(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generated(model)
    steps = Steps(monkeypatch)
    generated(model)
    n_plain, tokens_plain = len(steps.tokens), sum(steps.tokens)
    steps.tokens.clear()
    generated(model, drafts_of(plain)["right"])
    assert len(steps.tokens) < n_plain / 3
    assert sum(steps.tokens) == tokens_plain, "none is read twice"
    steps.tokens.clear()
    generated(model, drafts_of(plain)["wrong at once"])
    assert sum(steps.tokens) <= tokens_plain + 16 * len(PROMPTS), "a wrong draft is read once"


@pytest.mark.parametrize("limit", [4, 20])
def test_a_step_has_few_outputs(model: LlamaModel, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Each takes memory. There may be fewer than sequences that are answered at once."""
    plain = generated(model)
    monkeypatch.setattr(llama_model, "_OUTPUTS", limit)
    steps = Steps(monkeypatch)
    assert generated(model, drafts_of(plain)["right"]) == plain
    assert max(steps.outputs) <= max(limit, model.n_parallel)


def test_the_rest_of_a_draft() -> None:
    assert rest_of_draft([1, 2, 3, 4], [], 10) == [1, 2, 3, 4]
    assert rest_of_draft([1, 2, 3, 4], [1, 2], 10) == [3, 4]
    assert rest_of_draft([1, 2, 3, 4], [1, 2], 4) == [3]
    assert not rest_of_draft([1, 2, 3, 4], [1, 9], 10)
    assert not rest_of_draft([1, 2], [1, 2], 10)
    assert not rest_of_draft([1, 2], [1, 2, 3], 10)
    assert not rest_of_draft([], [5], 10)


@pytest.mark.slow
def test_models_that_forget_old_tokens_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of all tokens cannot be cut, and a sliding window of 4 tokens has no others."""
    files = write_gguf(["LFM2", "Gemma 3"], tmp_path)
    for name, has_state in (("LFM2", True), ("Gemma 3", False)):
        with llama(files[name], n_ctx=8 * 256) as model:
            assert model.has_state == has_state
            plain = generated(model)
            with monkeypatch.context() as patched:
                steps = Steps(patched)
                for drafts in drafts_of(plain).values():
                    assert generated(model, drafts) == plain
                assert (max(steps.outputs) > model.n_parallel) != has_state
