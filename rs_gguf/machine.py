"""Cores and memory that this process may use, threads, and the processes that share a run (`Processes`)."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from threadpoolctl import threadpool_limits

from rs_gguf.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
"""Where a fit computes; `auto` is CUDA if PyTorch sees a CUDA device, else the CPU."""

_log = logging.getLogger("rs_gguf.machine")

T = TypeVar("T")
Item = TypeVar("Item")

# The other ranks wait while rank 0 answers, judges or searches alone. torch's default is 30 minutes.
_TIMEOUT = timedelta(days=30)

_MATRICES = 4  # float64 matrices [width, width] that the fit of one layer holds at its peak


def usable_cores() -> int:
    """Return how many cores this process may use, shared with the ranks on this machine.

    A control group may give it the time of fewer cores than its affinity has: containers have such quotas.
    Where the system reports no affinity, as macOS does not, return all cores, with one warning.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = math.ceil(min(len(os.sched_getaffinity(0)), _quota()))
    else:
        cores = os.cpu_count() or 1
        _warn(f"This system does not report which cores a process may use: all {cores} are used.")
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache  # a projection asks for the cores at every call
def _quota(root: Path = Path("/")) -> float:
    """Return the cores whose time the control groups of this process give it; infinity without a limit."""
    least = math.inf
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max": no limit
            time, period = (folder / "cpu.max").read_text().split()
            least = min(least, int(time) / int(period))
    return least


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of this process's control group and of those around it, innermost first."""
    try:
        group = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return []
    groups = root / "sys/fs/cgroup"
    own = groups / group
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(groups)]


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that Linux can give this process now, within its control groups.

    0 means unknown, with one warning: another system, or a /proc that cannot be read.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        _warn(
            "This system does not report its free memory as Linux does: models are mapped and not read, and "
            "the fit uses all cores. If memory runs out, use a smaller model."
        )
        return 0
    available = re.search(r"MemAvailable: +(\d+) kB", meminfo)
    limits = [int(available[1]) * 1024] if available else [0]
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # The text "max" means that there is no limit.
            limits.append(int((folder / "memory.max").read_text()) - _used(folder))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int((root / "sys/fs/cgroup/memory/memory.limit_in_bytes").read_text()))
    return max(1, min(limits)) if min(limits) else 0  # at least 1, since 0 means unknown


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once in a process."""
    _log.warning(text)


def _used(group: Path) -> int:
    """Return the bytes that a control group uses, without the file cache, which Linux frees on demand."""
    used = 0
    with contextlib.suppress(OSError, ValueError):
        used = int((group / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        used -= int(cache[1]) if cache else 0
    return used


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep linear algebra on one thread. The thread count sets the order of sums, and so their last bits."""
    torch = sys.modules.get("torch")  # Importing torch takes seconds; a process without it need not wait.
    threads = torch.get_num_threads() if torch else 1  # Read before the limit, which would change it to 1.
    with threadpool_limits(1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)


def on_all_cores(work: Callable[[Item], T], items: Iterable[Item], *, workers: int) -> Iterator[T]:
    """Yield `work(item)` in the order of `items`, each on one thread, `workers` at a time.

    Raise the error of the first item that fails; items that no thread has begun are dropped.
    """
    with one_thread():
        if workers == 1:
            yield from map(work, items)
            return
        import torch

        # torch stores the number of OpenMP threads per thread, so each worker has to set it.
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def layers_at_once(width: int) -> int:
    """Return how many layers of `width` columns are fitted at a time on the CPU.

    One layer per core, or fewer where the free memory holds fewer. The results do not depend on the number.
    """
    free = free_memory()
    if not free:  # unknown
        return usable_cores()
    layer = 2 * _MATRICES * 8 * width**2  # bytes; half of the free memory is left to everything else
    return max(1, min(usable_cores(), free // layer))


@dataclass(frozen=True)
class Processes:
    """The processes that share a run: the rank of this process, and their number.

    torchrun starts several processes. Every method except `share` is a collective call: all ranks make it, in
    the same order.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """Return the processes of torch.distributed's default group.

        Raises:
            InputError: there is no such group.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            raise InputError(
                "torch.distributed has no process group; one is needed. Start the program with torchrun and "
                "call torch.distributed.init_process_group first."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls) -> Iterator[Processes]:
        """Join the group that torchrun's environment describes, and leave it at the end.

        Without torchrun the group is this process alone.

        Raises:
            InputError: torchrun started more processes on this machine than it has GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        import torch
        import torch.distributed as dist

        # gloo exchanges Python values and CPU tensors; NCCL exchanges tensors on GPUs.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local_rank >= gpus:
                raise InputError(
                    f"torchrun started {local_rank + 1} or more processes on this machine, which has {gpus} "
                    "GPUs; at most one process per GPU is accepted. Start fewer processes, or fit on the CPU "
                    "with CUDA_VISIBLE_DEVICES= (empty)."
                )
            torch.cuda.set_device(local_rank)
        dist.init_process_group(backend, timeout=_TIMEOUT)
        try:
            yield cls.joined()
        finally:
            dist.destroy_process_group()

    def share(self, count: int) -> slice:
        """Return this rank's slice of `count` items. The slices follow one another in the order of ranks."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor` after replacing its values with their sums over all ranks."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in the order of ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def concatenate(self, rows: Tensor) -> Tensor:
        """Return the rows [n, D] of all ranks in one tensor, in the order of ranks."""
        if self.count == 1:
            return rows
        import torch

        # As arrays: a tensor that is a view would be sent with its whole storage.
        parts = self.gather(rows.cpu().numpy())
        return torch.cat([torch.from_numpy(part).to(rows.device) for part in parts])

    def from_first(self, value: T) -> T:
        """Return the value of rank 0. The values of the other ranks are ignored."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()
"""A run of this process alone."""
