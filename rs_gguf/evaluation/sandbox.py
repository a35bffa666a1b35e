"""Runs a Python function that a model wrote, where it can do little but compute.

In: source code, the name of a function, and the arguments of its calls. Out: each call's value, or what went
wrong. The code runs in a process of its own (`python -P -s -S`, no inherited environment, an empty temporary
folder, a session of its own) whose kernel filter (seccomp, Linux) lets it use the memory and the three
standard files it has, and refuses every other system call: it opens no file and no socket, starts no process
and sends no signal. Memory, processor time and output are limited by `setrlimit`. Where there is no such
filter nothing is run: see `unavailable`.

What this is not: a boundary for code of an adversary. It runs under the user's own account and kernel, so a
flaw in the kernel calls that are left open, or in the processor, is not held; and the code can forge its own
reply, though it is never shown the values that are expected. It is made for the mistakes of a small model.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import resource

# Loaded before the filter closes, since nothing can be opened after it.
MODULES = (
    "bisect", "collections", "datetime", "functools", "heapq", "itertools", "math", "operator", "random",
    "re", "string", "typing",
)  # fmt: skip

_MEMORY = 512 * 2**20  # bytes of address space; an idle interpreter takes 30 MB
_CPU_SECONDS = 2
_WALL_SECONDS = 10.0
_OUTPUT = 64 * 2**10  # bytes

# Audit number and, by name, the system calls that a Python computation needs (linux/audit.h, unistd.h).
_CALLS = {
    "x86_64": (0xC000003E, {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "mremap": 25, "madvise": 28,
        "getpid": 39, "exit": 60, "gettimeofday": 96, "gettid": 186, "futex": 202, "clock_gettime": 228,
        "exit_group": 231, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "fstat": 80, "exit": 93, "exit_group": 94,
        "futex": 98, "clock_gettime": 113, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216,
        "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
    }),
}  # fmt: skip
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_RET_ALLOW, _RET_EPERM, _RET_KILL = 0x7FFF0000, 0x00050001, 0x80000000


@dataclass(frozen=True)
class Outcome:
    """What became of the calls: a value each (as JSON has it), or why there is none."""

    values: list[Any]
    error: str = ""


def unavailable() -> str:
    """Why code cannot be run safely on this system; empty when it can."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return f"no system call filter for {sys.platform} on {platform.machine()}"
    error = call("def probe():\n    return 1", "probe", [[]]).error
    return f"the sandbox does not start: {error}" if error else ""


def call(source: str, function: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
    """The values of `function` from `source` for each list of arguments, computed in the sandbox.

    A crash, an exception or a limit that is hit ends all calls, and `error` says so.
    """
    job = json.dumps({"source": source, "function": function, "arguments": [list(a) for a in arguments]})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # so that sets have one order; `-I` would ignore it
            start_new_session=True,
        )
        try:
            child.communicate(job.encode(), timeout=_WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome([], f"no end after {_WALL_SECONDS:g} s")
        finally:
            _kill_group(child)
        output.seek(0)
        written = output.read(_OUTPUT + 1)
    if child.returncode:
        return Outcome([], _ending(child.returncode))
    try:
        reply = json.loads(written)
        return Outcome(list(reply["values"]), str(reply["error"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Outcome([], "no result")


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin:
        child.stdin.close()


def _ending(code: int) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"stopped: more than {_CPU_SECONDS} s of processor time or out of memory"
    return f"ended by signal {-code}" if code < 0 else f"ended with code {code}"


# ---- in the child ------------------------------------------------------------------------------------


def _main() -> None:
    job = json.load(sys.stdin)
    for name in MODULES:
        __import__(name)
    reply = sys.__stdout__
    sys.stdout = sys.stderr = io.StringIO()
    # Memory and time count what the interpreter has taken already.
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_FSIZE, _OUTPUT),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _close_the_kernel()
    values: list[Any] = []
    error = ""
    try:
        namespace: dict[str, Any] = {"__name__": "answer"}
        exec(compile(job["source"], "<answer>", "exec"), namespace)  # the one purpose of this process
        values = [namespace[job["function"]](*arguments) for arguments in job["arguments"]]
        text = json.dumps({"values": values, "error": ""})
    except BaseException as caught:  # SystemExit and the like come from the answer too
        error = f"{type(caught).__name__}: {caught}"[:200]
        text = json.dumps({"values": [], "error": error})
    if reply is not None:
        reply.write(text)
        reply.flush()
    os._exit(0)


def _close_the_kernel() -> None:
    """Refuse every system call that is not in `_CALLS`, with EPERM, for the rest of this process."""
    audit, calls = _CALLS[platform.machine()]

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    program = [instruction(load, 4), instruction(equal, audit, 1, 0), instruction(give, _RET_KILL)]
    program.append(instruction(load, 0))
    for number in calls.values():
        program += [instruction(equal, number, 0, 1), instruction(give, _RET_ALLOW)]
    program.append(instruction(give, _RET_EPERM))
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a 16-bit length, padding, a pointer.
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    for request in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
    ):
        if prctl(*request) != 0:
            os._exit(3)


if __name__ == "__main__":
    _main()
