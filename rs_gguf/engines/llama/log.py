"""What llama.cpp says: its log goes into Python's, and its latest errors into the messages of ours.

Before a call into llama.cpp its errors are forgotten; where the call fails, `failure` words what it said.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque

import llama_cpp

from rs_gguf.engines.llama.calls import called_back

_log = logging.getLogger("rs_gguf.llama")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h, which the binding does not name
_errors: deque[str] = deque(maxlen=8)


@called_back
def on_log(level: int, text: bytes, _user_data: object) -> None:
    """Called by llama.cpp with a line of its log."""
    message = text.decode("utf-8", "replace").strip()
    if level == _ERROR and message:
        _errors.append(message)
    _log.debug(message)


_callback = llama_cpp.llama_log_callback(on_log)


def listen() -> None:
    """Have llama.cpp log here from now on."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def forget_errors() -> None:
    """What was said so far is of another call than the next one."""
    _errors.clear()


def failure(what: str) -> str:
    """`what` went wrong, and llama.cpp's own words since `forget_errors`."""
    said = "; ".join(dict.fromkeys(_errors)) or "nothing more"
    return f"{what}. llama.cpp says: {said}."


def build() -> str:
    """Which llama.cpp this is: the binding's version and the CPU features it was built with."""
    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return f"llama-cpp-python {llama_cpp.__version__} ({features})"
