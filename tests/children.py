"""The command as a process of its own, that no test waits for in vain."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

_LIMIT = 120.0  # seconds, many times what a test takes


@contextlib.contextmanager
def rs_export(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`rs-export` with pipes to it, killed after two minutes: whoever reads from it then finds the end."""
    command = [sys.executable, "-m", "rs_gguf", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        watchdog = threading.Timer(_LIMIT, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
