"""Test every estimator against a direct inverse in float64, and its invariances, limits and errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rs_gguf import machine
from rs_gguf.activations.activations import MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators import device
from rs_gguf.estimators.constrained import ContrastRidge, ResidualRidge, SafeRidge, SensitiveRidge
from rs_gguf.estimators.estimator import (
    DirectionEstimator,
    MeanDifference,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)
from rs_gguf.estimators.labels import Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.machine import Processes
from rs_gguf.methods.adapter import GatedAdapter
from rs_gguf.methods.samples import Samples
from rs_gguf.methods.vector import ControlVector
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Fit
from rs_gguf.pipeline.stages.fit import fit
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.trials import Candidate

Extended = npt.NDArray[np.longdouble]
Names = npt.NDArray[np.str_]

FOUR: list[type[DirectionEstimator]] = [
    MeanDifference,
    WeightedMeanDifference,
    RidgeMeanDifference,
    WeightedRidgeMeanDifference,
]
FIVE: list[type[DirectionEstimator]] = [*FOUR, UncentredWeightedRidgeMeanDifference]
SAFE: list[type[DirectionEstimator]] = [SensitiveRidge, ContrastRidge, SafeRidge, ResidualRidge]


def planted(n: int = 120, n_layers: int = 3, width: int = 10, seed: int = 0) -> tuple[Float64, Float64]:
    """Return activations [n, L, D] that move along a direction with confidence [n], plus correlated noise."""
    rng = np.random.default_rng(seed)
    confidence = rng.choice([-1, 1], n) * rng.uniform(0.2, 1, n)
    confidence[: n // 10] = rng.uniform(-0.15, 0.15, n // 10)
    mixing = rng.normal(size=(width, width)) / math.sqrt(width)
    activations = rng.normal(size=(n, n_layers, width)) @ mixing + rng.normal(size=(n_layers, width))
    activations += confidence[:, None, None] * rng.normal(size=(n_layers, width))
    return activations, confidence


def labelled(n: int = 240, width: int = 12, seed: int = 0) -> tuple[Float64, Float64, Names, Names]:
    """Return `planted` samples with kinds and two groupings; harmful ones move along their own direction."""
    activations, confidence = planted(n, 2, width, seed)
    rng = np.random.default_rng(seed + 100)
    kinds = rng.choice(["sensitive", "harmful", "benign"], n)
    activations += ((kinds == "harmful") * 1.0)[:, None, None] * rng.normal(size=(2, width))
    groups = np.column_stack(
        [rng.choice(["en", "de", "zh"], n), rng.choice(["", "plain", "rare"], n, p=[0.5, 0.48, 0.02])]
    )
    return activations, confidence, kinds, groups


def unit(vectors: Float64) -> Float64:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def reference(
    estimator: DirectionEstimator,
    activations: Float64,
    confidence: Float64,
    ridge: float,
    weights: Float64 | None = None,
) -> Float64:
    """Compute the formulas literally: covariance by np.cov, then np.linalg.solve, layer by layer."""
    weights = np.ones(len(confidence)) if weights is None else weights
    if estimator.by_confidence:
        weights = weights * np.abs(confidence)
    plus, minus = confidence > 0.15, confidence < -0.15
    neutral = np.abs(confidence) <= 0.15
    rows = []
    for h in activations.astype(np.float64).transpose(1, 0, 2):
        mean_plus = np.average(h[plus], axis=0, weights=weights[plus])
        mean_minus = np.average(h[minus], axis=0, weights=weights[minus])
        if estimator.name == "md":
            rows.append(mean_plus - mean_minus)
        elif estimator.name == "wmd":
            origin = h[neutral].mean(axis=0)
            rows.append(unit(mean_plus - origin) - unit(mean_minus - origin))
        else:
            matrix = np.cov(h[minus], rowvar=False, aweights=weights[minus], ddof=0)
            if estimator.name == "wrmd-uncentred":
                matrix = (h[minus].T * weights[minus]) @ h[minus] / weights[minus].sum()
            scale = ridge * np.trace(matrix) / len(matrix) if estimator.ridge_scale == "relative" else ridge
            rows.append(np.linalg.solve(matrix + scale * np.eye(len(matrix)), mean_plus - mean_minus))
    return unit(np.array(rows))


@pytest.mark.parametrize("width", [10, 64, 200], ids=["n>D", "n~D", "n<D"])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("kind", FIVE)
def test_equals_direct_solve(
    kind: type[DirectionEstimator], scale: Literal["relative", "absolute"], width: int
) -> None:
    activations, confidence = planted(width=width)
    estimator, ridges = kind(ridge_scale=scale), [1e-4, 1e-3, 0.03, 1, 100]
    path = fit_paths(activations, confidence, [estimator], ridges=ridges)[0]
    assert path.directions.shape == (5, 3, width)
    assert path.offset.shape == (3, width)
    for ridge, directions in zip(ridges, path.directions, strict=True):
        expected = reference(estimator, activations, confidence, ridge)
        np.testing.assert_allclose(directions, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-14)


def eliminate(matrix: Extended, right: Extended) -> Extended:
    """Return matrix⁻¹ right by Gaussian elimination; NumPy's solvers would convert to float64."""
    matrix, right = matrix.copy(), right.copy()
    for k in range(len(matrix)):
        factor = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :, k:] -= factor[:, None] * matrix[k, k:]
        right[k + 1 :] -= factor * right[k]
    for k in reversed(range(len(matrix))):
        right[k] = (right[k] - matrix[k, k + 1 :] @ right[k + 1 :]) / matrix[k, k]
    return right


@pytest.mark.skipif(
    bool(np.finfo(np.longdouble).eps > 1e-18), reason="no type wider than float64 on this platform"
)
@pytest.mark.parametrize("width", [10, 54, 200], ids=["n>D", "n~D", "n<D"])
@pytest.mark.parametrize("centred", [True, False])
def test_tiny_ridges_equal_elimination_in_extended_precision(centred: bool, width: int) -> None:
    # A solution in float64 is wrong in the eighth digit here, so it cannot be the reference.
    activations, confidence = planted(n_layers=1, width=width)
    kind = WeightedRidgeMeanDifference if centred else UncentredWeightedRidgeMeanDifference
    ridges = [1e-8, 1e-6]
    paths = fit_paths(activations, confidence, [kind()], ridges=ridges)[0].directions
    h, plus, minus = activations[:, 0].astype(np.longdouble), confidence > 0.15, confidence < -0.15
    weights = np.abs(confidence).astype(np.longdouble)
    mean_plus, mean_minus = (weights[m] @ h[m] / weights[m].sum() for m in (plus, minus))
    rows = h[minus] - (mean_minus if centred else 0)
    matrix = (rows.T * weights[minus]) @ rows / weights[minus].sum()
    for ridge, directions in zip(ridges, paths, strict=True):
        shifted = matrix + ridge * np.trace(matrix) / width * np.eye(width)
        expected = eliminate(shifted, mean_plus - mean_minus)
        expected /= np.sqrt(expected @ expected)
        np.testing.assert_allclose(directions[0], expected.astype(np.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [10, 200])
def test_path_equals_separate_fits_and_shares_systems(width: int) -> None:
    activations, confidence = planted(width=width)
    grid = [1e-3, 0.1, 1, 50]
    estimators = [kind() for kind in FIVE]
    paths = fit_paths(activations, confidence, estimators, ridges=grid)
    for kind, path in zip(FIVE, paths, strict=True):
        assert path.directions.shape == (4, 3, width)
        for ridge, directions in zip(grid, path.directions, strict=True):
            alone = kind(ridge=ridge).fit(activations, confidence)
            np.testing.assert_allclose(directions, alone.directions_, atol=1e-12)
    path = fit_paths(activations, confidence, [WeightedRidgeMeanDifference()], ridges=grid)[0]
    np.testing.assert_array_equal(path.directions, paths[3].directions)


@pytest.mark.parametrize("kind", FIVE)
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), width=st.sampled_from([3, 9, 80]))
def test_invariances(kind: type[DirectionEstimator], seed: int, width: int) -> None:
    activations, confidence = planted(60, 2, width, seed)
    rng = np.random.default_rng(seed)
    fit = kind(ridge=0.2).fit(activations, confidence).directions_

    order = rng.permutation(60)
    np.testing.assert_allclose(
        kind(ridge=0.2).fit(activations[order], confidence[order]).directions_, fit, atol=1e-10
    )

    doubled = kind(ridge=0.2).fit(
        np.concatenate([activations] * 2), np.tile(confidence, 2), sample_weight=np.full(120, 0.5)
    )
    np.testing.assert_allclose(doubled.directions_, fit, atol=1e-9)

    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    np.testing.assert_allclose(
        kind(ridge=0.2).fit(activations @ rotation, confidence).directions_, fit @ rotation, atol=1e-9
    )

    gap = activations[confidence > 0.15].mean(axis=0) - activations[confidence < -0.15].mean(axis=0)
    if not kind.by_confidence:  # the guarantee holds for the estimator's own means, which are unweighted here
        assert (np.einsum("ld,ld->l", fit, gap) > 0).all()


@pytest.mark.parametrize("kind", SAFE)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), width=st.sampled_from([9, 80]))
def test_safe_invariances(kind: type[DirectionEstimator], seed: int, width: int) -> None:
    activations, confidence, kinds, _ = labelled(120, width, seed)
    rng = np.random.default_rng(seed)
    fit = kind(ridge=0.2).fit(activations, confidence, kinds=kinds).directions_

    order = rng.permutation(120)
    shuffled = kind(ridge=0.2).fit(activations[order], confidence[order], kinds=kinds[order])
    np.testing.assert_allclose(shuffled.directions_, fit, atol=1e-9)

    doubled = kind(ridge=0.2).fit(
        np.concatenate([activations] * 2),
        np.tile(confidence, 2),
        kinds=np.tile(kinds, 2),
        sample_weight=np.full(240, 0.5),
    )
    np.testing.assert_allclose(doubled.directions_, fit, atol=1e-9)

    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    turned = kind(ridge=0.2).fit(activations @ rotation, confidence, kinds=kinds)
    np.testing.assert_allclose(turned.directions_, fit @ rotation, atol=1e-9)

    refused = (kinds == "sensitive") & (confidence > 0.15)
    answered = (kinds != "harmful") & (confidence < -0.15)
    if kind is ContrastRidge:
        harmful = (kinds == "harmful") & (confidence > 0.15)
        answered = (kinds == "benign") & (confidence < -0.15) | harmful
    weights = np.abs(confidence)
    gap = np.average(activations[refused], axis=0, weights=weights[refused]) - np.average(
        activations[answered], axis=0, weights=weights[answered]
    )
    assert (np.einsum("ld,ld->l", fit, gap) > 0).all()


@pytest.mark.parametrize(
    "kind", [WeightedMeanDifference, WeightedRidgeMeanDifference, UncentredWeightedRidgeMeanDifference]
)
@pytest.mark.parametrize("width", [4, 90])
def test_weighted_refused_mean_projects_above_answered(kind: type[DirectionEstimator], width: int) -> None:
    activations, confidence = planted(60, 4, width, 5)
    fit = kind(ridge=0.01).fit(activations, confidence).directions_
    plus, minus = confidence > 0.15, confidence < -0.15
    gap = np.average(activations[plus], axis=0, weights=confidence[plus]) - np.average(
        activations[minus], axis=0, weights=-confidence[minus]
    )
    assert (np.einsum("ld,ld->l", fit, gap) > 0).all()


def test_large_ridge_gives_the_mean_difference() -> None:
    activations, confidence = planted(width=30)
    ridge = RidgeMeanDifference(ridge=1e9).fit(activations, confidence)
    mean = MeanDifference().fit(activations, confidence)
    np.testing.assert_allclose(ridge.directions_, mean.directions_, atol=1e-8)


def test_small_ridge_gives_linear_discriminant_analysis() -> None:
    rng = np.random.default_rng(4)
    half = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    # Both classes have the same scatter, so that LDA's pooled covariance is the one of the answered class.
    activations = np.concatenate([half, half + rng.normal(size=6)])[:, None]
    confidence = np.repeat([-1.0, 1.0], 300)
    ours = RidgeMeanDifference(ridge=1e-12).fit(activations, confidence).directions_[0]
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(activations[:, 0], confidence)
    np.testing.assert_allclose(ours, unit(lda.coef_[0]), atol=1e-8)


def test_offsets() -> None:
    activations, confidence = planted()
    kinds = np.where(np.arange(120) % 2, "benign", "sensitive")
    plus, minus, neutral = confidence > 0.15, confidence < -0.15, np.abs(confidence) <= 0.15
    middle = (activations[plus].mean(axis=0) + activations[minus].mean(axis=0)) / 2
    expected: dict[Literal["auto", "neutral", "midpoint", "benign"], Float64] = {
        "auto": activations[neutral].mean(axis=0),
        "neutral": activations[neutral].mean(axis=0),
        "midpoint": middle,
        "benign": activations[minus & (kinds == "benign")].mean(axis=0),
    }
    for offset, value in expected.items():
        fitted = MeanDifference(offset=offset).fit(activations, confidence, kinds=kinds)
        np.testing.assert_allclose(fitted.offset_, value, atol=1e-13)
    few = ~neutral | (np.cumsum(neutral) <= 3)
    np.testing.assert_allclose(
        MeanDifference().fit(activations[few], confidence[few]).offset_, middle, atol=1e-13
    )


def test_constant_features_and_a_single_answered_sample() -> None:
    activations, confidence = planted(width=6)
    activations[:, :, 2] = 3.0
    direction = RidgeMeanDifference(ridge=0.1).fit(activations, confidence).directions_
    np.testing.assert_allclose(direction[:, 2], 0, atol=1e-12)
    # One answered sample has no spread: every ridge then gives the mean difference.
    keep = (confidence > 0.15) | (np.arange(120) == np.flatnonzero(confidence < -0.15)[0])
    few, score = activations[keep], confidence[keep]
    np.testing.assert_allclose(
        RidgeMeanDifference().fit(few, score).directions_,
        MeanDifference().fit(few, score).directions_,
        atol=1e-12,
    )
    one_wide = WeightedRidgeMeanDifference().fit(activations[:, :, :1], confidence)
    np.testing.assert_allclose(np.abs(one_wide.directions_), 1)


@pytest.mark.parametrize("kind", FIVE)
def test_one_sample_a_class(kind: type[DirectionEstimator]) -> None:
    activations, _ = planted(n=2)
    fitted = kind().fit(activations, [0.8, -0.6])
    # Without a spread there is no metric, so the direction is the line through the two points. WMD measures
    # from the midpoint, which is on this line; the uncentred form measures from zero, which is not.
    if kind is not UncentredWeightedRidgeMeanDifference:
        np.testing.assert_allclose(fitted.directions_, unit(activations[0] - activations[1]), atol=1e-12)
    assert (np.einsum("ld,ld->l", fitted.directions_, activations[0] - activations[1]) > 0).all()


@pytest.mark.parametrize("width", [10, 150])
def test_zero_weight_equals_absence(width: int) -> None:
    activations, confidence = planted(width=width)
    weights = np.ones(120)
    weights[::3] = 0
    for kind in FIVE:
        out = kind(offset="midpoint").fit(activations[weights > 0], confidence[weights > 0])
        zero = kind(offset="midpoint").fit(activations, confidence, sample_weight=weights)
        np.testing.assert_allclose(zero.directions_, out.directions_, atol=1e-12)


def test_dtypes_tensors_and_memory_maps(tmp_path: Path) -> None:
    activations, confidence = planted()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        cast = activations.astype(dtype)
        expected = WeightedRidgeMeanDifference().fit(cast.astype(np.float64), confidence).directions_
        np.testing.assert_array_equal(
            WeightedRidgeMeanDifference().fit(cast, confidence).directions_, expected
        )
    half = activations.astype(np.float16)
    np.save(tmp_path / "a.npy", half)
    expected = RidgeMeanDifference().fit(half, confidence).directions_
    for other in (np.load(tmp_path / "a.npy", mmap_mode="r"), torch.from_numpy(half)):
        np.testing.assert_array_equal(RidgeMeanDifference().fit(other, confidence).directions_, expected)


@pytest.mark.parametrize("width", [10, 300])
def test_same_bytes_for_any_number_of_threads_and_cores(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    activations, confidence = planted(400, 5, width)
    before = torch.get_num_threads()
    results = set()
    for threads, cores in ((1, 1), (2, 1), (2, 2), (1, 4)):
        monkeypatch.setattr(machine, "usable_cores", lambda cores=cores: cores)
        torch.set_num_threads(threads)
        try:
            path = fit_paths(activations, confidence, [WeightedRidgeMeanDifference()], ridges=[0.01, 1])[0]
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        results.add(path.directions.tobytes())
    assert len(results) == 1


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
                    self.most = max(self.most, self.now)
        return result

    def _free(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.now -= size


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1000, 448), (500, 896)], ids=["n>D", "n<D"])
def test_a_path_takes_one_and_a_half_layers_beyond_input_and_result(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    activations, confidence = planted(shape[0], 2, shape[1])
    half = activations.astype(np.float16)
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)  # each core works on its own layer
    with Held() as held:
        fit_paths(half, confidence, [kind() for kind in FIVE], ridges=np.geomspace(1e-3, 1e2, 32))
    assert activations[:, 0].nbytes / 4 < held.most < 1.5 * activations[:, 0].nbytes


def test_wide_layers_are_fitted_one_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, two = torch.device("cpu"), Processes(0, 2)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "free_memory", lambda: 16 << 30)
    assert [device.workers(cpu, width) for width in (896, 10_000, 40_000)] == [8, 2, 1]
    assert device.workers(cpu, 896, two) == device.workers(torch.device("cuda"), 896) == 1
    monkeypatch.setattr(machine, "free_memory", lambda: 0)  # unknown
    assert device.workers(cpu, 40_000) == 8


def test_cuda_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"'cuda': PyTorch sees no CUDA device.*'cpu' or 'auto'"):
        MeanDifference(device="cuda").fit(*planted())


def test_apple_machines_get_a_warning_that_the_cpu_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device._warn_about_mps.cache_clear()
    assert device.resolve_device("auto").type == "cpu"
    device.resolve_device("auto")
    assert caplog.text.count("MPS has no float64") == 1
    caplog.clear()
    assert device.resolve_device("cpu").type == "cpu"
    assert not caplog.text


def test_sklearn_manners() -> None:
    estimator = RidgeMeanDifference(ridge=0.3, neutral=0.2)
    assert estimator.get_params() == {
        "ridge": 0.3,
        "ridge_scale": "relative",
        "neutral": 0.2,
        "offset": "auto",
        "device": "auto",
    }
    assert clone(SafeRidge(ridge=5.0)).ridge == 5.0
    activations, confidence = planted()
    assert estimator.fit(activations, confidence) is estimator
    assert clone(estimator) == estimator
    assert not hasattr(clone(estimator), "directions_")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", FIVE)
def test_non_finite_activations_name_the_layer(kind: type[DirectionEstimator], bad: float) -> None:
    activations, confidence = planted()
    activations[7, 2, 3] = bad
    with pytest.raises(InputError, match="layer 2"):
        kind().fit(activations, confidence)


def test_errors_say_what_is_wrong() -> None:
    activations, confidence = planted()
    md = MeanDifference()
    with pytest.raises(InputError, match="'refused'"):
        md.fit(activations, -np.abs(confidence))
    with pytest.raises(InputError, match="'answered'"):
        md.fit(activations, confidence, sample_weight=(confidence > 0).astype(float))
    with pytest.raises(InputError, match=r"at any layer.*same mean"):
        md.fit(np.ones((120, 2, 4)), confidence)
    with pytest.raises(InputError, match="120 samples of activations and 119"):
        md.fit(activations, confidence[:-1])
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        md.fit(activations, confidence * 3)
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        md.fit(activations, np.where(confidence > 0, np.nan, confidence))
    with pytest.raises(InputError, match=r"\[samples, layers, width\]"):
        md.fit(activations[:, 0], confidence)
    with pytest.raises(InputError, match="sample_weight"):
        md.fit(activations, confidence, sample_weight=-np.ones(120))
    with pytest.raises(InputError, match="sensitive, harmful, benign"):
        md.fit(activations, confidence, kinds=["odd"] * 120)
    with pytest.raises(InputError, match="kinds="):
        SafeRidge().fit(activations, confidence)
    with pytest.raises(InputError, match="kinds="):
        MeanDifference(offset="benign").fit(activations, confidence)
    with pytest.raises(InputError, match="lost in the rounding"):
        RidgeMeanDifference(ridge=1e-30).fit(planted(width=70)[0] * 1e3, confidence)
    with pytest.raises(InputError, match="init_process_group"):
        Processes.joined()


@pytest.mark.parametrize(
    "options",
    [
        {"ridge": 0},
        {"ridge": -1},
        {"ridge": math.nan},
        {"ridge_scale": "x"},
        {"offset": "x"},
        {"neutral": 1},
        {"device": "tpu"},
    ],
)
def test_bad_parameters(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        RidgeMeanDifference(**options)


# --- safe variants ---------------------------------------------------------------------------------------


def contrasts(
    activations: Float64, confidence: Float64, kinds: Names, layer: int, inside: Mask | None = None
) -> tuple[Float64, Float64]:
    """Return δ and h of one layer, |c|-weighted, by np.average."""
    h = activations[:, layer]

    def mean(mask: Mask) -> Float64:
        return np.average(h[mask], axis=0, weights=np.abs(confidence[mask]))

    refused, answered = confidence > 0.15, confidence < -0.15
    inside = np.ones(len(h), bool) if inside is None else inside
    return (
        mean((kinds == "sensitive") & refused) - mean((kinds != "harmful") & answered),
        mean((kinds == "harmful") & refused & inside) - mean((kinds == "benign") & answered & inside),
    )


def metric(activations: Float64, confidence: Float64, kinds: Names, layer: int, ridge: float) -> Float64:
    members = (kinds != "harmful") & (confidence < -0.15)
    matrix = np.cov(activations[members, layer], rowvar=False, aweights=-confidence[members], ddof=0)
    return np.asarray(matrix + ridge * np.trace(matrix) / len(matrix) * np.eye(len(matrix)))


@pytest.mark.parametrize("width", [12, 150], ids=["n>D", "n<D"])
def test_safe_is_the_constrained_minimum(width: int) -> None:
    activations, confidence, kinds, _ = labelled(width=width)
    fitted = SafeRidge(ridge=0.1).fit(activations, confidence, kinds=kinds)
    for layer in range(2):
        delta, harm = contrasts(activations, confidence, kinds, layer)
        # The optimality (KKT) system, solved directly.
        columns = np.column_stack([delta, harm])
        system = np.block(
            [[metric(activations, confidence, kinds, layer, 0.1), columns], [columns.T, np.zeros((2, 2))]]
        )
        solution = np.linalg.solve(system, np.r_[np.zeros(width), 1, 0])[:width]
        np.testing.assert_allclose(fitted.directions_[layer], unit(solution), atol=1e-10)
        assert abs(fitted.directions_[layer] @ harm) < 1e-11
        assert fitted.directions_[layer] @ delta > 0
    np.testing.assert_allclose(fitted.harm_cosine_, 0, atol=1e-11)
    assert (np.abs(fitted.contrast_cosine_) > 0.01).all()


def test_contrast_takes_harm_as_its_negative_class() -> None:
    activations, confidence, kinds, _ = labelled()
    fitted = ContrastRidge(ridge=0.5).fit(activations, confidence, kinds=kinds)
    relabelled = np.where(
        (kinds == "sensitive") & (confidence > 0.15),
        confidence,
        np.where(
            ((kinds == "benign") & (confidence < -0.15)) | ((kinds == "harmful") & (confidence > 0.15)),
            -np.abs(confidence),
            0,
        ),
    )
    expected = WeightedRidgeMeanDifference(ridge=0.5).fit(activations, relabelled)
    np.testing.assert_allclose(fitted.directions_, expected.directions_, atol=1e-10)


def test_residual_directions() -> None:
    activations, confidence, kinds, _ = labelled()
    delta, harm = contrasts(activations, confidence, kinds, 0)
    inverse = np.linalg.inv(metric(activations, confidence, kinds, 0, 1.0))
    hard = ResidualRidge().fit(activations, confidence, kinds=kinds)
    expected = inverse @ delta
    other = unit(inverse @ harm)
    expected = unit(expected - other * (other @ expected))
    np.testing.assert_allclose(np.abs(hard.directions_[0] @ expected), 1, atol=1e-10)


def test_harm_cosine_is_the_cosine_of_the_mean_contrasts() -> None:
    activations, confidence, kinds, _ = labelled()
    fitted = SensitiveRidge(ridge=1e9).fit(activations, confidence, kinds=kinds)
    delta, harm = contrasts(activations, confidence, kinds, 1)
    assert fitted.contrast_cosine_[1] == pytest.approx(unit(delta) @ unit(harm), abs=1e-12)
    assert fitted.harm_cosine_[1] == pytest.approx(fitted.contrast_cosine_[1], abs=1e-6)
    assert np.isnan(MeanDifference().fit(activations, confidence).harm_cosine_).all()
    # Kinds are known, but no harmful sample is refused: there is no harmful contrast.
    none = np.where(np.array(kinds) == "harmful", -np.abs(confidence), confidence)
    without = MeanDifference().fit(activations, none, kinds=kinds)
    assert np.isnan([without.harm_cosine_, without.contrast_cosine_]).all()


# Equal rows up to float32 rounding, which depends on the other rows of a batch.
ROUNDED = 1 + 1e-7 * np.random.default_rng(3).standard_normal((240, 12))


@pytest.mark.parametrize("same", [np.ones((240, 12)), ROUNDED], ids=["same", "rounded"])
@pytest.mark.parametrize("kind", [*FIVE, *SAFE])
def test_a_layer_whose_classes_have_the_same_mean_has_no_direction(
    kind: type[DirectionEstimator], same: Float64
) -> None:
    activations, confidence, kinds, _ = labelled()
    fitted = kind().fit(activations, confidence, kinds=kinds)
    broken = kind().fit(np.insert(activations, 1, same, axis=1), confidence, kinds=kinds)
    assert not broken.directions_[1].any()
    np.testing.assert_array_equal(broken.directions_[[0, 2]], fitted.directions_)
    assert np.isnan([broken.harm_cosine_[1], broken.contrast_cosine_[1]]).all()
    assert np.isfinite(broken.offset_).all()


@pytest.mark.parametrize("kind", [SafeRidge, ResidualRidge])
def test_a_layer_whose_classes_differ_only_in_harm_has_no_direction(kind: type[DirectionEstimator]) -> None:
    activations, confidence, kinds, _ = labelled()
    rng = np.random.default_rng(7)
    # Two values, as if a layer sees only the last token; far from zero, as outlier dimensions are.
    one, other = 100 + rng.normal(size=(2, 12))
    two = np.where(rng.random(240)[:, None] < 0.5, one, other)
    options: dict[str, Any] = {"ridges": [1e-3, 1.0], "kinds": kinds}
    (fitted,) = fit_paths(activations, confidence, [kind()], **options)
    (path,) = fit_paths(np.insert(activations, 1, two, axis=1), confidence, [kind()], **options)
    assert not path.directions[:, 1].any()
    assert not path.ridges[:, 1].any()
    np.testing.assert_array_equal(path.directions[:, [0, 2]], fitted.directions)
    assert np.isnan([*path.harm_cosine[:, 1], path.contrast_cosine[1]]).all()
    with pytest.raises(InputError, match=f"{kind.name} has no direction at any layer.*must not respond"):
        kind().fit(two[:, None], confidence, kinds=kinds)


@pytest.mark.slow
def test_a_layer_without_a_direction_ends_no_fit_and_is_not_steered(tmp_path: Path) -> None:
    """LFM2 has such layers: its first convolutions see only the end of the chat template."""
    activations, confidence, kinds, _ = labelled()
    activations = np.insert(activations, 0, np.ones((2, 240, 12)), axis=1).astype(np.float32)
    prompts = [Prompt(str(i), kind) for i, kind in enumerate(kinds)]
    inputs = MatrixInputs(activations, activations[:8], activations[:0], activations[:2])
    recipe = Recipe(fit=Fit(estimators=["md", "wrmd"], ridges=[0.5], gate_ridges=[1.0]))
    fit(
        Samples(prompts, activations, confidence, {"ffn_down": inputs}, tmp_path),
        recipe.fit_options,
        tmp_path,
        advance=lambda _: None,
    )
    for row in json.loads((tmp_path / "fit.json").read_text())["directions"]:
        assert np.isfinite([row["score"], row["auroc"]]).all()
        assert row["auroc"][:2] == [0.5, 0.5]
        for cosines in (row["harm_cosine"], row["contrast_cosine"]):  # null: JSON has no NaN
            assert cosines[:2] == [None, None]
            assert np.isfinite(cosines[2:]).all()
    for directions in ControlVector().load(tmp_path, recipe.fit_options).values():
        whole = directions.steering(Candidate("vector", "md", 0.0, 1, 3, 6.0))
        alive = directions.steering(Candidate("vector", "md", 0.0, 2, 3, 6.0))
        assert list(whole) == list(alive) == [2, 3]
        for layer in whole:
            np.testing.assert_array_equal(whole[layer], alive[layer])
        assert directions.steering(Candidate("vector", "md", 0.0, 1, 1, 6.0)) == {}
    gates = GatedAdapter().load(tmp_path, recipe.fit_options)
    assert gates is not None
    assert list(gates.factors(1.0, 0, 3, 1.0)) == [f"blk.{n}.ffn_down.weight" for n in (2, 3)]


def test_safe_errors() -> None:
    activations, confidence, kinds, _ = labelled()
    with pytest.raises(InputError, match="no sample of kind 'harmful' is refused"):
        SafeRidge().fit(activations, confidence, kinds=np.where(kinds == "harmful", "benign", kinds))
    with pytest.raises(InputError, match="no sample of kind 'benign' is answered"):
        ResidualRidge().fit(activations, confidence, kinds=np.where(kinds == "benign", "sensitive", kinds))


# --- several processes -----------------------------------------------------------------------------------

WORKER = """
import sys
import numpy as np
import torch.distributed as dist
from rs_gguf.estimators.constrained import SafeRidge
from rs_gguf.estimators import RidgeMeanDifference, UncentredWeightedRidgeMeanDifference
from rs_gguf.estimators import WeightedMeanDifference, WeightedRidgeMeanDifference, fit_paths
from rs_gguf.estimators.labels import Mask
from rs_gguf.estimators.moments import Float64
from rs_gguf.machine import Processes
folder = sys.argv[1]
dist.init_process_group("gloo")
data = np.load(f"{folder}/in.npz")
share = slice(0, 97) if dist.get_rank() == 0 else slice(97, None)
estimators = [WeightedMeanDifference(), RidgeMeanDifference(), WeightedRidgeMeanDifference(), SafeRidge(),
              UncentredWeightedRidgeMeanDifference()]
for name in ("narrow", "wide"):
    activations, confidence, kinds = (data[key][share] for key in (name, "confidence", "kinds"))
    paths = fit_paths(activations, confidence, estimators, kinds=kinds, processes=Processes.joined())
    np.save(f"{folder}/{name}-{dist.get_rank()}.npy", np.stack([p.directions for p in paths]))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_directions_of_one(tmp_path: Path) -> None:
    narrow, confidence, kinds, _ = labelled()
    wide = labelled(width=150)[0]
    np.savez(tmp_path / "in.npz", narrow=narrow, wide=wide, confidence=confidence, kinds=kinds)
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "worker.py"), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    estimators = [WeightedMeanDifference(), RidgeMeanDifference(), WeightedRidgeMeanDifference(), SafeRidge()]
    estimators.append(UncentredWeightedRidgeMeanDifference())
    for name, activations in (("narrow", narrow), ("wide", wide)):
        one = np.stack([p.directions for p in fit_paths(activations, confidence, estimators, kinds=kinds)])
        first, second = (np.load(tmp_path / f"{name}-{rank}.npy") for rank in (0, 1))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one, atol=1e-12)
