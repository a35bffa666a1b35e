"""Break valid files at random, and limit memory and time while they are read.

In: valid files. Out: mutated files that are still mostly valid. The changes are known to harm readers: sizes
at the edges of integers, cut ends, moved and repeated pieces, and pieces of other files.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

MEMORY = 200 * 2**20
SECONDS = 10.0
"""The most processor time for one file: a thousand times what the slowest file needs."""

POWERS = (0, 1, 5, 7, 8, 15, 16, 31, 32, 63, 64)
EDGES = sorted({2**bits + step for bits in POWERS for step in (-1, 0, 1)})


@contextlib.contextmanager
def limits(memory: int = MEMORY) -> Iterator[Callable[[], object]]:
    """Let the process grow by at most `memory` bytes, and each file take at most `SECONDS`.

    Yield a function to call before each file. The address space is limited, so that larger allocations fail;
    the peak of resident memory is measured. Raise `AssertionError` if a limit is exceeded.
    """
    resource = pytest.importorskip("resource", reason="the limit needs a POSIX system")
    if not Path("/proc/self/status").exists():
        pytest.skip("the limit needs /proc")

    def give_up(*_: object) -> None:
        raise AssertionError(f"one file took more than {SECONDS:g} s of processor time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak that earlier tests reached
    before = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + memory, hard))
    handler = signal.signal(signal.SIGVTALRM, give_up)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert _status("VmHWM") - before <= memory


def mutate(rng: random.Random, seeds: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """Return one of `seeds` with one to eight changes; `pieces` are bytes that readers find difficult."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 2, 4, 8, 16, 32, 64))
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            flip = 1 << rng.randrange(8)
            data[at : at + 1] = bytes(byte ^ flip for byte in data[at : at + 1])
        elif kind == 2:
            width, code = rng.choice(((4, "<I"), (8, "<Q")))
            data[at : at + width] = struct.pack(code, rng.choice(EDGES) % 2 ** (8 * width))
        elif kind == 3:
            del data[at : len(data) if rng.random() < 0.3 else at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size] if rng.random() < 0.5 else rng.randbytes(size)
        elif kind == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        elif kind == 6 and data.startswith(b"GGUF") and len(data) >= 24:
            # The two counts of the header and the length of the first key control loops of the reader.
            field = rng.choice((8, 16, 24))
            data[field : field + 8] = struct.pack("<Q", rng.choice(EDGES) % 2**64)
        else:
            piece = rng.choice(pieces)
            data[at : at + rng.choice((0, len(piece)))] = piece
    return bytes(data)


def replace(path: Path, data: bytes) -> None:
    """Write a new file instead of truncating the old one, which makes some file systems wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
