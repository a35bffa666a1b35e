"""The version of the package, and the commit of a checkout. `pyproject.toml` is the version's only source."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("rs-gguf")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def commit() -> str | None:
    """Return the commit of the checkout that runs, followed by "-dirty" if files differ from it.

    None outside a checkout, or without git.
    """
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():  # git would find a repository above it
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
