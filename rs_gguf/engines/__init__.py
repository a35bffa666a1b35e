"""What runs a model. Which engine that is, is decided here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rs_gguf.engines.engine import Engine

# On processors with AMX, llama.cpp sets up the matrix tiles of a thread once. oneDNN and MKL, with which
# PyTorch multiplies bfloat16, set them up otherwise, and llama.cpp's next step would end the process with an
# illegal instruction. Both read these at their first use, and do without AMX then.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX512_E3")


def engine_for(path: Path) -> type[Engine]:
    """The engine of the model at `path`: PyTorch for a Hugging Face folder, llama.cpp for a file.

    Each is imported where it is needed: PyTorch takes seconds and hundreds of megabytes.
    """
    if path.is_dir():
        from rs_gguf.engines.pytorch.model import TorchModel

        return TorchModel
    from rs_gguf.engines.llama.model import LlamaModel

    return LlamaModel


def open_engine(path: Path, *, n_parallel: int = 32) -> Engine:
    """Load the model at `path`, of which `n_parallel` sequences are answered at once.

    Raises:
        InputError: it cannot be loaded.
    """
    return engine_for(path)(path, n_parallel=n_parallel)
