"""llama.cpp's own programs and converter, from the source that the installed binding was compiled from.

The version of llama-cpp-python goes in; out come the source tree inside its sdist, the programs that CMake
builds from it, and a running server; and other tools' Python packages. All stay in the user's cache folder:
the first build takes minutes.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import platformdirs
from filelock import FileLock

from rs_gguf.cores import usable_cores
from rs_gguf.llama_log import build

PROGRAMS = ("llama-server", "llama-completion", "llama-cvector-generator")

_CACHE = platformdirs.user_cache_path("rs-gguf")
_FOLDER = _CACHE / "llama.cpp" / llama_cpp.__version__
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
}


def source() -> Path:
    """The llama.cpp tree that the installed llama-cpp-python was compiled from, fetched with pip once."""
    tree = _FOLDER / "source"
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(_FOLDER / "source.lock"):
        if not tree.is_dir():
            with tempfile.TemporaryDirectory(dir=_FOLDER, prefix=".sdist-") as scratch:
                _run(
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch),
                    *("--no-binary", "llama-cpp-python", f"llama-cpp-python=={llama_cpp.__version__}"),
                )
                (archive,) = Path(scratch).glob("*.tar.gz")
                with tarfile.open(archive) as tar:
                    tar.extractall(scratch, filter="data")
                (unpacked,) = Path(scratch).glob("*/vendor/llama.cpp")
                unpacked.rename(tree)
    return tree


def package(requirement: str) -> Path:
    """A folder to import `NAME==VERSION` from, without what it requires: its pins may clash with ours."""
    folder = _CACHE / "packages" / requirement
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / "packages.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                draft = Path(scratch) / "draft"
                pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile")
                _run(*pip, "--target", str(draft), requirement)
                draft.rename(folder)
    return folder


def program(name: str) -> Path:
    """One of llama.cpp's programs, built if it is not there yet: `PROGRAMS` together, any other by itself.

    A build that was cut short goes on where it was.
    """
    # The binding's features stand for the processor's, since both are compiled for the machine at hand.
    features = hashlib.sha256(build().encode()).hexdigest()[:12]
    together = name in PROGRAMS  # no test should wait for what only a benchmark needs
    folder = _FOLDER / (f"build-{features}" if together else f"build-{features}-{name}")
    finished = folder / "bin"
    with FileLock(f"{folder}.lock"):
        if not finished.is_dir():
            _build(source(), folder, finished, PROGRAMS if together else (name,))
    return finished / name


def completion(*options: str) -> tuple[str, list[str]]:
    """What `llama-completion` writes, and the lines that it logs until its end.

    A thread of its own writes both, and now and then the program ends before it does: then once more.
    """
    command = [str(program("llama-completion")), *options]
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=True)
        lines = done.stderr.decode(errors="replace").splitlines()
        if any("graphs reused" in line for line in lines):  # the last thing that it says
            return done.stdout.decode("utf-8", "replace"), lines
    raise RuntimeError(f"{' '.join(command)} never logs to its end:\n{done.stderr.decode(errors='replace')}")


class Server:
    """A llama-server with these options, on a port that the system chose, until the `with` block ends.

    `log` receives what it prints. Raises `RuntimeError`, with the end of that, when it dies or is not ready
    in time.
    """

    def __init__(self, log: Path, *options: str) -> None:
        self.log = log
        self._command = [str(program("llama-server")), "--host", "127.0.0.1", "--port", "0", "--no-webui"]
        self._command += ["--threads", str(usable_cores()), *options]

    def __enter__(self) -> Server:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.said())
            if found:
                self.address = f"127.0.0.1:{found[1]}"
                if self._request("GET", "/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{' '.join(self._command)} is not ready:\n{self.said()[-3000:]}")

    def said(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to a request in JSON. May be called from several threads."""
        status, answer = self._request("POST", path, body)
        assert status == 200, answer
        return answer

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def _build(tree: Path, folder: Path, finished: Path, targets: Sequence[str]) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    work = folder / "work"
    options = [f"-D{key}={value}" for key, value in _OPTIONS.items()]
    options += [f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}"]
    # The programs find their libraries beside themselves, wherever they are moved.
    options += ["-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    _run(str(scripts / "cmake"), "-S", str(tree), "-B", str(work), "-G", "Ninja", *options)
    _run(
        str(scripts / "cmake"), "--build", str(work), "--parallel", str(usable_cores()), "--target", *targets
    )
    (work / "bin").rename(finished)
    shutil.rmtree(work)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
