"""Where a fit computes: on the CPU or on a GPU of CUDA."""

from __future__ import annotations

import functools
import logging
from typing import Literal, TypeAlias, get_args

import torch

from rs_gguf.errors import InputError
from rs_gguf.machine import ALONE, Processes, free_memory, usable_cores

Device: TypeAlias = Literal["auto", "cpu", "cuda"]

_MATRICES = 4  # of float64, as wide as the layer, that one fit holds at its peak

_log = logging.getLogger("rs_gguf.estimators")


def resolve_device(device: Device) -> torch.device:
    """Return the device that `device` names; "auto" is CUDA if present, else the CPU.

    Raises:
        InputError: another name, or CUDA where there is none.
    """
    check_device(device)
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise InputError(
            "device 'cuda': PyTorch sees no CUDA device here. Use device 'cpu' or 'auto', or install a build "
            "of PyTorch with CUDA."
        )
    if device == "auto" and not has_cuda and torch.backends.mps.is_available():
        _say_why_not_mps()
    return torch.device("cuda" if has_cuda and device != "cpu" else "cpu")


@functools.cache
def _say_why_not_mps() -> None:
    """Say it once: a run asks for the device at every stage."""
    _log.warning("The fit runs on the CPU: MPS has no float64.")


def check_device(device: str) -> None:
    """Raise `InputError` unless `device` is a name that is accepted."""
    if device not in get_args(Device):
        raise InputError(f"device {device!r}: {', '.join(get_args(Device))} are accepted")


def workers(device: torch.device, width: int, processes: Processes = ALONE) -> int:
    """Return how many layers of `width` columns are fitted at a time: one a core, as far as there is memory.

    One on a GPU, which is fast enough for one; and one where processes add up their sums, since all of them
    must do so in the same order. The results do not depend on it.
    """
    if device.type != "cpu" or processes.count > 1:
        return 1
    free = free_memory()
    room = max(1, free // (2 * _MATRICES * 8 * width**2)) if free else usable_cores()
    return min(usable_cores(), room)
