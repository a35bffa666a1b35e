"""Forward llama.cpp's log to Python's `logging`, and quote its latest errors in our error messages.

Call `forget_errors` before a call of llama.cpp. If the call fails, `failure` returns a message with the
errors that llama.cpp has logged since then.
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
    """Record one line of llama.cpp's log. llama.cpp calls this."""
    message = text.decode("utf-8", "replace").strip()
    if level == _ERROR and message:
        _errors.append(message)
    _log.debug(message)


_callback = llama_cpp.llama_log_callback(on_log)


def listen() -> None:
    """Send llama.cpp's log here from now on."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def forget_errors() -> None:
    """Clear the recorded errors, which belong to earlier calls than the next one."""
    _errors.clear()


def failure(problem: str) -> str:
    """Return a message of `problem` and the errors that llama.cpp has logged since `forget_errors`."""
    errors = "; ".join(dict.fromkeys(_errors)) or "nothing more"
    return f"{problem}. llama.cpp says: {errors}."


def build() -> str:
    """Return the version of the llama.cpp binding and the CPU features that it was built with."""
    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return f"llama-cpp-python {llama_cpp.__version__} ({features})"
