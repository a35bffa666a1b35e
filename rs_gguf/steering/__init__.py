"""The files that llama.cpp loads: control vectors and LoRA adapters."""

from rs_gguf.steering.vector import SteeringVector

__all__ = ["SteeringVector"]
