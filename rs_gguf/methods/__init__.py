"""Methods that make steering files. To add one, write a module in this package and add it to `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rs_gguf.engines.engine import Can
from rs_gguf.methods.adapter import GatedAdapter
from rs_gguf.methods.method import SteeringMethod
from rs_gguf.methods.vector import ControlVector
from rs_gguf.records.metrics import Effect

METHODS: Mapping[str, SteeringMethod[Any]] = {"vector": ControlVector(), "adapter": GatedAdapter()}
"""All methods by name, in the order in which they are fitted, searched and reported."""


def suited_methods(can: Can, effect: Effect) -> list[str]:
    """Return the names of the methods that suit the effect and an engine with these abilities."""
    return [name for name, method in METHODS.items() if method.suits(can, effect)]
