"""Sampling that both engines share, and the check of prompt lengths."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rs_gguf.engines.generation import Asking, Sampling, check_lengths, draw, seeds
from rs_gguf.errors import InputError

WARM = Sampling(temperature=0.8)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("count", [1, 50], ids=["one", "all"])
def test_logits_that_are_not_finite_do_not_raise(value: float, count: int) -> None:
    """A steering that is far too strong causes such logits, and a search must go on."""
    logits = np.linspace(-1, 1, 50, dtype=np.float32)
    logits[:count] = value
    drawn = [draw(logits, WARM, np.random.default_rng(seed)) for seed in range(3)]
    assert drawn == [draw(logits, Sampling(), np.random.default_rng(0))] * 3


def test_likely_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3, 1e-9], dtype=np.float32))
    rng = np.random.default_rng(0)
    warm = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    counts = np.bincount([draw(logits, warm, rng) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.1, 0.6, 0.3, 0], atol=0.03)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.65)])
def test_unlikely_tokens_are_never_drawn(top_k: int, top_p: float) -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], dtype=np.float32))
    rng, narrow = np.random.default_rng(0), Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    assert {draw(logits, narrow, rng) for _ in range(100)} == {1, 2}


@pytest.mark.parametrize(
    ("max_tokens", "advice"), [(3, "it, or allow fewer tokens for an answer"), (0, "it")]
)
def test_a_prompt_that_is_too_long_is_an_error(max_tokens: int, advice: str) -> None:
    short = [[1] * 4, [1] * (10 - max_tokens)]
    check_lengths(short, 10, str, max_tokens)
    with pytest.raises(
        InputError, match=rf"a prompt has 11 tokens.*only 10 fit.*Shorten {advice}\. .*'\[2, 2,"
    ):
        check_lengths([*short, [2] * 11, [1] * 11], 10, str, max_tokens)


def test_a_resumed_run_draws_as_a_whole_run() -> None:
    prompts = [[5, 6], [7], [5, 6], [8, 9, 10], [5, 6]]
    whole = seeds(prompts, 3)
    assert len(set(whole)) == len(prompts)  # a repeated prompt gets another seed
    assert seeds(prompts[3:4] + prompts[1:2], 3) == [whole[3], whole[1]]
    assert not set(seeds(prompts, 4)) & set(whole)


def test_each_draw_has_the_next_seed_and_none_that_a_server_chooses() -> None:
    asking = Asking("system", 8, Sampling(temperature=1.0, seed=2**32 - 3))
    assert asking.for_draw(0) == asking
    assert [asking.for_draw(k).sampling.seed for k in (1, 2)] == [2**32 - 2, 0]
    assert asking.for_draw(2).sampling.temperature == 1.0
    assert asking.again(2) == replace(asking.for_draw(2), reordered=True)
