"""A scan on the real model finds its published file; damaged and wrong copies of the model are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from rs_gguf.errors import InputError
from rs_gguf.pipeline.scan import scan
from rs_gguf.records.rows import read_json

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PARTS = 8
# As of Llama 2.
OTHER_TEMPLATE = "{% for m in messages %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"


def test_a_scan_finds_refusals_and_the_published_file(real_model: Path) -> None:
    record = scan(str(real_model), tokens=24)
    folder = ROOT / "vectors" / "qwen2.5-coder-0.5b-remove"
    assert record.model.sha256 == read_json(folder / "metrics.json")["model"]["sha256"]
    assert f"vectors/{folder.name}/remove-adapter.gguf" in [file.path for file in record.files]
    for file in record.files:
        assert (ROOT / file.path).is_file()
    explicit = {kind: one.outcomes.explicit for kind, one in record.sets.items()}
    assert explicit["sensitive"] >= 2
    assert explicit["harmful"] >= 4
    assert record.sets["benign"].outcomes.complies >= 10
    assert record.examples[0].kind == "sensitive"
    assert record.run is not None
    assert 60 < record.run.seconds < 24 * 3600


def test_a_damaged_copy_is_refused(real_model: Path, tmp_path: Path) -> None:
    """The bytes of every fourth matrix of feed-forward outputs are shuffled, scales of blocks included."""
    damaged = tmp_path / "damaged.gguf"
    shutil.copy(real_model, damaged)
    data = np.memmap(damaged, dtype=np.uint8, mode="r+")
    rng = np.random.default_rng(0)
    for tensor in [t for t in GGUFReader(real_model).tensors if t.name.endswith("ffn_down.weight")][::4]:
        part = data[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
        part[:] = rng.permutation(part)
    data.flush()
    with pytest.raises(InputError, match="the model cannot answer"):
        scan(str(damaged))


def test_a_copy_joined_in_the_wrong_order_is_refused(real_model: Path, tmp_path: Path) -> None:
    whole = real_model.read_bytes()
    size = -(-len(whole) // PARTS)
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    parts[5:7] = reversed(parts[5:7])
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(parts))
    with pytest.raises(InputError, match="the model cannot answer"):
        scan(str(joined))


def test_a_copy_with_the_template_of_another_family_is_refused(real_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", OTHER_TEMPLATE]
    subprocess.run([*command, str(real_model), str(other)], check=True, capture_output=True)
    with pytest.raises(InputError, match="the model cannot answer"):
        scan(str(other))
