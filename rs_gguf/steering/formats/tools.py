"""List the tools whose files `convert` reads and writes.

The lists have a module of its own so that the command line shows them without heavy imports.
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

PROJECTIONS = ("glp",)
"""Formats of projections, which become adapters of a model."""
TARGETS = ("peft", "glp")
"""Formats that an adapter of this project can be written in."""
