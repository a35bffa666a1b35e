"""Where a fit computes: on the CPU or on a CUDA device.

A device name of the recipe goes in; a `torch.device`, and the number of layers to fit at a time, come out.
"""

from __future__ import annotations

import functools
import logging
from typing import get_args

import torch

from rs_gguf.errors import InputError
from rs_gguf.machine import ALONE, Device, Processes, layers_at_once

_log = logging.getLogger("rs_gguf.estimators")


def resolve_device(device: Device) -> torch.device:
    """Return the device that `device` names; "auto" is CUDA if present, else the CPU.

    Raises:
        InputError: `device` is another name, or "cuda" without a CUDA device.
    """
    check_device(device)
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise InputError(
            "device 'cuda': PyTorch sees no CUDA device here. Use device 'cpu' or 'auto', or install a build "
            "of PyTorch with CUDA."
        )
    if device == "auto" and not has_cuda and torch.backends.mps.is_available():
        _warn_about_mps()
    return torch.device("cuda" if has_cuda and device != "cpu" else "cpu")


@functools.cache
def _warn_about_mps() -> None:
    """Log once, although every stage of a run resolves the device."""
    _log.warning("The fit runs on the CPU: MPS has no float64.")


def check_device(device: str) -> None:
    """Raise `InputError` unless `device` is an accepted name."""
    if device not in get_args(Device):
        raise InputError(f"device {device!r}: {', '.join(get_args(Device))} are accepted")


def workers(device: torch.device, width: int, processes: Processes = ALONE) -> int:
    """Return how many layers of `width` columns are fitted at a time: `layers_at_once` on the CPU.

    It is 1 on a GPU, which one layer keeps busy. It is also 1 with several processes: they add up their sums,
    and all must do so in the same order.
    """
    if device.type != "cpu" or processes.count > 1:
        return 1
    return layers_at_once(width)
