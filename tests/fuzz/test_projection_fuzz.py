"""Compare the kernel with float64 NumPy for 5,000 random shapes, strides, alignments and types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rs_gguf.activations import projection
from rs_gguf.activations.projection import project

if projection.HAS_KERNEL:
    from rs_gguf import _core

    KERNELS = _core.kernels()
else:
    KERNELS = []

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KERNELS, reason="rs_gguf._core is not built")]

TOLERANCE = 1e-6


@settings(max_examples=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_stride(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = data.draw
    monkeypatch.setenv("RS_GGUF_KERNEL", draw(st.sampled_from(KERNELS), "kernel"))
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]), "dtype")
    n, layers = draw(st.integers(0, 30), "N"), draw(st.integers(0, 5), "L")
    k, d = draw(st.integers(0, 40), "K"), draw(st.integers(0, 200), "D")
    step_n, step_l = draw(st.sampled_from([-2, -1, 1, 3])), draw(st.sampled_from([-2, -1, 1, 3]))
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    shift = draw(st.integers(0, 3), "shift in bytes")
    layers_first = draw(st.booleans(), "layers first in memory")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))

    rows, columns = n * abs(step_n), layers * abs(step_l)
    full = (columns, rows) if layers_first else (rows, columns)
    stored = rng.standard_normal((*full, before + d + after)).astype(dtype)
    memory = np.frombuffer(b"\0" * shift + stored.tobytes() + b"\0", np.uint8)[shift:-1]
    stored = memory.view(dtype).reshape(stored.shape)
    if layers_first:
        stored = stored.transpose(1, 0, 2)
    h = stored[::step_n, ::step_l, before : before + d]
    v = rng.standard_normal((layers, k, d)).astype(np.float32)
    o = rng.standard_normal((layers, d)).astype(np.float32) if draw(st.booleans(), "offset") else None

    result = project(h, v, o)

    wide = h.astype(np.float64) - (0 if o is None else o.astype(np.float64))
    expected = np.einsum("nld,lkd->nlk", wide, v.astype(np.float64))
    scale = np.einsum("nld,lkd->nlk", np.abs(wide), np.abs(v).astype(np.float64))
    assert result.shape == (n, layers, k)
    assert np.all(np.abs(result - expected) <= TOLERANCE * scale)
