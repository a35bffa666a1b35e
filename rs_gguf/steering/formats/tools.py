"""Writers of vectors that `convert` reads, apart from it so that the command line names them at once."""

from __future__ import annotations

# Writer → the number that it gives to block 0. Here, in PyTorch and in llama.cpp's `direction.N` that is 0.
FORMATS = {
    "cvector-generator": 1,
    "jukofyork": 1,
    "repeng": 0,
    "easysteer": 0,
    "saklas": 0,
    "steering-vectors": 0,
    "huggingface": 0,
}
