"""Refusal Steering for llama.cpp (arXiv 2512.16602): fit, write and check control vectors and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_gguf.version import __version__

if TYPE_CHECKING:
    from rs_gguf.pipeline.recipe import Recipe

__all__ = ["__version__", "run"]


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Run a recipe in the folder `out` and return its metrics. See `rs_gguf.pipeline.run.run`."""
    # The import is here, so that `import rs_gguf` and `rs-export --help` do not load PyTorch.
    from rs_gguf.pipeline.run import run as run_pipeline

    return run_pipeline(recipe, out)
