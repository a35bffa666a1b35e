"""The projection kernel against float64 NumPy: types, shapes, strides, alignment, special values, threads.

Tolerance 1e−6 · Σ|h − o||v|: float32 sums by lanes, runs and chunks keep it under any cancellation, unless
the data are made to break them. Every test that computes runs on every SIMD target of this CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import roc_auc_score

from rs_gguf.activations import projection
from rs_gguf.activations.fallback import statistics, torch_layers, torch_projections
from rs_gguf.activations.projection import (
    ProjectionStatistics,
    SlowProjectionWarning,
    project,
    project_statistics,
)
from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores

if projection.HAS_KERNEL:
    from rs_gguf import _core

    KERNELS = _core.kernels()
else:
    KERNELS = []


def by_numpy(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the result of `call` without the compiled kernel: the reference, with sums in float64."""

    def called(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowProjectionWarning)
            patch.setattr(projection, "HAS_KERNEL", False)
            return call(*arguments, **options)

    return called


project_reference = by_numpy(project)
project_statistics_reference = by_numpy(project_statistics)

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
TOLERANCE = 1e-6

needs_kernel = pytest.mark.skipif(not KERNELS, reason="rs_gguf._core is not built")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RS_GGUF_KERNEL", request.param)
    assert _core.kernel() == request.param
    return str(request.param)


def case(
    n: int, layers: int, k: int, d: int, dtype: Any = np.float32, seed: int = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, layers, d)).astype(dtype),
        rng.standard_normal((layers, k, d)).astype(np.float32),
        rng.standard_normal((layers, d)).astype(np.float32),
    )


def assert_close(result: npt.NDArray[Any], h: npt.NDArray[Any], v: Any, o: Any = None) -> None:
    """Assert that the result is within TOLERANCE of a float64 sum that shares no code with the package."""
    wide = h.astype(np.float64) - (0 if o is None else o.astype(np.float64))
    expected = np.einsum("nld,lkd->nlk", wide, v.astype(np.float64))
    scale = np.einsum("nld,lkd->nlk", np.abs(wide), np.abs(v).astype(np.float64))
    assert result.shape == expected.shape
    assert result.dtype == np.float32
    assert np.all(np.abs(result - expected) <= TOLERANCE * scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [1, 3, 896, 4095, 16384])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 13, 17, 33, 64])
def test_every_width_rank_and_type(kernel: str, dtype: Any, d: int, k: int) -> None:
    h, v, o = case(5, 2, k, d, dtype, seed=d + k)
    assert_close(project(h, v), h, v)
    assert_close(project(h, v, o), h, v, o)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 9, 11, 12, 13, 48, 49, 97])
def test_every_number_of_rows(kernel: str, n: int) -> None:
    for k in (1, 5, 17, 40):
        h, v, o = case(n, 3, k, 130, np.float16, seed=n)
        assert_close(project(h, v, o), h, v, o)


@pytest.mark.parametrize("shape", [(3, 0, 2, 8), (3, 2, 0, 8), (3, 2, 2, 0), (0, 0, 0, 0)])
def test_empty_axes(kernel: str, shape: tuple[int, int, int, int]) -> None:
    h, v, o = case(*shape)
    result = project(h, v, o)
    assert result.shape == shape[:3]
    assert not result.any()


@pytest.mark.parametrize("shape", [(5, 2, 0, 7), (5, 0, 3, 7)])
def test_statistics_of_no_direction_or_layer(kernel: str, shape: tuple[int, int, int, int]) -> None:
    h, v, o = case(*shape)
    figures = project_statistics(h, v, np.linspace(-1, 1, 5), o)
    assert all(values.shape == shape[1:3] for values in vars(figures).values())


def test_positive_data_keeps_the_relative_error(kernel: str) -> None:
    # Terms do not cancel: the sums grow to the size of 16,384 terms, and one running float32 sum would drift.
    rng = np.random.default_rng(3)
    h = rng.uniform(0.5, 1.5, (3, 1, 16384)).astype(np.float32)
    for k in (9, 40):
        v = rng.uniform(0.5, 1.5, (1, k, 16384)).astype(np.float32)
        expected = np.einsum("nld,lkd->nlk", h.astype(np.float64), v.astype(np.float64))
        np.testing.assert_allclose(project(h, v), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [896, 4095, 16384])
def test_rows_of_equal_numbers(kernel: str, dtype: Any, d: int) -> None:
    # Rounding errors then keep one sign and add up: one running sum per lane would be wrong by 4e−6.
    rng = np.random.default_rng(d)
    h = np.repeat(rng.uniform(0.5, 1, (40, 1, 1)), d, axis=2).astype(dtype)
    o = np.full((1, d), 0.1, np.float32)
    for k in (1, 8, 20):
        v = np.repeat(rng.uniform(0.5, 1, (1, k, 1)), d, axis=2).astype(np.float32)
        assert_close(project(h, v), h, v)
        assert_close(project(h, v, o), h, v, o)


@pytest.mark.parametrize("d", [64, 512, 4096, 16384])
def test_the_promise_holds_where_small_terms_are_lost(kernel: str, d: int) -> None:
    # A term below half a unit in the last place of its lane's sum is lost: the worst case of rounding.
    h = np.full((3, 1, d), 0.99 * 2.0**-24, np.float32)
    h[:, :, :16] = 1
    expected = h.astype(np.float64).sum(axis=2)[:, :, None]
    for k in (1, 8, 20):
        result = project(h, np.ones((1, k, d), np.float32))
        assert np.all(np.abs(result - expected) <= (44 + d / 512) * 2.0**-24 * expected)


def test_offset_is_subtracted_before_the_sum(kernel: str) -> None:
    # h is close to o and both are far from the origin: ⟨h, v⟩ − ⟨o, v⟩ would keep about two digits here.
    for k in (9, 40):
        h, v, o = case(7, 2, k, 896)
        o = np.float32(10_000) + o
        h = (o + h).astype(np.float32)
        assert_close(project(h, v, o), h, v, o)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_stride_of_samples_and_layers(kernel: str, dtype: Any) -> None:
    h, v, o = case(12, 6, 3, 40, dtype)
    views = [
        (h[::2], slice(None)),
        (h[::-1], slice(None)),
        (h[:, ::-2], slice(None, None, -2)),
        (h[:, 1:5], slice(1, 5)),
        (h.transpose(1, 0, 2).copy().transpose(1, 0, 2), slice(None)),
        (np.broadcast_to(h[:1], h.shape), slice(None)),
        (np.broadcast_to(h[:, :1], h.shape), slice(None)),
    ]
    for view, layers in views:
        assert_close(project(view, v[layers], o[layers]), view, v[layers], o[layers])
    with_wider_rows = np.zeros((12, 6, 55), dtype)
    with_wider_rows[:, :, 7:47] = h
    assert_close(project(with_wider_rows[:, :, 7:47], v, o), h, v, o)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned_pointers(kernel: str, dtype: Any, shift: int) -> None:
    h, v, _ = case(6, 2, 7, 101, dtype)
    memory = np.frombuffer(b"\0" * shift + h.tobytes(), np.uint8)[shift:]
    unaligned = memory.view(dtype).reshape(h.shape)
    assert shift % h.itemsize == 0 or not unaligned.flags.aligned or dtype is ml_dtypes.bfloat16
    assert_close(project(unaligned, v), h, v)


def test_memory_map(kernel: str, tmp_path: Path) -> None:
    h, v, o = case(9, 3, 2, 64, np.float16)
    np.save(tmp_path / "h.npy", h)
    mapped = np.load(tmp_path / "h.npy", mmap_mode="r")
    assert_close(project(mapped, v, o), h, v, o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors(kernel: str, dtype: torch.dtype) -> None:
    h, v, o = case(9, 3, 2, 65)
    tensor = torch.from_numpy(h).to(dtype).requires_grad_()
    expected = tensor.detach().double().numpy()
    assert_close(project(tensor, torch.from_numpy(v), torch.from_numpy(o)), expected, v, o)
    swapped = torch.from_numpy(h.transpose(1, 0, 2).copy()).to(dtype).transpose(0, 1)
    assert_close(project(swapped, v.astype(np.float64)), expected, v)


def test_activations_are_not_copied() -> None:
    for h in (np.zeros((2, 2, 4), ml_dtypes.bfloat16), np.zeros((4, 2, 4), np.float16)[::-2]):
        assert np.shares_memory(projection._as_array(h), h)
    tensor = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    assert projection._as_array(tensor).ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3, 4).to_sparse(), torch.zeros(2, 3, 4).double()])
def test_tensors_that_cannot_be_read_in_place_are_errors(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"^activations: expected .*, got torch\.(sparse_coo|float64): "):
        project(tensor, np.zeros((3, 1, 4), np.float32))


@pytest.mark.parametrize("dtype", TYPES)
def test_strided_views_are_shared_among_threads(kernel: str, dtype: Any) -> None:
    h, v, o = case(406, 10, 8, 896, dtype)
    h, v, o = h[::-2, ::-2], v[::2], o[::2]
    single = project(h, v, o, threads=1)
    assert_close(single, h, v, o)
    for threads in (2, 3):
        np.testing.assert_array_equal(project(h, v, o, threads=threads), single)


@pytest.mark.parametrize("dtype", TYPES)
def test_denormals(kernel: str, dtype: Any) -> None:
    tiny = {np.float32: np.float32(1e-42), np.float16: np.float16(3e-7), ml_dtypes.bfloat16: 1e-39}[dtype]
    h = np.full((3, 1, 37), tiny, dtype)
    for k in (7, 20):
        v = np.full((1, k, 37), 2.0**20, np.float32)
        expected = np.full((3, 1, k), float(h[0, 0, 0]) * 2.0**20 * 37)
        np.testing.assert_allclose(project(h, v), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_infinities_and_nan_propagate_and_stay_in_their_row(kernel: str, dtype: Any, k: int) -> None:
    h, v, o = case(9, 2, k, 45, dtype)
    h[1, 0, 44] = np.nan
    h[2, 1, 0] = np.inf
    h[3, 0, 17] = -np.inf
    h[4, 0, 3], h[4, 0, 40] = np.inf, -np.inf
    v[:, :, [3, 17, 40]] = 1
    v[:, :, 0] = 0
    for offset in (None, o):
        result = project(h, v, offset)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(np.isnan(result), np.isnan(project_reference(h, v, offset)))
        assert np.isnan(result[1, 0]).all()
        assert np.isnan(result[2, 1]).all()  # Inf · 0
        assert (result[3, 0] == -np.inf).all()
        assert np.isnan(result[4, 0]).all()
        assert np.isfinite(result[[0, 5, 6, 7, 8]]).all()
        assert np.isfinite(result[[1, 3, 4], 1]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_pattern(kernel: str, dtype: Any) -> None:
    h = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 1, 1)
    result = project(h, np.ones((1, 1, 1), np.float32))
    np.testing.assert_array_equal(result, h.astype(np.float32))


@needs_kernel
def test_targets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    h, v, o = case(40, 3, 21, 333, ml_dtypes.bfloat16)
    scale = np.einsum("nld,lkd->nlk", np.abs(h.astype(np.float64) - o), np.abs(v))
    results = []
    for name in KERNELS:
        monkeypatch.setenv("RS_GGUF_KERNEL", name)
        results.append(project(h, v, o))
    for result in results[1:]:
        assert np.all(np.abs(result - results[0]) <= TOLERANCE * scale)


def test_threads_do_not_change_a_bit(kernel: str) -> None:
    h, v, o = case(203, 5, 600, 896)  # enough work for eight threads
    alone = project(h, v, o, threads=1)
    for threads in (2, 3, 17, None):
        np.testing.assert_array_equal(project(h, v, o, threads=threads), alone)


def test_two_callers_at_once(kernel: str) -> None:
    cases = [case(150, 4, k, 700, seed=k) for k in (350, 390)]  # each with enough work for two threads
    expected = [project(*c, threads=1) for c in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(5):
            if not np.array_equal(project(*cases[i], threads=2), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in (0, 1, 0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


CORES = """
import os
import numpy as np
from rs_gguf.activations.projection import project
h, v = np.ones((200, 4, 896), np.float32), np.ones((4, 200, 896), np.float32)
before = set(os.listdir("/proc/self/task"))
project(h, v, threads=2)
(worker,) = set(os.listdir("/proc/self/task")) - before
usable = os.sched_getaffinity(0)
allowed = os.sched_getaffinity(int(worker))
assert allowed < usable and len(allowed) == len(usable) - 1, (allowed, usable)
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux" or usable_cores() < 2, reason="needs Linux, two cores")
def test_a_worker_is_kept_off_the_callers_core() -> None:
    subprocess.run([sys.executable, "-c", CORES], check=True)


FORK = """
import os, sys
import numpy as np
from rs_gguf.activations.projection import project
h, v = np.ones((200, 4, 896), np.float32), np.ones((4, 200, 896), np.float32)
assert (project(h, v, threads=2) == 896).all()
child = os.fork()
if child == 0:
    os._exit(0 if (project(h, v, threads=2) == 896).all() else 1)
assert (project(h, v, threads=2) == 896).all()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_projects() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], env=env, timeout=60, check=False
    )
    assert done.returncode == 0


def refuse(message: str, h: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        project(h, *args, **options)


def test_errors_name_the_argument() -> None:
    h, v, o = case(4, 3, 2, 8)
    refuse(r"activations: expected a NumPy array .* got list", [[1.0]], v)
    refuse(r"activations: expected float32, .* got float64", h.astype(np.float64), v)
    refuse(r"activations: expected float32, .* got uint16", h.astype(np.uint16), v)
    refuse(r"activations: expected float32, .* got >f4", h.astype(">f4"), v)
    refuse(r"activations: expected float32, .* got torch.int64", torch.zeros(1, 1, 1, dtype=torch.int64), v)
    refuse(r"activations: expected shape \[N, L, D\], got \[4, 8\]", h[:, 0], v)
    refuse(r"activations: the last axis must be contiguous", h[:, :, ::2], v[:, :, ::2])
    refuse(
        r"activations: expected a tensor on the CPU or a CUDA device, got one on meta",
        torch.zeros(4, 3, 8, device="meta"),
        v,
    )
    refuse(r"directions: expected shape \[L, K, D\] = \[3, K, 8\].* got \[3, 2, 7\]", h, v[:, :, :7])
    refuse(r"directions: .* got \[2, 2, 8\]", h, v[:2])
    refuse(r"directions: .* give directions\[:, None\]", h, v[:, 0])
    refuse(r"directions: expected an array of numbers", h, "north")
    refuse(r"offset: expected shape \[L, D\] = \[3, 8\], got \[8\]", h, v, o[0])
    for threads in (0, -1, 1.5, True):
        refuse(r"threads: expected a whole number", h, v, threads=threads)


@needs_kernel
def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_GGUF_KERNEL", "abacus")
    refuse(r"RS_GGUF_KERNEL: this machine runs scalar.*, got abacus", *case(1, 1, 1, 1))


@needs_kernel
def test_the_binding_checks_its_arguments() -> None:
    h, v, o = case(4, 3, 2, 8)
    with pytest.raises(ValueError, match=r"directions: expected shape \[3, 2, 8\], got \[3, 2, 7\]"):
        _core.project(h, v[:, :, :7], threads=1)
    with pytest.raises(ValueError, match=r"offset: expected shape \[3, 8\]"):
        _core.project(h, v, o[:2], threads=1)
    with pytest.raises(ValueError, match="last axis must be contiguous"):
        _core.project(h[:, :, ::2], v[:, :, ::2], threads=1)
    with pytest.raises(ValueError, match="threads: expected 1 or more, got 0"):
        _core.project(h, v, threads=0)
    with pytest.raises(TypeError, match=r"activations: expected float32.*got float64"):
        _core.project(h.astype(np.float64), v, threads=1)
    with pytest.raises(ValueError, match=r"weights: expected shape \[4\], got \[3\]"):
        _core.statistics(h, v, np.zeros(4), np.ones(3), neutral=0.1, quantile=0.9, threads=1)


@pytest.mark.slow
@needs_kernel
def test_the_stub_describes_the_binary(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n")  # the package itself takes minutes
    checked = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "rs_gguf._core", "--mypy-config-file", tmp_path / "mypy.ini"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_without_the_kernel_numpy_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "HAS_KERNEL", False)
    monkeypatch.setattr(projection, "_warned", False)
    h, v, o = case(5, 2, 3, 33, ml_dtypes.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(project(h, v, o), h, v, o)
        project_statistics(h, v, np.linspace(-1, 1, 5), o)
    assert [warning.category for warning in caught] == [SlowProjectionWarning]
    assert "Install a C++17 compiler" in str(caught[0].message)
    # Without this option pip would install the cached wheel, which has no kernel, again.
    assert "--no-cache-dir" in str(caught[0].message)
    assert caught[0].filename == __file__


# --- statistics ---


def statistics_case(
    n: int = 200, seed: int = 5
) -> tuple[npt.NDArray[Any], Any, npt.NDArray[np.float64], Any, npt.NDArray[np.float64]]:
    h, v, o = case(n, 3, 4, 65, np.float16, seed)
    rng = np.random.default_rng(seed)
    c = rng.uniform(-1, 1, n)
    c[: n // 10] = 0
    return h, v, c, o, rng.uniform(0, 2, n)


def test_pytorch_projects_as_the_kernel_does(kernel: str) -> None:
    """The GPU code, here on the CPU, agrees to 1e−6 of the sum of absolute terms."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        h, v, o = case(33, 3, 4, 97, np.float32)
        tensor = torch.from_numpy(h).to(dtype)
        for offset in (None, o):
            projections = torch_projections(tensor, v, offset)
            assert projections.dtype == np.float32
            centred = tensor.double().numpy() - (0 if offset is None else offset)
            scale = np.einsum("nld,lkd->nlk", np.abs(centred), np.abs(v))
            assert (np.abs(projections - project(tensor, v, offset)) <= 1e-6 * scale).all()
    h, v, c, o, w = statistics_case()
    figures = statistics(torch_layers(torch.from_numpy(h), v, o), v.shape[:2], c, w, 0.15, 0.95)
    assert_same_figures(ProjectionStatistics(**figures), project_statistics(h, v, c, o, weights=w))


def assert_same_figures(a: ProjectionStatistics, b: ProjectionStatistics) -> None:
    for name, figure in vars(a).items():
        # Both use float32 projections, which may differ by 1e−6 of their scale (about 10 here).
        np.testing.assert_allclose(figure, getattr(b, name), rtol=1e-5, atol=1e-5, err_msg=name)
        assert figure.dtype == np.float64


def test_statistics_match_numpy(kernel: str) -> None:
    h, v, c, o, w = statistics_case()
    for options in ({}, {"offset": o}, {"weights": w}, {"offset": o, "weights": w, "neutral": 0.5}):
        options = {**options, "quantile": 0.9}
        assert_same_figures(
            project_statistics(h, v, c, **options), project_statistics_reference(h, v, c, **options)
        )


def test_statistics_by_their_definitions(kernel: str) -> None:
    h, v, c, o, _ = statistics_case()
    figures = project_statistics(h, v, c, o, threads=3)
    p = np.einsum("nld,lkd->nlk", h.astype(np.float64) - o, v.astype(np.float64))
    for layer in range(3):
        for k in range(4):
            x = p[:, layer, k]
            wrong = np.sign(x) != np.sign(c)
            expected = {
                "pearson": np.corrcoef(x, c)[0, 1],
                "disagreement": np.sqrt(np.mean((x - c)[wrong] ** 2)),
                "auroc": roc_auc_score(c[np.abs(c) > 0.15] > 0, x[np.abs(c) > 0.15]),
                "upper": np.quantile(x[c > 0], 0.95),
                "lower": np.quantile(x[c < 0], 0.05),
            }
            for name, value in expected.items():
                assert getattr(figures, name)[layer, k] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_whole_weights_are_repetitions(kernel: str) -> None:
    h, v, c, o, _ = statistics_case(40)
    times = np.random.default_rng(0).integers(0, 4, 40)
    weighted = project_statistics(h, v, c, o, weights=times)
    repeated = project_statistics(np.repeat(h, times, axis=0), v, np.repeat(c, times), o)
    for name in ("pearson", "disagreement"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9)


def test_what_varies_without_weight_does_not_vary(kernel: str) -> None:
    h, v, _, o, _ = statistics_case(4)
    h[:3] = h[0]
    c, w = np.array([0.3, 0.3, 0.3, -0.5]), np.array([0.1, 0.1, 0.1, 0.0])
    for call in (project_statistics, project_statistics_reference):
        assert np.isnan(call(h, v, c, o, weights=w).pearson).all()
        one_varies = call(h, v, c, o, weights=np.full(4, 0.1))
        assert np.isfinite(one_varies.pearson).all()


def test_figures_without_meaning_are_nan(kernel: str) -> None:
    h, v, c, _, _ = statistics_case(20)
    refused_only = project_statistics(h, v, np.full(20, 0.5))
    assert np.isnan(refused_only.pearson).all()  # c does not vary
    assert np.isnan(refused_only.auroc).all()
    assert np.isnan(refused_only.lower).all()
    assert np.isfinite(refused_only.upper).all()
    nothing = project_statistics(h[:0], v, c[:0])
    assert np.isnan(nothing.pearson).all()
    assert not nothing.disagreement.any()
    agreeing = project_statistics(np.ones((20, 3, 65), np.float16), np.ones_like(v), np.abs(c) + 1e-3)
    assert not agreeing.disagreement.any()


def test_ties_and_constants(kernel: str) -> None:
    # h has few distinct values, so projections on one axis tie across the classes; layer 1 is constant.
    rng = np.random.default_rng(1)
    c = rng.choice([-0.9, -0.1, 0.7], 50)
    h = np.stack([rng.integers(0, 3, (50, 5)), np.full((50, 5), 0.1)], axis=1).astype(np.float32)
    v = np.zeros((2, 1, 5), np.float32)
    v[:, 0, 2] = 0.1
    figures = project_statistics(h, v, c)
    used = np.abs(c) > 0.15
    assert figures.auroc[0, 0] == pytest.approx(roc_auc_score(c[used] > 0, h[used, 0, 2]), abs=1e-12)
    assert figures.auroc[1, 0] == 0.5
    assert np.isnan(figures.pearson[1, 0])
    assert_same_figures(figures, project_statistics_reference(h, v, c))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_statistics_of_what_is_not_finite_are_refused(kernel: str, value: float) -> None:
    h, v, c, o, _ = statistics_case(20)
    h[7, 1, 3] = value
    for call in (project_statistics, project_statistics_reference):
        with pytest.raises(InputError, match="projections of layer 1 hold NaN or Inf"):
            call(h, v, c, o)


def test_statistics_errors_name_the_argument() -> None:
    h, v, c, _, w = statistics_case(20)
    for message, args, options in (
        (r"confidence: expected shape \[N\] = \[20\] as in activations, got \[19\]", (c[1:],), {}),
        (r"confidence: expected numbers from −1 to 1, got 2", (np.full(20, 2.0),), {}),
        (r"confidence: expected numbers from −1 to 1, got nan", (np.full(20, np.nan),), {}),
        (r"weights: expected shape \[N\] = \[20\] as in activations, got \[3\]", (c,), {"weights": w[:3]}),
        (r"weights: expected finite numbers of at least 0, got -1", (c,), {"weights": -np.ones(20)}),
        (r"neutral: expected 0 to 1, got -0.1", (c,), {"neutral": -0.1}),
        (r"quantile: expected 0 to 1, got 95", (c,), {"quantile": 95}),
    ):
        with pytest.raises(InputError, match=message):
            project_statistics(h, v, *args, **options)
