"""Read, write and check control vector files. These are public names of `rs_gguf.steering`."""

from rs_gguf.steering.file import check_vector as check
from rs_gguf.steering.report import CheckReport
from rs_gguf.steering.vector_file import read, write

__all__ = ["CheckReport", "check", "read", "write"]
