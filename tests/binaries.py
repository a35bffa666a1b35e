"""llama.cpp's own programs and converter, from the source that the installed binding was compiled from.

The version of llama-cpp-python goes in; out come the source tree inside its sdist, and the programs that CMake
builds from it. Both stay in the user's cache folder: the first build takes about 5 minutes on two cores.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import llama_cpp
import platformdirs
from filelock import FileLock

from rs_gguf.llama import build

PROGRAMS = ("llama-server", "llama-completion", "llama-cvector-generator", "llama-batched-bench")

_FOLDER = platformdirs.user_cache_path("rs-gguf") / "llama.cpp" / llama_cpp.__version__
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


def program(name: str) -> Path:
    """One of `PROGRAMS`, built if it is not there yet. A build that was cut short goes on where it was."""
    # The binding's features stand for the processor's, since both are compiled for the machine at hand.
    features = hashlib.sha256(build().encode()).hexdigest()[:12]
    folder = _FOLDER / f"build-{features}"
    finished = folder / "bin"
    with FileLock(_FOLDER / "build.lock"):
        if not finished.is_dir():
            _build(source(), folder, finished)
    return finished / name


def _build(tree: Path, folder: Path, finished: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    work = folder / "work"
    options = [f"-D{key}={value}" for key, value in _OPTIONS.items()]
    options += [f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}"]
    # The programs find their libraries beside themselves, wherever they are moved.
    options += ["-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    _run(str(scripts / "cmake"), "-S", str(tree), "-B", str(work), "-G", "Ninja", *options)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _run(str(scripts / "cmake"), "--build", str(work), "--parallel", str(jobs), "--target", *PROGRAMS)
    (work / "bin").rename(finished)
    shutil.rmtree(work)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
