"""Where a fit computes: on the CPU or on a GPU of CUDA."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias, get_args

import torch

from rs_gguf.errors import InputError
from rs_gguf.machine import Processes, usable_cores

Device: TypeAlias = Literal["auto", "cpu", "cuda"]

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
        _log.warning("The fit runs on the CPU: MPS has no float64.")
    return torch.device("cuda" if has_cuda and device != "cpu" else "cpu")


def check_device(device: str) -> None:
    """Raise `InputError` unless `device` is a name that is accepted."""
    if device not in get_args(Device):
        raise InputError(f"device {device!r}: {', '.join(get_args(Device))} are accepted")


def workers(device: torch.device, processes: Processes) -> int:
    """Return how many layers are fitted at a time.

    One on a GPU, which is fast enough for one; and one where processes add up their sums, since all of them
    must do so in the same order.
    """
    return usable_cores() if device.type == "cpu" and processes.count == 1 else 1
