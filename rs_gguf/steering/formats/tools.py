"""List the source tools whose vectors `convert` reads.

The list has a module of its own so that the command line shows it without heavy imports.
"""

from __future__ import annotations

# Source tool → the number that it gives to layer 0: 0 in this project, PyTorch and llama.cpp's `direction.N`.
FORMATS = {
    "cvector-generator": 1,
    "jukofyork": 1,
    "repeng": 0,
    "easysteer": 0,
    "saklas": 0,
    "steering-vectors": 0,
    "huggingface": 0,
}
