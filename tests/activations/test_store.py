"""The activation store returns the written arrays, whatever stopped the writer, and detects damage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fixtures.full_disk import largest_file

from rs_gguf.activations.activations import Activations
from rs_gguf.activations.store import ActivationStore, DamagedStoreError
from rs_gguf.errors import InputError

COUNTS = {"00000": 5, "00001": 5, "00002": 3}


def arrays(shard: str) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(int(shard))
    n = COUNTS[shard]
    return {
        "activations": rng.standard_normal((n, 4, 6), dtype=np.float32),
        "ffn_down/last": rng.standard_normal((n, 4, 9)).astype(np.float16 if n == 5 else np.float32),
        "ffn_down/prompts": rng.standard_normal((7 if n == 3 else 0, 4, 9)).astype(np.float16),
    }


def ids(shard: str) -> list[str]:
    return [f"{shard}-{k}" for k in range(COUNTS[shard])]


def fill(store: ActivationStore, shards: list[str] | None = None) -> None:
    store.begin()
    for shard in shards or list(COUNTS):
        if not store.holds(shard, ids(shard)):
            store.append(shard, ids(shard), arrays(shard))


def rows(store: ActivationStore, name: str = "activations") -> Activations:
    return Activations([shard[name] for shard in store.read(list(COUNTS))])


def assert_whole(store: ActivationStore) -> None:
    np.testing.assert_array_equal(rows(store).array(store.folder), joined("activations"))


def joined(name: str) -> npt.NDArray[Any]:
    return np.concatenate([arrays(shard)[name] for shard in COUNTS])


def test_what_was_put_in_comes_back_in_order(tmp_path: Path) -> None:
    fill(ActivationStore(tmp_path, "k"))
    store = ActivationStore(tmp_path, "k")
    for name in arrays("00000"):
        stored, expected = rows(store, name), joined(name)
        assert (stored.shape, stored.dtype, len(stored)) == (expected.shape, expected.dtype, len(expected))
        np.testing.assert_array_equal(stored.array(tmp_path), expected)


def test_samples_and_layers_are_chosen_over_shards(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "k")
    fill(store)
    stored, expected = rows(store), joined("activations")
    picks: list[Any] = [
        slice(None), slice(3, 11), slice(12, 99), slice(0, 0), np.array([11, 0, 0, 5]), np.array([], np.intp),
        np.arange(13) % 3 == 1,
    ]  # fmt: skip
    for samples in picks:
        for layer in (0, 3):
            np.testing.assert_array_equal(stored.layer_rows(layer, samples).numpy(), expected[samples, layer])
        np.testing.assert_array_equal(stored.take(samples).array(tmp_path), expected[samples])
    twice = stored.take(np.array([12, 4, 4, 9])).take(slice(1, None))
    np.testing.assert_array_equal(twice.layer_rows(1, np.array([2, 0])).numpy(), expected[[9, 4], 1])
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith("tmp")]


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    fill(ActivationStore(tmp_path, "k"))
    header, *lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert json.loads(header) == {"key": "k"}
    first, _, last = map(json.loads, lines)
    assert first["sha256"] == hashlib.sha256((tmp_path / "00000.safetensors").read_bytes()).hexdigest()
    assert (first["layers"], first["ids"]) == (4, ids("00000"))
    assert first["dtypes"]["ffn_down/last"] == "float16"
    assert last["dtypes"]["ffn_down/last"] == "float32"


def test_a_manifest_torn_at_any_byte_loses_one_shard_at_most(tmp_path: Path) -> None:
    fill(ActivationStore(tmp_path, "k"))
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    start = whole.index(b"\n") + 1  # The first shard's line starts here; the header is written atomically.
    for size in range(start, len(whole), 17):
        manifest.write_bytes(whole[:size])
        store = ActivationStore(tmp_path, "k")
        kept = [shard for shard in COUNTS if store.holds(shard, ids(shard))]
        assert len(kept) >= whole[start:size].count(b"\n")
        fill(store)
        assert_whole(store)


WRITER = """
import os, sys
import numpy as np
import rs_gguf.activations.store as module
folder, moment = sys.argv[1:]
arrays = {"activations": np.ones((2, 4, 6), np.float32)}
store = module.ActivationStore(folder, "k")
store.begin()
if moment == "before the manifest":
    module.sha256 = lambda path: os.kill(os.getpid(), 9)
else:
    os.fsync = lambda handle: os.kill(os.getpid(), 9)
store.append("00001", ["a", "b"], arrays)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills itself by a signal")
@pytest.mark.parametrize("moment", ["in a shard", "before the manifest"])
def test_a_killed_writer_is_taken_over(tmp_path: Path, moment: str) -> None:
    fill(ActivationStore(tmp_path, "k"), ["00000"])
    command = [sys.executable, "-c", WRITER, str(tmp_path), moment]
    assert subprocess.run(command, check=False).returncode == -9
    drafts = list(tmp_path.glob(".0*"))
    assert len(drafts) == (moment == "in a shard")
    for draft in drafts:
        os.utime(draft, (0, 0))
    store = ActivationStore(tmp_path, "k")
    assert store.holds("00000", ids("00000"))
    assert not store.holds("00001", ["a", "b"])
    fill(store)
    assert_whole(store)
    assert not list(tmp_path.glob(".0*"))


def test_a_full_disk_is_one_error_and_the_store_goes_on(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "k")
    fill(store, ["00000"])
    with largest_file(512), pytest.raises(InputError, match=r"cannot write .*00001.safetensors.*Free space"):
        fill(store)
    # There is room for the shard, but only for a part of the manifest's line.
    sizes = [(tmp_path / name).stat().st_size for name in ("00000.safetensors", "manifest.jsonl")]
    many = [f"{k:064d}" for k in range(100)]
    with (
        largest_file(max(sizes) + 100),
        pytest.raises(InputError, match=r"cannot write .*manifest.*Free space"),
    ):
        store.append("00001", many, {"activations": np.zeros((1, 4, 6), np.float32)})
    assert not store.holds("00001", many)
    first = Activations([store.read(["00000"])[0]["activations"]])
    with largest_file(100), pytest.raises(InputError, match="Free space"):
        first.array(tmp_path)
    fill(store)
    assert_whole(store)


def test_a_shards_line_is_on_disk_once_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, synced = ActivationStore(tmp_path, "k"), []
    store.begin()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle)))
    store.append("00000", ids("00000"), arrays("00000"))
    manifest = (tmp_path / "manifest.jsonl").stat()
    assert [s.st_size for s in synced if os.path.samestat(s, manifest)] == [manifest.st_size]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
def test_damage_is_detected_by_reading_and_repaired_by_writing(tmp_path: Path, damage: str) -> None:
    store = ActivationStore(tmp_path, "k")
    fill(store)
    path = tmp_path / "00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1  # one bit of one number
    path.write_bytes(data[: -8 if damage == "cut" else None])
    if damage == "gone":
        path.unlink()
    if damage == "swapped":  # a valid shard under the name of another
        path.write_bytes((tmp_path / "00000.safetensors").read_bytes())
    with pytest.raises(DamagedStoreError, match=r"00001.safetensors is missing or was changed"):
        store.read(list(COUNTS))
    fill(store)
    assert_whole(store)


def test_a_store_of_other_prompts_is_not_taken(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "k")
    fill(store)
    assert not store.holds("00000", [*ids("00000")[:-1], "another"])
    assert not store.holds("00003", [])


def test_a_writer_whose_store_was_begun_anew_writes_nothing_into_it(tmp_path: Path) -> None:
    slow, other = ActivationStore(tmp_path, "one model"), ActivationStore(tmp_path, "another model")
    fill(slow, ["00000"])
    other.begin()
    with pytest.raises(DamagedStoreError, match="another recipe or model"):
        slow.append("00001", ids("00001"), arrays("00001"))
    assert not other.holds("00001", ids("00001"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_only_a_writer_clears_away_what_belongs_to_another_key(tmp_path: Path) -> None:
    old = ActivationStore(tmp_path, "old")
    fill(old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = ActivationStore(tmp_path, "new")
    with pytest.raises(DamagedStoreError, match="another recipe or model"):
        new.read(["00000"])
    assert not new.holds("00000", ids("00000"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_whole(old)
    new.begin()
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(DamagedStoreError, match="is missing"):
        new.read(["00000"])


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DamagedStoreError, match="is missing"):
        ActivationStore(tmp_path / "none", "k").read(["00000"])
    assert not (tmp_path / "none").exists()


def test_several_writers_share_a_store(tmp_path: Path) -> None:
    """Two open stores: neither deletes or overwrites the shards of the other."""
    one, two = ActivationStore(tmp_path, "k"), ActivationStore(tmp_path, "k")
    fill(one, ["00000"])
    fill(two, ["00002", "00001"])
    for store in (one, two):
        assert_whole(store)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot store activations"):
        ActivationStore(tmp_path / "file", "k").begin()
