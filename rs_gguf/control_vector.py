"""Control vector files: read, write, check; `rs_gguf.steering.vector_file` has the rest."""

from rs_gguf.steering.vector_file import CheckReport, check, read, write

__all__ = ["CheckReport", "check", "read", "write"]
