"""The version, which `pyproject.toml` alone states."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rs-gguf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
