"""Choose and open the engine that runs a model. A path goes in; an `Engine` class or object comes out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rs_gguf.engines.engine import Engine
    from rs_gguf.engines.settings import EngineSettings

_log = logging.getLogger("rs_gguf.engine")

# On processors with AMX, llama.cpp configures the matrix tiles of a thread once. oneDNN and MKL, which
# multiply bfloat16 for PyTorch, configure them differently. llama.cpp's next step would then end the process
# with an illegal instruction. Both libraries read these variables at their first use and then avoid AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX512_E3")


def engine_for(path: Path) -> type[Engine]:
    """Return the engine class for `path`: PyTorch for a Hugging Face folder, llama.cpp for anything else.

    Each engine is imported only when it is needed: PyTorch takes seconds and hundreds of megabytes.
    """
    if path.is_dir():
        from rs_gguf.engines.pytorch.model import TorchModel

        return TorchModel
    from rs_gguf.engines.llama.model import LlamaModel

    return LlamaModel


def open_engine(path: Path, *, n_parallel: int = 32, settings: EngineSettings | None = None) -> Engine:
    """Load the model at `path`. It answers up to `n_parallel` sequences at once.

    settings: how llama.cpp runs it; None for the defaults. PyTorch uses none of them, and a warning says so.

    Raises:
        InputError: the model cannot be loaded, or does not support the settings.
    """
    if settings is None or not settings.changed:
        return engine_for(path)(path, n_parallel=n_parallel)
    if path.is_dir():
        ignored = ", ".join(settings.changed)
        _log.warning("PyTorch runs %s: settings of llama.cpp have no effect (%s).", path, ignored)
        return engine_for(path)(path, n_parallel=n_parallel)
    from rs_gguf.engines.llama.model import LlamaModel

    return LlamaModel(path, n_parallel=n_parallel, settings=settings)
