"""`on_all_cores` keeps order, errors and the number of threads; systems other than Linux get a warning."""

from __future__ import annotations

import os
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf import machine
from rs_gguf.cli.main import main
from rs_gguf.machine import ALONE, Processes, on_all_cores, one_thread
from rs_gguf.steering import vector_file
from rs_gguf.steering.vector import SteeringVector


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    """Return the number of threads that torch uses in a new thread: the setting of the process."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_each_made_on_one_thread(workers: int) -> None:
    found = list(on_all_cores(lambda k: (k, torch.get_num_threads()), range(20), workers=workers))
    assert found == [(k, 1) for k in range(20)]
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_the_first_error_is_raised_and_the_threads_come_back(workers: int) -> None:
    def work(k: int) -> int:
        if k >= 4:
            raise ValueError(f"item {k}")
        return k

    results = on_all_cores(work, range(9), workers=workers)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_what_was_not_begun_is_dropped_when_nobody_waits_for_it() -> None:
    begun, going = [], threading.Event()

    def work(k: int) -> int:
        begun.append(k)
        if k:
            going.wait(30)
        return k

    results = on_all_cores(work, range(100), workers=2)
    assert next(results) == 0
    threading.Timer(0.1, going.set).start()
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 100
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_one_thread_holds_within_the_block_alone() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (2, 5), (0, 3), (64, 4)])
def test_shares_follow_one_another_and_leave_nothing_out(count: int, ranks: int) -> None:
    items = list(range(count))
    shares = [items[Processes(rank, ranks).share(count)] for rank in range(ranks)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert items[ALONE.share(count)] == items


# ---- systems that lack what Linux has ----------------------------------------------------------------

ROOT = Path(__file__).parents[1]
# macOS has a module `resource` too, but does not heed its limits of memory.
LINUX_ONLY = re.compile(
    r"sched_[gs]etaffinity|/proc\b|/sys\b|import resource\b|RLIMIT|prctl|os\.fork\b|memfd_create|fadvise"
    r"|\.so\b|\blibc\b|\bnproc\b"
)
GNU_ONLY = re.compile(
    r"\b(nproc|tac|readlink -f|realpath|sed -i(?!\.)|sed -r|grep -\w*P|xargs -r|date -d|stat -c|sha256sum)\b"
)


def test_only_one_module_depends_on_linux() -> None:
    modules = [*(ROOT / "rs_gguf").rglob("*.py")]
    found = [path.name for path in modules if LINUX_ONLY.search(path.read_text(encoding="utf-8"))]
    assert found == ["machine.py"]


def test_make_needs_no_tool_of_gnu_but_itself() -> None:
    assert [GNU_ONLY.search(text) is None for text in ("sed -i.bak s#a#b#", "sed -i s#a#b#")] == [True, False]
    assert GNU_ONLY.search((ROOT / "Makefile").read_text(encoding="utf-8")) is None


@pytest.fixture
def without_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away core affinity, `/proc` and control groups, as on macOS."""
    for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.free_memory, "__defaults__", (tmp_path / "root",))
    machine._warn.cache_clear()


@pytest.mark.usefixtures("without_linux")
def test_without_affinity_and_proc_one_warning_says_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert machine.usable_cores() == machine.layers_at_once(896) == 2
    assert machine.free_memory() == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "all 2 are used" in messages[0]
    assert "models are mapped" in messages[1]


@pytest.mark.usefixtures("without_linux")
def test_a_command_runs_a_model_without_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[int] = []
    load = llama_cpp.llama_model_load_from_file

    def kept(path: bytes, params: llama_cpp.llama_model_params) -> object:
        modes.append(params.load_mode)
        return load(path, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", kept)
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    vector_file.write(SteeringVector({1: np.ones(32, np.float32)}, {}, "qwen2"), tmp_path / "v.gguf")
    command = ["check", str(tmp_path / "v.gguf"), "--model", str(tmp_path / "tiny.gguf"), "-c", "512"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert modes == [llama_cpp.LLAMA_LOAD_MODE_AUTO]
    assert "models are mapped" in caplog.text
    assert "all 2 are used" in caplog.text


def test_a_benchmark_of_memory_says_that_it_needs_linux(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and path.parts[1] != "proc")
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    runpy.run_path(str(ROOT / "benchmarks" / "memory.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("Not measured")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "400000 100000", "cpu.max of the group": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": "0"}, 8),
        ({}, 8),
    ],
)
def test_a_container_uses_the_cores_of_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], cores: int
) -> None:
    files = {"proc/self/cgroup": "0::/group\n"}
    places = {"cpu.max": "sys/fs/cgroup/cpu.max", "cpu.max of the group": "sys/fs/cgroup/group/cpu.max"}
    for name, text in {**files, **{places[name]: text for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "_quota", machine._quota.__wrapped__)
    monkeypatch.setattr(machine._quota, "__defaults__", (tmp_path,))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.usable_cores() == cores
