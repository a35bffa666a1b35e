"""Test what methods read from samples of the fit split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.fit_samples import samples_in

from rs_gguf.methods import samples as samples_module


def test_activations_are_copied_to_a_gpu_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_in(tmp_path)
    assert samples.rows_on("cpu") is samples.rows
    copies: list[object] = []

    def copy(rows: np.ndarray, device: str) -> object:
        copies.append(rows)
        return object()

    monkeypatch.setattr(samples_module, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch, "tensor", copy)
    assert samples.rows_on("cuda") is samples.rows_on("auto")
    assert len(copies) == 1
