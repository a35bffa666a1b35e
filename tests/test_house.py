"""The architecture: which way imports run, how long modules are, and that tests mirror modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "rs_gguf", ROOT / "tests"
LONGEST = 300  # lines of a module

# Tests of more than one module, or of a module with the files of another kind.
NO_MIRROR = {
    "cli/test_adapter_files.py",
    "cli/test_commands.py",
    "engines/llama/test_drafts.py",
    "judges/test_real.py",
    "pipeline/test_thinking.py",
    "report/test_browser.py",
}
WITHOUT_MIRROR = {"fixtures", "fuzz", "real"}  # folders


def modules() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def test_imports_run_downwards() -> None:
    # In a process of its own: the linter configures logging for all.
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_short() -> None:
    long = {
        name for name, path in modules().items() if path.read_text(encoding="utf-8").count("\n") > LONGEST
    }
    assert long == set(), f"longer than {LONGEST} lines"


def test_tests_mirror_modules() -> None:
    names = {
        path.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("test_*.py")
        if path.parent != TESTS and path.relative_to(TESTS).parts[0] not in WITHOUT_MIRROR
    }
    without = {name for name in names if name.replace("test_", "") not in modules()}
    assert without == NO_MIRROR
