"""What is raised in Python that llama.cpp calls, raised again where llama.cpp was called.

ctypes gives such an exception to `sys.unraisablehook` and goes on. It may well be a Ctrl-C, since a callback
is the first Python to run after the signal; a `try` in the callback would miss it, for signals are handled
before the first statement. Functions go in that llama.cpp is to call, and calls of llama.cpp; exceptions come
out.
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
    """`raised`: what the calls that this thread is in have raised so far, the innermost last."""

    def __init__(self) -> None:
        self.raised: list[list[BaseException]] = []


_codes: set[CodeType] = set()
_here = _Thread()
_lock = threading.Lock()
_calls = 0  # in all threads
_before = sys.unraisablehook


def called_back(function: _F) -> _F:
    """Mark a function that llama.cpp calls."""
    _codes.add(function.__code__)
    return function


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """Around a call of llama.cpp: at its end, raise what a function that is `called_back` has raised."""
    global _calls, _before
    raised: list[BaseException] = []
    _here.raised.append(raised)
    with _lock:
        if _calls == 0:
            _before, sys.unraisablehook = sys.unraisablehook, _hook
        _calls += 1
    try:
        yield
    finally:
        _here.raised.pop()
        with _lock:
            _calls -= 1
            if _calls == 0:
                sys.unraisablehook = _before
    if raised:
        raise raised[0]


def _hook(found: sys.UnraisableHookArgs) -> None:
    trace, error = found.exc_traceback, found.exc_value
    if _here.raised and trace is not None and trace.tb_frame.f_code in _codes and error is not None:
        _here.raised[-1].append(error)
    else:
        _before(found)
