"""Test means and covariances against np.average and np.cov, over chunks of samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rs_gguf.activations.activations import CHUNK_SAMPLES, Activations
from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import (
    add_product,
    centred_rows,
    covariance,
    lower_product,
    weighted_means,
)

Float64 = npt.NDArray[np.float64]


def symmetric(lower: torch.Tensor) -> Float64:
    """Return the whole symmetric matrix; only the lower triangle of `lower` needs to be correct."""
    values = np.tril(lower.numpy())
    return np.asarray(values + np.tril(values, -1).T)


def moments(rows: Float64, weights: Float64) -> tuple[Float64, Float64]:
    """Return mean and covariance of one class at one layer with these rows."""
    activations = Activations.of(rows[:, None])
    mean = weighted_means(activations, 0, torch.from_numpy(weights)[None])[0]
    shares = torch.from_numpy(weights / weights.sum())
    matrix = symmetric(covariance(activations, 0, shares, mean))
    factor = centred_rows(activations, 0, shares, mean)
    np.testing.assert_allclose((factor.T @ factor).numpy(), matrix, atol=1e-12 * max(1, np.abs(matrix).max()))
    return mean.numpy(), matrix


@pytest.mark.parametrize("count", [20, CHUNK_SAMPLES, 3 * CHUNK_SAMPLES + 5])
def test_equals_numpy_weighted_mean_and_covariance(count: int) -> None:
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(count, 9)), rng.uniform(0.1, 2, count)
    mean, matrix = moments(rows, weights)
    np.testing.assert_allclose(mean, np.average(rows, axis=0, weights=weights), atol=1e-13)
    np.testing.assert_allclose(matrix, np.cov(rows, rowvar=False, aweights=weights, ddof=0), atol=1e-13)


def test_a_mean_far_from_zero_costs_no_digits_of_the_covariance() -> None:
    rng = np.random.default_rng(1)
    # Sums of squares about zero would lose eight digits here.
    rows, weights = rng.normal(size=(600, 6)), rng.uniform(0, 1, 600)
    mean, matrix = moments(rows + 1e4, weights)
    np.testing.assert_allclose(mean - 1e4, np.average(rows, axis=0, weights=weights), atol=1e-9)
    np.testing.assert_allclose(matrix, np.cov(rows, rowvar=False, aweights=weights, ddof=0), atol=1e-11)


def test_zero_weight_leaves_a_sample_out_and_unread() -> None:
    rng = np.random.default_rng(2)
    rows, weights = rng.normal(size=(600, 7)), rng.uniform(0.1, 1, 600)
    inside = rng.random(600) < 0.7
    mean, matrix = moments(np.where(inside[:, None], rows, np.nan), np.where(inside, weights, 0))
    expected = np.average(rows[inside], axis=0, weights=weights[inside])
    np.testing.assert_allclose(mean, expected, atol=1e-13)
    expected = np.cov(rows[inside], rowvar=False, aweights=weights[inside], ddof=0)
    np.testing.assert_allclose(matrix, expected, atol=1e-13)


def test_means_of_several_classes_across_chunks() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(CHUNK_SAMPLES + 50, 3, 5)).astype(np.float32)
    weights = np.stack([rng.uniform(size=len(rows)), np.zeros(len(rows))])
    means = weighted_means(Activations.of(rows), 2, torch.from_numpy(weights)).numpy()
    expected = np.average(rows[:, 2].astype(np.float64), axis=0, weights=weights[0])
    np.testing.assert_allclose(means[0], expected, atol=1e-14)
    assert not means[1].any()


@pytest.mark.parametrize("shape", [(3, 40), (700, 520), (10, 1100)])
def test_a_product_is_right_below_the_diagonal(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(4).normal(size=shape)
    expected = rows.T @ rows
    np.testing.assert_allclose(symmetric(lower_product(torch.from_numpy(rows))), expected, atol=1e-10)
    twice = lower_product(torch.from_numpy(rows))
    add_product(twice, torch.from_numpy(rows))
    np.testing.assert_allclose(symmetric(twice), 2 * expected, atol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_names_layer_and_sample(bad: float) -> None:
    rows = np.zeros((600, 3, 2), np.float32)
    rows[513, 1, 0] = bad
    weights = torch.ones((1, 600), dtype=torch.float64)
    with pytest.raises(InputError, match=r"activations of layer 1 .* sample 513"):
        weighted_means(Activations.of(rows), 1, weights)
    weighted_means(Activations.of(rows), 0, weights)
