"""What a model's code can do in the sandbox, and what it cannot. Each case is a process of its own."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from rs_gguf.evaluation import sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is a filter of Linux")


def run(body: str) -> sandbox.Outcome:
    """The outcome of a function of no arguments with this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return sandbox.call(f"def answer():\n{lines}\n", "answer", [[]])


@linux
def test_it_is_there_on_linux() -> None:
    assert sandbox.unavailable() == ""


@linux
def test_values_come_back_as_json_has_them() -> None:
    source = (
        "import math, re\ndef f(a, b=1):\n    return [a, b, math.pi, re.sub('a', 'b', 'aa'), {'k': None}]\n"
    )
    outcome = sandbox.call(source, "f", [[1], ["é", False]])
    assert outcome == sandbox.Outcome([[1, 1, 3.141592653589793, "bb", {"k": None}],
                                       ["é", False, 3.141592653589793, "bb", {"k": None}]])  # fmt: skip


@linux
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return 1 / 0", "ZeroDivisionError"),
        ("return missing", "NameError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("return {1, 2}", "TypeError"),  # JSON has no sets
        ("return answer()", "RecursionError"),
        ("return len(bytearray(10**10))", "MemoryError"),
        ("return 'a' * 200_000", "ended with code"),  # more than may be written
        ("import os\nos._exit(0)", "no result"),
        ("import ctypes\nctypes.string_at(0)", "ended by signal 11"),
        ("return input()", "EOF"),
    ],
)
def test_what_goes_wrong_is_told(body: str, error: str) -> None:
    outcome = run(body)
    assert outcome.values == []
    assert error in outcome.error


@linux
@pytest.mark.parametrize(
    "body",
    [
        "return open('/etc/hostname').read()",
        "open('left-behind', 'w')",
        "import os\nreturn os.listdir('/')",
        "import os\nos.fork()",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.unlink('x')",
        "import os\nos.chmod('.', 0)",
        "import sqlite3",  # nothing new can be loaded
        "import subprocess\nsubprocess.run(['true'])",
        "import _socket\n_socket.socket()",
        "import time\ntime.sleep(0)\ntime.sleep(30)",
        "import _thread\n_thread.start_new_thread(len, ('',))",
    ],
)
def test_everything_else_is_refused(body: str) -> None:
    outcome = run(body)
    assert outcome.values == []
    assert outcome.error


@linux
def test_the_kernel_refuses_it_not_python() -> None:
    """A raw system call past all of Python: openat, socket and getppid come back with EPERM."""
    numbers = {"x86_64": (257, 41, 110), "aarch64": (56, 198, 173)}[platform.machine()]
    body = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = []\n"
        f"for number in {numbers}:\n    found += [libc.syscall(number, 0, 0, 0), ctypes.get_errno()]\n"
        "return found"
    )
    assert run(body).values == [[-1, 1] * 3]


@linux
def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_GGUF_API_KEY", "not to be seen")
    flags = "sys.flags.safe_path, sys.flags.no_user_site, sys.flags.no_site"
    environment, *found = run(f"import os, sys\nreturn [dict(os.environ), {flags}]").values[0]
    assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"}
    assert found == [True, 1, 1]
    assert os.environ["RS_GGUF_API_KEY"] == "not to be seen"


@linux
def test_a_set_has_one_order() -> None:
    body = "return list({str(k) for k in range(100)})"
    assert run(body).values == run(body).values


@linux
@pytest.mark.parametrize(
    ("seconds", "error"), [(120.0, "stopped: more than 2 s"), (0.01, "no end after 0.01 s")]
)
def test_a_loop_without_end_is_stopped(seconds: float, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit on the processor's time, and on a machine that is too busy by the clock."""
    monkeypatch.setattr(sandbox, "_WALL_SECONDS", seconds)
    outcome = run("while True:\n    pass")
    assert outcome.values == []
    assert outcome.error.startswith(error)


@linux
def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("return 1").values == [1]
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_filter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    assert "s390x" in sandbox.unavailable()
