"""Moments against np.average / np.cov, merged in every order; activations of every dtype and container."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from rs_gguf.errors import InputError
from rs_gguf.estimators.moments import CHUNK_SAMPLES, Moments, layer_covariance, layer_means, read_rows


def reference(rows, weights):
    mean = np.average(rows, axis=0, weights=weights)
    return mean, np.cov(rows, rowvar=False, aweights=weights, ddof=0)


def covariance_of(moments):
    assert moments.lower is not None
    lower = np.tril(moments.lower) / moments.weight
    return lower + np.tril(lower, -1).T


def test_equals_numpy_weighted_mean_and_covariance():
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(700, 9)), rng.uniform(0.1, 2, 700)
    moments = layer_covariance(rows[:, None, :], 0, weights)
    mean, covariance = reference(rows, weights)
    np.testing.assert_allclose(moments.mean, mean, atol=1e-13)
    np.testing.assert_allclose(covariance_of(moments), covariance, atol=1e-13)
    assert moments.weight == pytest.approx(weights.sum())


@pytest.mark.parametrize("seed", range(5))
def test_merge_does_not_depend_on_order_or_split(seed):
    rng = np.random.default_rng(seed)
    # A mean far from zero: raw sums of squares would lose eight digits here, merged scatter does not.
    rows, weights = rng.normal(size=(200, 6)) + 1e4, rng.uniform(0, 1, 200)
    whole = layer_covariance(rows[:, None, :], 0, weights)
    parts = np.array_split(rng.permutation(200), rng.integers(2, 9))
    merged = Moments(6, scatter=True)
    for part in parts:
        piece = Moments(6, scatter=True)
        piece.update(rows[part], weights[part])
        merged.merge(piece)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(covariance_of(merged), covariance_of(whole), rtol=0, atol=1e-11)
    mean, covariance = reference(rows - 1e4, weights)
    np.testing.assert_allclose(covariance_of(merged), covariance, atol=1e-9)
    np.testing.assert_allclose(merged.mean - 1e4, mean, atol=1e-9)


def test_merge_to_1e12_at_ordinary_scale():
    rng = np.random.default_rng(8)
    rows, weights = rng.normal(size=(300, 5)), rng.uniform(0, 1, 300)
    results = []
    for _ in range(4):
        merged = Moments(5, scatter=True)
        for part in np.array_split(rng.permutation(300), 7):
            piece = Moments(5, scatter=True)
            piece.update(rows[part], weights[part])
            merged.merge(piece)
        results.append(merged)
    for other in results[1:]:
        np.testing.assert_allclose(other.mean, results[0].mean, atol=1e-12)
        np.testing.assert_allclose(covariance_of(other), covariance_of(results[0]), atol=1e-12)


def test_zero_weight_leaves_a_sample_out_and_an_empty_part_changes_nothing():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 4))
    weights = np.r_[np.ones(12), np.zeros(8)]
    moments = layer_covariance(rows[:, None, :], 0, weights)
    moments.merge(Moments(4, scatter=True))
    moments.update(rows, np.zeros(20))
    np.testing.assert_allclose(covariance_of(moments), np.cov(rows[:12], rowvar=False, ddof=0), atol=1e-14)


def test_a_covariance_reads_the_samples_of_its_class_alone():
    rng = np.random.default_rng(5)
    rows, weights = rng.normal(size=(3 * CHUNK_SAMPLES, 7)), rng.uniform(0.1, 1, 3 * CHUNK_SAMPLES)
    inside = rng.random(len(rows)) < 0.7
    moments = layer_covariance(
        np.where(inside[:, None], rows, np.nan)[:, None], 0, np.where(inside, weights, 0)
    )
    mean, covariance = reference(rows[inside], weights[inside])
    np.testing.assert_allclose(moments.mean, mean, atol=1e-13)
    np.testing.assert_allclose(covariance_of(moments), covariance, atol=1e-13)


def test_layer_means_of_several_classes_across_chunks():
    rng = np.random.default_rng(2)
    activations = rng.normal(size=(CHUNK_SAMPLES + 50, 3, 5)).astype(np.float32)
    weights = np.stack([rng.uniform(size=len(activations)), np.zeros(len(activations))])
    means, totals = layer_means(activations, 2, weights)
    expected = np.average(activations[:, 2].astype(np.float64), axis=0, weights=weights[0])
    np.testing.assert_allclose(means[0], expected, atol=1e-14)
    assert totals[1] == 0
    assert not means[1].any()


def test_dtypes_and_containers_read_alike(tmp_path):
    rng = np.random.default_rng(3)
    exact = rng.integers(-8, 8, size=(10, 2, 4)).astype(np.float64)  # exact in every dtype below
    memmap = np.memmap(tmp_path / "a.f16", np.float16, "w+", shape=exact.shape)
    memmap[:] = exact
    inputs = [exact.astype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)] + [memmap]
    inputs += [torch.tensor(exact, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16)]
    for activations in inputs:
        rows = read_rows(activations, np.array([7, 2]), 1)
        assert rows.dtype == np.float64
        np.testing.assert_array_equal(rows, exact[[7, 2], 1])
    np.testing.assert_array_equal(
        read_rows(torch.tensor(exact, requires_grad=True), slice(0, 3), 0), exact[:3, 0]
    )


def test_reading_never_hands_out_the_callers_memory():
    activations = np.ones((4, 1, 2))
    read_rows(activations, slice(0, 4), 0)[:] = 7
    assert (activations == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_names_layer_and_sample(bad):
    activations = np.zeros((600, 3, 2), np.float32)
    activations[513, 1, 0] = bad
    with pytest.raises(InputError, match=r"layer 1 .* sample 513"):
        layer_means(activations, 1, np.ones((1, 600)))
    layer_means(activations, 0, np.ones((1, 600)))


def test_values_whose_squares_overflow_are_still_finite():
    read_rows(np.full((2, 1, 2), 1e200), slice(0, 2), 0)


def test_unlike_moments_do_not_merge():
    with pytest.raises(InputError, match="cannot be merged"):
        Moments(3).merge(Moments(4))
