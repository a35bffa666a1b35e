"""A pytest plugin that puts the kernel built with sanitizers in the place of the installed one.

Used by `make sanitize`, which preloads the sanitizer's library: `pytest -p sanitized …`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "rs_gguf._core"

(_path,) = (Path(__file__).parents[1] / "build" / "sanitize").glob("_core*.so")
_spec = importlib.util.spec_from_file_location(NAME, _path)
assert _spec is not None
assert _spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[NAME])
