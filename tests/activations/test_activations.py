"""`Activations` reads all parts, types and selections alike, as float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from rs_gguf.activations.activations import Activations
from rs_gguf.errors import InputError


def exact() -> Any:
    """Return numbers that every type below represents exactly."""
    return np.random.default_rng(3).integers(-8, 8, size=(10, 2, 4)).astype(np.float64)


def test_dtypes_and_containers_read_alike(tmp_path: Path) -> None:
    expected = exact()
    memmap = np.memmap(tmp_path / "a.f16", np.float16, "w+", shape=expected.shape)
    memmap[:] = expected
    sources: list[Any] = [expected.astype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)]
    sources += [memmap, torch.tensor(expected, requires_grad=True)]
    sources += [torch.tensor(expected, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16)]
    for source in sources:
        activations = Activations.of(source)
        assert activations.shape == (10, 2, 4)
        rows = activations.layer_rows(1, np.array([7, 2]))
        assert rows.dtype == torch.float64
        np.testing.assert_array_equal(rows.numpy(), expected[[7, 2], 1])
        np.testing.assert_array_equal(activations.layer_rows(0, slice(0, 3)).numpy(), expected[:3, 0])


def test_parts_are_one_after_another_and_choices_add_up(tmp_path: Path) -> None:
    expected = exact()
    parts = [expected[:4], expected[4:4], torch.from_numpy(expected[4:5]), expected[5:]]
    whole = Activations(parts)
    picks: list[Any] = [
        slice(None), slice(3, 8), slice(9, 99), slice(0, 0), np.array([9, 0, 0, 5]), np.array([], np.intp),
        np.arange(10) % 3 == 1,
    ]  # fmt: skip
    for samples in picks:
        chosen = whole.take(samples)
        assert len(chosen) == len(expected[samples])
        for layer in (0, 1):
            np.testing.assert_array_equal(whole.layer_rows(layer, samples).numpy(), expected[samples, layer])
            np.testing.assert_array_equal(chosen.layer_rows(layer).numpy(), expected[samples, layer])
        np.testing.assert_array_equal(chosen.array(tmp_path), expected[samples])
    twice = whole.take(np.array([9, 4, 4, 8])).take(slice(1, None))
    np.testing.assert_array_equal(twice.layer_rows(1, np.array([2, 0])).numpy(), expected[[8, 4], 1])
    chunks = list(twice.chunks(1, np.array([2, 0])))
    np.testing.assert_array_equal(np.concatenate([part for part, _ in chunks]), [2, 0])


def test_one_array_is_handed_on_as_it_is(tmp_path: Path) -> None:
    source = exact()
    activations = Activations.of(source)
    assert Activations.of(activations) is activations
    assert activations.array(tmp_path) is source


def test_layer_rows_are_never_the_callers_memory() -> None:
    for source in (np.ones((4, 1, 2)), torch.ones((4, 1, 2), dtype=torch.float64)):
        Activations.of(source).layer_rows(0)[:] = 7
        assert (source == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_name_layer_and_sample(bad: float) -> None:
    source = np.zeros((6, 3, 2), np.float32)
    source[4, 1, 0] = bad
    chosen = Activations.of(source, name="inputs").take(np.array([5, 4, 0]))
    with pytest.raises(InputError, match=r"inputs of layer 1 hold NaN or Inf in 1 .*sample 1;"):
        chosen.layer_rows(1)
    with pytest.raises(InputError, match=r"sample 1;"):
        chosen.layer_rows(1, slice(1, 3))
    chosen.layer_rows(0)


def test_values_whose_squares_overflow_are_still_finite() -> None:
    Activations.of(np.full((2, 1, 2), 1e200)).layer_rows(0)


@pytest.mark.parametrize("source", [np.ones((3, 2)), np.ones((3, 0, 2)), [1.0, 2.0]])
def test_other_shapes_are_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"\[samples, layers, width\]"):
        Activations.of(source)


def test_layers_that_are_not_held_have_rows_of_zero() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    held = Activations([rows[:2], rows[2:]], layers=(1, 4))
    np.testing.assert_array_equal(held.layer_rows(4), rows[:, 1])
    np.testing.assert_array_equal(held.take(np.array([3, 0])).layer_rows(1), rows[[3, 0], 0])
    for layer in (0, 2, 5):
        assert held.layer_rows(layer, np.array([0, 2])).tolist() == [[0.0] * 3] * 2
