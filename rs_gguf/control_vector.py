"""Control vector files: read, write, check; `rs_gguf.steering` has the rest."""

from rs_gguf.steering.file import check_vector as check
from rs_gguf.steering.report import CheckReport
from rs_gguf.steering.vector_file import read, write

__all__ = ["CheckReport", "check", "read", "write"]
