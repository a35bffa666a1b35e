"""Raise exceptions from Python callbacks of llama.cpp again where llama.cpp was called.

ctypes gives an exception in a callback to `sys.unraisablehook` and goes on. The exception is often a Ctrl-C,
since a callback is the first Python code to run after the signal. A `try` in the callback would miss it,
because Python handles signals before the first statement. Callbacks and calls of llama.cpp go in; exceptions
come out.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class _Thread(threading.local):
    """`raised`: the exceptions of the callbacks of each open call of this thread, innermost call last."""

    def __init__(self) -> None:
        self.raised: list[list[BaseException]] = []


_codes: set[CodeType] = set()  # the code of every callback
_thread = _Thread()
_lock = threading.Lock()
_calls = 0  # open calls of all threads
_previous_hook = sys.unraisablehook  # restored when the last open call ends


def called_back(function: _F) -> _F:
    """Mark a function as a callback of llama.cpp, so that `calling` raises its exceptions."""
    _codes.add(function.__code__)
    return function


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """Wrap a call of llama.cpp and, at its end, raise the first exception of a `called_back` function."""
    global _calls, _previous_hook
    raised: list[BaseException] = []
    _thread.raised.append(raised)
    with _lock:
        if _calls == 0:
            _previous_hook, sys.unraisablehook = sys.unraisablehook, _hook
        _calls += 1
    try:
        yield
    finally:
        _thread.raised.pop()
        with _lock:
            _calls -= 1
            if _calls == 0:
                sys.unraisablehook = _previous_hook
    if raised:
        raise raised[0]


def _hook(arguments: sys.UnraisableHookArgs) -> None:
    trace, error = arguments.exc_traceback, arguments.exc_value
    if _thread.raised and trace is not None and trace.tb_frame.f_code in _codes and error is not None:
        _thread.raised[-1].append(error)
    else:
        _previous_hook(arguments)
