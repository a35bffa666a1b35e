"""What the machine gives this process: cores, free memory, and one thread where sums must not vary."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Those that its affinity allows, where the system knows one; else all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that Linux can give this process now, at most what its control groups may have; elsewhere 0."""
    try:
        told = (root / "proc/meminfo").read_text()
        group = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return 0
    free = re.search(r"MemAvailable: +(\d+) kB", told)
    rooms = [int(free[1]) * 1024] if free else [0]
    groups = root / "sys/fs/cgroup"
    own = groups / group
    limits = [folder / "memory.max" for folder in (own, *own.parents) if folder.is_relative_to(groups)]
    for limit in (*limits, groups / "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            rooms.append(int(limit.read_text()))
    return min(rooms)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS use one thread: the order of its sums, and so their last digits, follow the thread count."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield
