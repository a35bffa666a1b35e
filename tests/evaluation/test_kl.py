"""KL divergence of the next token on a tiny model, against a naive softmax in F64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fixtures.architectures import llama
from fixtures.tiny_gguf import write_tiny_qwen2
from numpy.typing import NDArray

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Engine, Steering
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.evaluation import kl as module
from rs_gguf.evaluation.kl import conversations, everyday_answers, everyday_prompts, kl_divergences
from rs_gguf.records.conversation import Answer

pytestmark = pytest.mark.slow

VECTOR = Steering({1: np.random.default_rng(0).standard_normal(32).astype(np.float32)})


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    path = tmp_path_factory.mktemp("kl") / "tiny.gguf"
    write_tiny_qwen2(path)
    with llama(path, n_ctx=2048) as model, TorchModel(path) as twin:  # keys and values in F32
        yield [model, twin]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    monkeypatch.setattr(module, "CONVERSATIONS", 3)
    monkeypatch.setattr(module, "TOKENS", 5)
    monkeypatch.setattr(module, "PROMPTS", 7)


def naive(of: NDArray[np.float64], against: NDArray[np.float64]) -> float:
    p, q = (np.exp(row.astype(np.float64)) for row in (of, against))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))


def logits(model: Engine, tokens: list[int], steering: Steering) -> NDArray[np.float64]:
    with model.steered(steering):
        ((_, row),) = model.next_logits([tokens])
        return row.astype(np.float64)


def test_both_divergences_equal_a_naive_softmax_one_token_at_a_time(engines: list[Engine]) -> None:
    found = []
    for model in engines:
        answered = everyday_answers(model, None)
        assert [len(reply) for _, reply in answered] == [5, 5, 5]
        nothing, some = kl_divergences(model, [NO_STEERING, VECTOR], None, answered)
        assert (nothing.first_token, nothing.sequence) == pytest.approx((0, 0), abs=1e-9)
        found.append(some)
    reference = engines[1]
    prompts = chat_tokens(reference, everyday_prompts(7))
    beginnings = [[*prompt, *reply[:k]] for prompt, reply in answered for k in range(len(reply))]
    first, sequence = (
        np.mean([naive(logits(reference, t, of), logits(reference, t, against)) for t in some])
        for some, of, against in ((prompts, NO_STEERING, VECTOR), (beginnings, VECTOR, NO_STEERING))
    )
    for divergence in found:  # of llama.cpp and of PyTorch
        assert divergence.first_token == pytest.approx(first, rel=1e-3)
        assert divergence.sequence == pytest.approx(sequence, rel=1e-3)
    assert first > 0.01


def test_without_answers_the_sequence_has_no_figure(engines: list[Engine]) -> None:
    assert np.isnan(kl_divergences(engines[0], [VECTOR], None, [])[0].sequence)


def test_answers_are_cut_and_empty_ones_left_out(engines: list[Engine]) -> None:
    model = engines[0]
    tokens = model.tokenize("on and on in the rain")
    answers = [Answer([], "", True, False), *[Answer(tokens, model.detokenize(tokens), True, False)] * 4]
    found = conversations(model, [[5, 6]] * 5, answers)
    assert found == [([5, 6], tokens[:5])] * 4


def test_everyday_prompts_are_benign_validation_prompts_without_lookalikes() -> None:
    prompts = everyday_prompts(100)
    assert len(prompts) == 100
    assert {(p.kind, p.split) for p in prompts} == {("benign", "validation")}
    assert "lookalike" not in {p.topic for p in prompts}
