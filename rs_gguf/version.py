"""The version of the package. `pyproject.toml` is its only source."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rs-gguf")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
