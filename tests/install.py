"""Check a small installation, `pip install rs-gguf` without extras: `python tests/install.py [--pure]`.

`make wheel` and cibuildwheel run it with a Python that has the wheel and nothing else. The commands for files
must work without the packages of the extras, and without the checkout on Python's path. With `--pure` the
compiled kernel must be absent, as after an installation without a compiler; otherwise it must be there.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import rs_gguf
from rs_gguf.cli.extras import EXTRAS
from rs_gguf.projection import project

ROOT = Path(__file__).parents[1]


def rs_export(folder: Path, *arguments: object, code: int = 0) -> str:
    """Run the command in `folder` and return its output; fail if it does not exit with `code`."""
    command = [sys.executable, "-m", "rs_gguf", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def main(pure: bool) -> None:
    """Raise `AssertionError` for the first thing that does not work; print what was checked."""
    package = Path(rs_gguf.__file__).parent
    assert not package.is_relative_to(ROOT / "rs_gguf"), f"{package} is the checkout and not an installation"
    present = [name for modules in EXTRAS.values() for name in modules if importlib.util.find_spec(name)]
    # huggingface-hub, a requirement of the small installation, may need httpx.
    assert set(present) <= {"httpx"}, f"an extra is installed: {present}"
    has_kernel = importlib.util.find_spec("rs_gguf._core") is not None
    assert has_kernel != pure, f"compiled kernel: {has_kernel}"
    h = np.ones((2, 3, 4), np.float32)
    assert (project(h, np.ones((3, 1, 4), np.float32)) == 4).all()
    files = sorted((ROOT / "vectors").glob("*/*.gguf"))
    assert files
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files:
            assert "valid" in rs_export(folder, "check", file)
            rs_export(folder, "inspect", file)
            rs_export(folder, "combine", f"{file}:0.5", "--output", folder / f"half-{file.name}")
        save_file({"layer_1": np.ones(8, np.float32)}, folder / "foreign.safetensors")
        source = ("convert", "--from", "huggingface", "--architecture", "qwen2", "foreign.safetensors")
        rs_export(folder, *source, "--output", "converted.gguf")
        assert "valid" in rs_export(folder, "check", "converted.gguf")
        assert "'rs-gguf[run]'" in rs_export(folder, "run", code=2)
        assert "'rs-gguf[run]'" in rs_export(folder, "check", files[0], "--model", files[0], code=2)
    kernel = "without the compiled kernel" if pure else "with the compiled kernel"
    print(f"rs-gguf {version('rs-gguf')} {kernel}, Python {sys.version.split()[0]}: commands for files work")


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the note that NumPy replaces the kernel
    main("--pure" in sys.argv[1:])
